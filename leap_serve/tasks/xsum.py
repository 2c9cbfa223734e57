"""XSum (Narayan et al. 2018): one-sentence summaries, ROUGE-L F1 with stemming as the rouge-score package has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from leap_serve.grading.metrics import ROUGE, rouge
from leap_serve.tasks.base import Item, Split
from leap_serve.tasks.rows import Row, Source, text_of

# The hub's own branch of Parquet files: the data set's script is no longer run by anybody.
SOURCE = Source("xsum", "EdinburghNLP/xsum", "default", revision="refs/convert/parquet")


def all_rouge(items: Sequence[Item], completions: Sequence[str]) -> dict[str, list[float]]:
    """Return F1 of ROUGE-1, ROUGE-2 and ROUGE-L in [0, 1] of each completion.

    It is against ``reference["summary"]``, or the largest over ``reference["references"]`` (JSON, a list).
    """
    golds = [json.loads(one.get("references", "null")) or [one["summary"]] for one in (i.reference for i in items)]
    found = [rouge(gold, text) for gold, text in zip(golds, completions, strict=True)]
    return {name: [one[name] for one in found] for name in ROUGE}


class Summaries:
    """What all tasks of one-sentence summaries have in common."""

    metric = "ROUGE-L"
    stop: tuple[str, ...] = ("\n",)
    max_tokens = 64

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[float]:
        """ROUGE-L F1 per summary."""
        return all_rouge(items, completions)["ROUGE-L"]

    def details(self, items: Sequence[Item], completions: Sequence[str]) -> dict[str, list[float]]:
        """ROUGE-1, ROUGE-2 and ROUGE-L."""
        return all_rouge(items, completions)


class Xsum(Summaries):
    """One-sentence summaries of news; 5 % of the official train split are the validation split."""

    name = "xsum"

    def __init__(self, data: Path | None = None) -> None:
        self._data = data

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return the texts of a split."""
        return SOURCE.items(split, _item, self._data, limit, seed)


def _item(row: Row, where: str) -> Item:
    document, summary = text_of(row, "document", where), text_of(row, "summary", where)
    reference = {"summary": summary, "document": document}
    return Item(f"xsum/{row.get('id', where)}", f"Document: {document}\nSummary:", f" {summary}", reference)
