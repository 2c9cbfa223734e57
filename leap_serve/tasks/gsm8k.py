"""GSM8K's metric: exact match of the number after ``####`` (Cobbe et al. 2021, the official rule)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from leap_serve.tasks.base import Item

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
