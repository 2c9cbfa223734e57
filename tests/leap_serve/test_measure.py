"""The stopwatch on timings made by hand."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from families import make_checkpoint
from leap_serve.bench.contenders import compare, turns
from leap_serve.cli.bench import default_results
from leap_serve.engine import RequestTiming
from leap_serve.errors import LeapError, UsageError
from leap_serve.measure import LATENCY_METRICS, ratio, sample, summary
from leap_serve.workload import Workload, vocabulary_of


def test_one_request_by_hand() -> None:
    found = sample([RequestTiming((0.5, 0.6, 0.8, 0.9))], [10])
    assert found.ttft_ms == pytest.approx(500)
    assert found.tpot_ms == pytest.approx(400 / 3)
    assert found.itl_ms == pytest.approx(100)  # gaps 100, 200, 100
    assert found.e2el_ms == pytest.approx(900)
    assert found.output_tok_s == pytest.approx(4 / 0.9)
    assert found.total_tok_s == pytest.approx(14 / 0.9)
    assert found.requests_s == pytest.approx(1 / 0.9)


def test_a_batch_takes_medians_over_requests_and_one_span() -> None:
    batch = [RequestTiming((0.1, 0.2)), RequestTiming((0.2, 0.4)), RequestTiming((0.3, 1.3))]
    found = sample(batch, [5, 5, 5])
    assert (found.ttft_ms, found.tpot_ms, found.e2el_ms) == pytest.approx((200, 200, 400))
    assert found.output_tok_s == pytest.approx(6 / 1.3)


def test_requests_that_start_later_widen_the_span() -> None:
    batch = [RequestTiming((0.1, 0.2)), RequestTiming((0.1, 0.2))]
    assert sample(batch, [1, 1], starts_s=[100.0, 100.3]).output_tok_s == pytest.approx(4 / 0.5)


def test_tokens_that_arrive_in_one_piece_still_count() -> None:
    found = sample([RequestTiming((0.1, 0.5))], [1], output_tokens=[5])
    assert found.tpot_ms == pytest.approx(100)
    assert found.itl_ms == pytest.approx(400)
    assert found.output_tok_s == pytest.approx(10)


def test_a_single_token_has_no_tpot() -> None:
    found = sample([RequestTiming((0.25,))], [3])
    assert math.isnan(found.tpot_ms) and math.isnan(found.itl_ms)
    assert found.ttft_ms == found.e2el_ms == pytest.approx(250)


@pytest.mark.parametrize("times", [(), (0.2, 0.1), (-0.1, 0.1), (0.0,)])
def test_a_round_with_holes_is_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(LeapError, match="measure"):
        sample([RequestTiming(times)], [1])


def test_every_prompt_needs_its_timing() -> None:
    with pytest.raises(LeapError, match="1 timings for 2 prompts"):
        sample([RequestTiming((0.1,))], [1, 1])


def test_summary_quantiles() -> None:
    found = summary([float(i) for i in range(11)])
    assert (found.median, found.p10, found.p90, found.n) == (5.0, 1.0, 9.0, 11)


@pytest.mark.parametrize(
    ("pairs", "ranks", "coverage"),
    # Ranks (1-based, from each end) and exact coverages of the sign-test interval, as tabulated for n pairs.
    [(1, 1, 0.0), (5, 1, 0.9375), (6, 1, 0.96875), (9, 2, 0.9609375), (20, 6, 0.9586105), (25, 8, 0.9567147)],
)
def test_ratio_interval_is_the_sign_test_interval(pairs: int, ranks: int, coverage: float) -> None:
    a = [float(i) for i in range(1, pairs + 1)]
    random.Random(0).shuffle(a)
    found = ratio(a, [1.0] * pairs)
    assert (found.low, found.high) == (float(ranks), float(pairs + 1 - ranks))
    assert found.coverage == pytest.approx(coverage, abs=1e-6)
    assert found.median == (pairs + 1) / 2


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator, hits, trials = random.Random(1), 0, 2000
    for _ in range(trials):
        found = ratio([generator.lognormvariate(0, 0.3) for _ in range(20)], [1.0] * 20)
        hits += found.low <= 1.0 <= found.high
    assert 0.94 < hits / trials < 0.975  # 0.9586 ± 3.5 standard errors


def test_ratios_are_paired() -> None:
    # The machine slows down tenfold half way through: the pairs do not notice.
    found = ratio([1.1, 11.0, 1.1, 11.0], [1.0, 10.0, 1.0, 10.0])
    assert (found.low, found.median, found.high) == pytest.approx((1.1, 1.1, 1.1))


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0]), ([1.0], [math.nan])])
def test_unpaired_or_empty_series_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(LeapError):
        ratio(a, b)


def test_turns_alternate_abba_and_visit_each_side_once_per_round() -> None:
    order = list(turns(2, 4))
    assert [index for _, index in order] == [0, 1, 1, 0, 0, 1, 1, 0]
    assert [number for number, _ in order] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert list(turns(1, 2)) == [(0, 0), (1, 0)]


def test_compare_gives_quantiles_and_a_over_b() -> None:
    fast = [sample([RequestTiming((0.1, 0.2))], [4])] * 6
    slow = [sample([RequestTiming((0.2, 0.4))], [4])] * 6
    row = compare("latency", [{"label": "fast"}, {"label": "slow"}], [fast, slow], LATENCY_METRICS)
    assert row["contenders"][0]["label"] == "fast"
    assert row["contenders"][1]["metrics"]["tpot_ms"]["median"] == pytest.approx(200)
    assert row["ratio_a_over_b"]["tpot_ms"]["median"] == pytest.approx(0.5)
    assert "ratio_a_over_b" not in compare("latency", [{"label": "fast"}], [fast], LATENCY_METRICS)


def test_prompts_are_reproducible_and_new_every_round() -> None:
    load = Workload("latency", input_tokens=7, output_tokens=3, batch=4, seed=5)
    vocabulary = list(range(100, 400))
    first = load.prompts(vocabulary, 0)
    assert [len(prompt) for prompt in first] == [7] * 4
    assert {token for prompt in first for token in prompt} <= set(vocabulary)
    assert first == load.prompts(vocabulary, 0)
    assert first != load.prompts(vocabulary, 1)
    assert first != Workload("latency", 7, 3, 4, seed=6).prompts(vocabulary, 0)


@pytest.mark.parametrize("field", ["input_tokens", "output_tokens", "batch"])
def test_an_empty_workload_is_refused(field: str) -> None:
    sizes = {"input_tokens": 1, "output_tokens": 1, "batch": 1, field: 0}
    with pytest.raises(UsageError, match=f"--{field.replace('_', '-')}: is 0"):
        Workload("latency", **sizes)


def test_vocabulary_leaves_special_tokens_out(tmp_path: Path) -> None:
    from tiny_tokenizer import add_tokenizer

    folder = make_checkpoint("qwen3_moe", tmp_path / "model", num_hidden_layers=1)
    assert vocabulary_of(folder) == list(range(3, 160))  # pad, bos and eos by config.json
    add_tokenizer(folder)
    assert vocabulary_of(folder) == list(range(4, 104))  # <unk> and ids without a token too


def test_rows_go_to_the_checkout_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "bench" / "results").mkdir(parents=True)
    (checkout / "leap_serve" / "bench").mkdir(parents=True)
    monkeypatch.chdir(checkout / "bench")
    assert default_results() == checkout / "bench" / "results" / "bench.jsonl"
    monkeypatch.chdir(tmp_path)
    assert default_results() is None
