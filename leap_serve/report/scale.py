"""Axes: from numbers to places on the page, the ticks between, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps [low, high] to [start, end] in SVG units, linearly or by the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; outside of the domain it is that of the nearer end."""
        low, high, value = (math.log(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return self.start + (self.end - self.start) * min(1.0, max(0.0, share))

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, *, zero: bool = True) -> Scale:
        """A linear scale that holds all values, from 0 on unless ``zero`` is False, and ends on a tick."""
        low, high = (0.0 if zero else min(values)), max(values)
        if high <= low:
            low, high = low - (0 if zero else 0.5), low + 1.0
        step = _step(low, high, 4)
        return cls(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end)

    def ticks(self, count: int = 4) -> list[float]:
        """Round numbers within the domain: multiples of 1, 2 or 5 × 10ⁿ; powers of ten and their halves for logs."""
        if self.log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            decades = [10.0**n for n in exponents if self.low <= 10.0**n <= self.high]
            return [*decades, *([self.high] if self.high > 2 * decades[-1] else [])]
        step = _step(self.low, self.high, count)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _step(low: float, high: float, count: int) -> float:
    """The roundest step that makes about ``count`` parts."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= raw * 0.999)


def figure(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, thousands apart, and no trailing zeros behind a dot."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(places, 9)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * value:.{digits}f} %"


def spread_apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart until each has ``gap``, as little as possible and within [low, high]; keeps their order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [places[i] for i in order]
    for _ in range(200):
        shifts = 0.0
        for i in range(1, len(moved)):
            overlap = gap - (moved[i] - moved[i - 1])
            if overlap > 1e-6:
                moved[i - 1] -= overlap / 2
                moved[i] += overlap / 2
                shifts += overlap
        over, under = max(0.0, moved[-1] - high), max(0.0, low - moved[0])
        moved = [place - over + under for place in moved] if not (over and under) else moved
        if shifts < 1e-3:
            break
    out = [0.0] * len(places)
    for place, i in zip(moved, order, strict=True):
        out[i] = place
    return out
