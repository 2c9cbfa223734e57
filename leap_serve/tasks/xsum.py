"""XSum's metric: ROUGE-L F1 with stemming, as the rouge-score package computes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from leap_serve.tasks.base import Item


@cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(items: Sequence[Item], completions: Sequence[str]) -> list[float]:
    """Return ROUGE-L F1 in [0, 1] of each completion against ``reference["summary"]``."""
    scorer = _scorer()
    return [
        float(scorer.score(item.reference["summary"], text.strip())["rougeL"].fmeasure)
        for item, text in zip(items, completions, strict=True)
    ]
