"""Intervals for means and for paired differences: what is said of every full-against-pruned comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from leap_serve.errors import LeapError

RESAMPLES = 10_000
CONFIDENCE = 0.95
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Quantiles of Student's t at 97.5 % for 1, 2, … degrees of freedom."""
_CELLS = 8_000_000  # counts drawn at a time: 64 MB of float64


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over ``n`` items with its interval [low, high] at ``confidence``: what another draw of items may change.

    A bootstrap interval of one item, or of items that are all alike, has no width and says nothing.
    """

    mean: float
    low: float
    high: float
    confidence: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def mean_of_few(values: Sequence[float]) -> Interval:
    """Return the mean of a few runs, such as seeds, with its 95 % t-interval; a single value has no width.

    Beyond 16 values the interval is a little wider than it need be. Raises LeapError without values.
    """
    if not values:
        raise LeapError("t-interval", "0 values", "give one per run")
    mean, n = statistics.fmean(values), len(values)
    half = T975[min(n - 2, len(T975) - 1)] * statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
    return Interval(mean, mean - half, mean + half, CONFIDENCE, n)


def proportion(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of values that are 0 or 1 with Wilson's interval. Raises LeapError without values."""
    if not values:
        raise LeapError("proportion", "0 values", "give one per item")
    return wilson(sum(values) / len(values), len(values), confidence)


def wilson(mean: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Return a proportion of n ≥ 1 items with Wilson's interval (1927), which has a width at 0 % and 100 %, too."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return Interval(mean, max(0.0, middle - half), min(1.0, middle + half), confidence, n)


def bootstrap(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return Σv/n, or Σv/Σw with ``weights``, and its percentile bootstrap interval (Efron 1979) over items.

    Args:
        values: [n], one per item; with weights the item's sum, such as its log-likelihood.
        weights: [n], such as the item's tokens; numerator and denominator are resampled together.
        confidence: of the two-sided interval, in (0, 1).
        resamples: draws of n items with replacement.
        seed: the same data always get the same interval.

    Raises LeapError without items, or with weights that do not fit them.
    """
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(v) or v.shape != w.shape or w.sum() <= 0:
        raise LeapError("bootstrap", f"{len(v)} values with weights {w.shape}, sum {w.sum()}", "give one per item")
    random = np.random.default_rng(seed)
    alike = np.full(len(v), 1 / len(v))
    means = []
    while resamples > 0:
        rows = min(resamples, max(1, _CELLS // len(v)))
        # How often each item is drawn: a draw's sum is then one product.
        counts = random.multinomial(len(v), alike, size=rows).astype(np.float64)
        total = counts @ w
        means.append((counts @ v)[total > 0] / total[total > 0])
        resamples -= rows
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(v.sum() / w.sum()), float(low), float(high), confidence, len(v))


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    weights: Sequence[float] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return mean(a) − mean(b) of the same items in the same order, with the interval over items drawn in pairs.

    Pairing takes out how hard the items are: what remains is what differs between the two models.
    Raises LeapError where the series differ in length.
    """
    if len(a) != len(b):
        raise LeapError("paired bootstrap", f"{len(a)} items against {len(b)}", "compare the same items")
    return bootstrap([x - y for x, y in zip(a, b, strict=True)], weights, confidence, resamples, seed)
