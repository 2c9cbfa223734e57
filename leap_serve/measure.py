"""The only stopwatch: from the times at which tokens arrived to TTFT, TPOT, ITL, E2EL and throughput.

The engine (or vLLM's benchmark client) reads the clock; what the readings mean is decided here and
nowhere else. Definitions as in vLLM's serving benchmark:

- TTFT: first token − submission.            - TPOT: (last token − first token) / (tokens − 1).
- ITL: the gaps between successive tokens.    - E2EL: last token − submission.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from leap_serve.engine import Engine, Memory, RequestTiming
from leap_serve.errors import LeapError, UsageError

if TYPE_CHECKING:
    from leap_serve.workload import Workload

LATENCY_METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")
RATE_METRICS = ("output_tok_s", "total_tok_s", "requests_s")


@dataclass(frozen=True, slots=True)
class Sample:
    """One round: medians over its requests in ms, and rates per second of the round as a whole."""

    ttft_ms: float
    tpot_ms: float
    itl_ms: float
    e2el_ms: float
    output_tok_s: float
    total_tok_s: float
    requests_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and 10 % / 90 % quantiles (linear interpolation) of ``n`` values."""

    median: float
    p10: float
    p90: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of per-pair ratios A/B with a distribution-free interval for that median.

    ``coverage`` is the interval's exact probability under exchangeable pairs. Below six pairs no
    interval reaches 95 %; then [low, high] is the whole range and ``coverage`` says how little that is.
    """

    median: float
    low: float
    high: float
    coverage: float
    pairs: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a workload costs on an engine in the state it is in: its rounds, and the bytes held after them."""

    samples: tuple[Sample, ...]
    memory: Memory

    def summary(self, metric: str) -> Summary:
        """Summarise a metric, named as Sample names it, over the rounds."""
        return summary([getattr(one, metric) for one in self.samples])


def measure(engine: Engine, workload: Workload, rounds: int, warmup: int) -> Measurement:
    """Run a workload ``warmup`` times, then ``rounds`` times for the record; rounds are numbered through.

    Round n has the same prompts on every engine and in every state, so rounds of the same number form a pair.
    Raises UsageError on a number of rounds that measures nothing.
    """
    check_rounds(rounds, warmup)
    samples = [measure_round(engine, workload, number) for number in range(warmup + rounds)]
    return Measurement(tuple(samples[warmup:]), engine.memory())


def measure_round(engine: Engine, workload: Workload, number: int) -> Sample:
    """Run one round of a workload: all its requests submitted at once."""
    prompts = workload.prompts(engine.vocabulary, number)
    return sample(engine.generate_timed(prompts, workload.output_tokens), [len(prompt) for prompt in prompts])


def check_rounds(rounds: int, warmup: int) -> None:
    """Raise UsageError on a number of rounds that measures nothing."""
    if rounds < 1 or warmup < 0:
        raise UsageError("--rounds", f"{rounds} rounds after {warmup} of warm-up", "give 1 or more, and 0 or more")


def sample(
    timings: Sequence[RequestTiming],
    input_tokens: Sequence[int],
    starts_s: Sequence[float] | None = None,
    output_tokens: Sequence[int] | None = None,
) -> Sample:
    """Reduce one round of requests.

    Args:
        timings: token arrival times in seconds after the request's own submission.
        input_tokens: prompt lengths, aligned with ``timings``.
        starts_s: when each request was submitted, in seconds on any common clock; None: all together.
        output_tokens: tokens per request where several arrive in one piece (streaming); None: one per time.

    TPOT and ITL are NaN when every request has a single output token.
    Raises LeapError if a request produced no token: a round with holes is no measurement.
    """
    starts_s = [0.0] * len(timings) if starts_s is None else starts_s
    counts = [len(timing.token_times_s) for timing in timings] if output_tokens is None else output_tokens
    if not timings or not len(timings) == len(input_tokens) == len(starts_s) == len(counts):
        raise LeapError("measure", f"{len(timings)} timings for {len(input_tokens)} prompts", "time every request")
    for index, timing in enumerate(timings):
        times = timing.token_times_s
        if not times or times[0] < 0 or any(late < early for early, late in itertools.pairwise(times)):
            raise LeapError("measure", f"request {index} has no token or times that run backwards", "measure again")
    first = [timing.token_times_s[0] for timing in timings]
    last = [timing.token_times_s[-1] for timing in timings]
    tpot = [(end - begin) / (count - 1) for begin, end, count in zip(first, last, counts, strict=True) if count > 1]
    span_s = max(start + end for start, end in zip(starts_s, last, strict=True)) - min(starts_s)
    if span_s <= 0:
        raise LeapError("measure", "the round took no time", "use longer rounds")
    return Sample(
        ttft_ms=1e3 * _median(first),
        tpot_ms=1e3 * _median(tpot),
        itl_ms=1e3 * _median([gap for timing in timings for gap in np.diff(timing.token_times_s)]),
        e2el_ms=1e3 * _median(last),
        output_tok_s=sum(counts) / span_s,
        total_tok_s=(sum(counts) + sum(input_tokens)) / span_s,
        requests_s=len(timings) / span_s,
    )


def summary(values: Sequence[float]) -> Summary:
    """Summarise one metric over the rounds."""
    if not values:
        raise LeapError("measure", "no rounds to summarise", "measure at least one round")
    p10, median, p90 = np.quantile(np.asarray(values, dtype=np.float64), [0.1, 0.5, 0.9])
    return Summary(float(median), float(p10), float(p90), len(values))


def ratio(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Ratio:
    """Compare two interleaved series pair by pair: median of a[i]/b[i] and its order-statistic interval.

    The interval is [r_(k), r_(n+1−k)] with the largest k for which 1 − 2·P(Binomial(n, ½) < k) still
    reaches ``confidence`` (the sign-test interval); it assumes nothing about the distribution.
    """
    if not a or len(a) != len(b):
        raise LeapError("measure", f"{len(a)} rounds of A against {len(b)} of B", "pair every round")
    if not all(math.isfinite(y) and y > 0 for y in b):
        raise LeapError("measure", "a round of B measured nothing, so there is no ratio", "use longer rounds")
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    n, rank, outside = len(ratios), 1, 0.5 ** len(ratios)
    while rank < (n + 1) // 2:
        wider = outside + math.comb(n, rank) * 0.5**n
        if 1 - 2 * wider < confidence:
            break
        rank, outside = rank + 1, wider
    return Ratio(float(np.median(ratios)), ratios[rank - 1], ratios[n - rank], max(0.0, 1 - 2 * outside), n)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else math.nan
