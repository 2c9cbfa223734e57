"""Bootstrap intervals, against resampling done the plain way and against their promise."""

from __future__ import annotations

import numpy as np
import pytest

from leap_serve.errors import LeapError
from leap_serve.statistics import bootstrap, paired_bootstrap, proportion


def test_agrees_with_plain_resampling() -> None:
    random = np.random.default_rng(3)
    values, weights = random.normal(2, 1, 60), random.integers(1, 9, 60).astype(float)
    found = bootstrap(values.tolist(), weights.tolist())
    draws = np.random.default_rng(5).integers(0, 60, (20_000, 60))
    low, high = np.quantile(values[draws].sum(1) / weights[draws].sum(1), [0.025, 0.975])
    assert found.mean == pytest.approx(values.sum() / weights.sum())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert (found.confidence, found.n) == (0.95, 60)


def test_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        found = bootstrap(random.binomial(1, 0.7, 60).tolist(), confidence=0.9, resamples=200)
        inside += found.low <= 0.7 <= found.high
    assert 0.82 <= inside / 200 <= 0.97


def test_pairing_takes_out_what_items_share() -> None:
    random = np.random.default_rng(1)
    hard = random.normal(0, 10, 200)
    a, b = hard + 1 + random.normal(0, 0.1, 200), hard
    paired = paired_bootstrap(a.tolist(), b.tolist())
    assert 0.9 < paired.low < paired.mean < paired.high < 1.1
    alone = bootstrap(a.tolist())
    assert alone.high - alone.low > 20 * (paired.high - paired.low)


def test_the_same_data_get_the_same_interval() -> None:
    assert bootstrap([0, 1, 1]) == bootstrap([0, 1, 1])
    assert paired_bootstrap([1.0] * 5, [1.0] * 5).high == 0.0


def test_right_or_wrong_has_wilson_s_interval() -> None:
    # Newcombe 1998, table I, method 3.
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)):  # fmt: skip
        found = proportion([1.0] * right + [0.0] * (n - right))
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5) and found.mean == right / n
    with pytest.raises(LeapError, match="0 values"):
        proportion([])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LeapError, match="2 items against 1"):
        paired_bootstrap([1, 2], [1])
    with pytest.raises(LeapError, match="0 values"):
        bootstrap([])
    with pytest.raises(LeapError, match="give one per item"):
        bootstrap([1, 2], [1])
