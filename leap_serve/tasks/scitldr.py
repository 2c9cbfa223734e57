"""SciTLDR (Cachola et al. 2020), abstracts only: one-sentence summaries of papers, ROUGE with stemming.

Validation and test have several references each. Every metric is the largest over them; the authors' script takes
all three from the reference with the highest ROUGE-1.
"""

from __future__ import annotations

import json
from pathlib import Path

from leap_serve.errors import LeapError
from leap_serve.tasks.base import SPLITS, Item, Split
from leap_serve.tasks.rows import Row, Source
from leap_serve.tasks.xsum import Summaries

# The hub's own branch of Parquet files: the data set's script is no longer run by anybody.
SOURCE = Source(
    "scitldr", "allenai/scitldr", "Abstract", revision="refs/convert/parquet", splits=SPLITS, alias="scitldr_a"
)


class Scitldr(Summaries):
    """One-sentence summaries of abstracts, in their official splits."""

    name = "scitldr"

    def __init__(self, data: Path | None = None) -> None:
        self._data = data

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return the abstracts of a split."""
        return SOURCE.items(split, _item, self._data, limit, seed)


def _item(row: Row, where: str) -> Item:
    """Make an item of the hub's row (source, target: lists of sentences) or of {document, summary, references}."""
    document = row.get("document") or " ".join(row.get("source") or ())
    references = row.get("references") or row.get("target") or [row.get("summary")]
    if not isinstance(document, str) or not document or not all(isinstance(r, str) and r for r in references):
        raise LeapError(where, 'has no "document" with "references" (or "source" with "target")', "give SciTLDR's rows")
    title = row.get("paper_id") or row.get("id") or where
    reference = {"references": json.dumps(references), "document": document}
    return Item(f"scitldr/{title}", f"Abstract: {document}\nTL;DR:", f" {references[0]}", reference)
