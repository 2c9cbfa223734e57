"""XSum (Narayan et al. 2018): one-sentence summaries, ROUGE-L F1 with stemming as the rouge-score package has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leap_serve.metrics import ROUGE, rouge
from leap_serve.tasks.base import Item, Split
from leap_serve.tasks.rows import Row, Source, text_of

# The hub's own branch of Parquet files: the data set's script is no longer run by anybody.
SOURCE = Source("xsum", "EdinburghNLP/xsum", "default", revision="refs/convert/parquet")


def rouge_l(items: Sequence[Item], completions: Sequence[str]) -> list[float]:
    """Return ROUGE-L F1 in [0, 1] of each completion against ``reference["summary"]``."""
    return all_rouge(items, completions)["ROUGE-L"]


def all_rouge(items: Sequence[Item], completions: Sequence[str]) -> dict[str, list[float]]:
    """Return F1 of ROUGE-1, ROUGE-2 and ROUGE-L in [0, 1] of each completion against ``reference["summary"]``."""
    found = [rouge([item.reference["summary"]], text) for item, text in zip(items, completions, strict=True)]
    return {name: [one[name] for one in found] for name in ROUGE}


class Xsum:
    """One-sentence summaries of news; 5 % of the official train split are the validation split."""

    name = "xsum"
    metric = "ROUGE-L"
    stop: tuple[str, ...] = ("\n",)
    max_tokens = 64

    def __init__(self, data: Path | None = None) -> None:
        self._data = data

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return the texts of a split."""
        return SOURCE.items(split, _item, self._data, limit, seed)

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[float]:
        """ROUGE-L F1 per summary."""
        return rouge_l(items, completions)

    def details(self, items: Sequence[Item], completions: Sequence[str]) -> dict[str, list[float]]:
        """ROUGE-1, ROUGE-2 and ROUGE-L."""
        return all_rouge(items, completions)


def _item(row: Row, where: str) -> Item:
    document, summary = text_of(row, "document", where), text_of(row, "summary", where)
    reference = {"summary": summary, "document": document}
    return Item(f"xsum/{row.get('id', where)}", f"Document: {document}\nSummary:", f" {summary}", reference)
