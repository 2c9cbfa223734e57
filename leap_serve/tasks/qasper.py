"""Qasper (Dasigi et al. 2021): questions about whole papers; token F1 with the official normalisation.

Of several annotators' answers the best match counts. A row is a paper as the hub has it, or one question:
{"question", "context", "answers": [...]}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from leap_serve.errors import LeapError
from leap_serve.grading.metrics import token_f1
from leap_serve.tasks.base import SPLITS, Item, Split
from leap_serve.tasks.rows import Row, Source

# The hub's own branch of Parquet files: the data set's script is no longer run by anybody.
SOURCE = Source("qasper", "allenai/qasper", "qasper", revision="refs/convert/parquet", splits=SPLITS)


class Qasper:
    """Answers from a paper's full text, in the official splits; most prompts have 3,000 to 8,000 words."""

    name = "qasper"
    metric = "F1"
    stop: tuple[str, ...] = ("\n",)
    max_tokens = 64

    def __init__(self, data: Path | None = None) -> None:
        self._data = data

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return the first questions of a split in its own order, paper by paper."""
        out: list[Item] = []
        for where, row in SOURCE.rows(split, self._data):
            out += _items(row, where)
            if limit is not None and len(out) >= limit:
                break
        return out[:limit]

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[float]:
        """F1 against the answer that fits best."""
        return [
            max(token_f1(gold, text) for gold in json.loads(item.reference["answers"]))
            for item, text in zip(items, completions, strict=True)
        ]


def _items(row: Row, where: str) -> Iterator[Item]:
    try:
        if "context" in row:
            yield _item(str(row.get("id", where)), row["context"], row["question"], row["answers"])
            return
        qas, context = row["qas"], _paper(row)
        for number, question in enumerate(qas["question"]):
            golds = [answer_of(answer) for answer in qas["answers"][number]["answer"]]
            yield _item(qas["question_id"][number], context, question, golds)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        what = f"is no paper with questions ({type(error).__name__}: {error})"
        raise LeapError(where, what, 'give Qasper\'s rows, or {"question", "context", "answers"}') from None


def answer_of(answer: Mapping[str, Any]) -> str:
    """Return an annotator's answer as the official evaluation compares it."""
    if answer["unanswerable"]:
        return "Unanswerable"
    if answer["extractive_spans"]:
        return ", ".join(answer["extractive_spans"])
    return str(answer["free_form_answer"] or ("Yes" if answer["yes_no"] else "No"))


def _paper(row: Row) -> str:
    """Title, abstract and all sections as running text."""
    full = row["full_text"]
    sections = [
        "\n".join(filter(None, [name, *paragraphs]))
        for name, paragraphs in zip(full["section_name"], full["paragraphs"], strict=True)
    ]
    return "\n\n".join([row["title"], row["abstract"], *sections])


def _item(name: str, context: str, question: str, answers: Sequence[str]) -> Item:
    if not (isinstance(context, str) and isinstance(question, str) and answers and all(map(str.strip, answers))):
        raise TypeError("question, context or an answer is empty")
    prompt = f"{context}\n\nQuestion: {question}\nAnswer:"
    return Item(f"qasper/{name}", prompt, f" {answers[0]}", {"answers": json.dumps(list(answers))})
