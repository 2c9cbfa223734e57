"""GSM8K (Cobbe et al. 2021): word problems, exact match of the number after ``####`` (the official rule).

Beside it stands "flexible match", of the last number anywhere, as lm-eval's flexible-extract has it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from leap_serve.errors import LeapError
from leap_serve.grading.metrics import flexible_number
from leap_serve.tasks.base import Item, Split
from leap_serve.tasks.rows import Row, Source, text_of

SOURCE = Source("gsm8k", "openai/gsm8k", "main")
_FINAL = re.compile(r"#### (\-?[0-9\.\,]+)")


def extract_answer(text: str) -> str | None:
    """Return the number after the first ``####``, commas removed, or None where there is none."""
    found = _FINAL.search(text)
    return found.group(1).strip().replace(",", "") if found else None


def exact_match(items: Sequence[Item], completions: Sequence[str]) -> list[float]:
    """Score 1.0 where the extracted answer equals ``reference["answer"]`` as a string."""
    return [
        float(extract_answer(text) == item.reference["answer"]) for item, text in zip(items, completions, strict=True)
    ]


def both_matches(items: Sequence[Item], completions: Sequence[str]) -> dict[str, list[float]]:
    """Score by the official rule and by the last number in the text."""
    flexible = [
        float(flexible_number(text) == item.reference["answer"]) for item, text in zip(items, completions, strict=True)
    ]
    return {"exact match": exact_match(items, completions), "flexible match": flexible}


class Gsm8k:
    """Grade-school word problems; 5 % of the official train split are the validation split."""

    name = "gsm8k"
    metric = "exact match"
    stop: tuple[str, ...] = ("\n\n", "Question:")
    max_tokens = 320

    def __init__(self, data: Path | None = None) -> None:
        self._data = data

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return the problems of a split."""
        return SOURCE.items(split, _item, self._data, limit, seed)

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[float]:
        """GSM8K's exact match."""
        return exact_match(items, completions)

    def details(self, items: Sequence[Item], completions: Sequence[str]) -> dict[str, list[float]]:
        """Official and flexible extraction."""
        return both_matches(items, completions)


def _item(row: Row, where: str) -> Item:
    question, solution = text_of(row, "question", where), text_of(row, "answer", where)
    answer = extract_answer(solution)
    if answer is None:
        raise LeapError(where, "the answer holds no number after ####", "give GSM8K's own rows")
    reference = {"answer": answer, "question": question}
    return Item(f"gsm8k/{question}", f"Question: {question}\nAnswer:", f" {solution}", reference)
