"""Latency of plans: expected distinct experts, the fit, and real measurements by an engine that shrinks its layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from leap_serve.checkpoint import Checkpoint
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.errors import LeapError, PlanError
from leap_serve.workload import Workload
from leap_training import latency
from leap_training.latency import DECODE, READS, LatencyModel, distinct, fit, nnls, sample_plans
from leap_training.pruning_space import PruningSpace
from leap_training.saliency import Routing

SMALL = Workload("decode", input_tokens=4, output_tokens=3, batch=2)


@pytest.fixture(scope="module")
def model(family_checkpoint: Callable[[str], Path]) -> Path:
    return family_checkpoint("qwen3_moe")


@pytest.fixture(scope="module")
def space(model: Path) -> PruningSpace:
    return PruningSpace.of(Routing.of(Checkpoint.open(model)), budget=0.5, allocation="global")


@pytest.mark.parametrize(("count", "top_k", "batch"), [(64, 4, 16), (8, 4, 16), (64, 8, 1), (4, 4, 3), (12, 1, 5)])
def test_distinct_experts_are_what_drawing_them_gives(count: int, top_k: int, batch: int) -> None:
    draw = np.random.default_rng(0)
    seen = [len({int(e) for _ in range(batch) for e in draw.choice(count, top_k, replace=False)}) for _ in range(2000)]
    assert distinct(count, top_k, batch) == pytest.approx(np.mean(seen), rel=0.02)


def test_nnls_is_the_best_of_all_supports() -> None:
    draw = np.random.default_rng(1)
    for _ in range(50):
        a, b = draw.normal(size=(9, 4)), draw.normal(size=9)
        a[:, 3] = a[:, 1]  # collinear, as a constant and an equal top_k are
        best = np.inf
        for support in range(1, 16):
            columns = [i for i in range(4) if support >> i & 1]
            x = np.linalg.lstsq(a[:, columns], b, rcond=None)[0]
            if (x >= -1e-12).all():
                best = min(best, float(np.square(a[:, columns] @ x - b).sum()))
        found = nnls(a, b)
        assert (found >= 0).all()
        assert np.square(a @ found - b).sum() == pytest.approx(min(best, np.square(b).sum()), rel=1e-8)


def test_sampled_plans_are_legal_uneven_and_repeatable(space: PruningSpace) -> None:
    plans = sample_plans(space, 24, seed=3)
    assert [p.fingerprint for p in plans] == [p.fingerprint for p in sample_plans(space, 24, seed=3)]
    assert {sum(plan.counts) for plan in plans} == {8, 16, 32}
    assert any(len(set(plan.counts)) > 1 for plan in plans)
    assert {layer.top_k for plan in plans for layer in plan.layers.values()} == {1, 2}


def test_the_form_that_explains_the_calibration_is_chosen(space: PruningSpace) -> None:
    plans, noise = sample_plans(space, 40, seed=0), np.random.default_rng(0).normal(1.0, 0.002, 40)
    weights = np.array([0.01, 0.04, 0.002, 0.02])

    def ratios(cost: Callable[[latency.Plan], float]) -> latency.Array:
        return np.array([cost(plan) for plan in plans]) * noise

    even = ratios(lambda p: 0.2 + 0.02 * sum(latency._distinct_each(p, 16)))
    uneven = ratios(lambda p: 0.2 + float(weights @ latency._distinct_each(p, 16)))
    for found, form in ((even, "distinct"), (uneven, "distinct-per-layer")):
        fitted = fit(plans, found, DECODE, 10.0, held_out=10)
        assert (fitted.form, fitted.calibrated, fitted.held_out) == (form, 30, 10)
        assert fitted.mape[form] < 0.01
        assert all(value >= 0 for value in fitted.coefficients)
        judged = [abs(fitted(p) / r - 1) for p, r in zip(plans[30:], found[30:], strict=True)]
        assert np.mean(judged) == pytest.approx(fitted.mape[form])
    assert fitted.mape["distinct"] > 0.05 and fitted.mape["counts"] > 0.05


def test_held_out_plans_take_no_part_in_the_fit(space: PruningSpace) -> None:
    plans = sample_plans(space, 12)
    ratios = np.linspace(0.5, 1.0, 12)
    other = ratios.copy()
    other[-3:] = 7.0
    one, two = (fit(plans, found, DECODE, 1.0, held_out=3) for found in (ratios, other))
    assert (one.form, one.coefficients) == (two.form, two.coefficients)
    assert one.mape != two.mape


def test_where_counts_are_best_reads_are_priced_by_the_better_form_that_knows_them(
    space: PruningSpace, tmp_path: Path
) -> None:
    plans = sample_plans(space, 16)
    ratios = np.array([0.2 + 0.02 * sum(plan.counts) for plan in plans])
    model = fit(plans, ratios, DECODE, 10.0, held_out=4, seed=7)
    assert model.form == "counts"
    model.save(tmp_path / "latency.json")
    found = LatencyModel.load(tmp_path / "latency.json").of_reads(plans[-1])
    wanted = fit(plans, ratios, DECODE, 10.0, 4, READS)
    assert found.form in READS and (found.form, found.coefficients) == (wanted.form, wanted.coefficients)
    assert found.mape[found.form] == model.mape[found.form] > model.mape["counts"]
    assert found.made_by == LatencyModel.load(tmp_path / "latency.json").made_by
    assert found.of_reads(plans[0]) is found
    for bad in ({}, {"plans": [{"counts": [1], "top_k": [1], "ratio": 1.0}]}, {"plans": [{**model.made_by["plans"][0], "ratio": "x"}]}):  # fmt: skip
        with pytest.raises(LeapError, match="does not hold the counts, top_k and ratio of each plan"):
            replace(model, made_by=bad).of_reads(plans[0])


def test_calibrated_on_a_real_engine_saved_and_read_again(model: Path, space: PruningSpace, tmp_path: Path) -> None:
    engine = TorchEngine(model, dtype="float32", device="cpu")
    whole, seen, plans = engine.memory().weights_bytes, list[tuple[int, int]](), sample_plans(space, 6)
    found = latency.calibrate(engine, plans, SMALL, rounds=1, progress=lambda *at: seen.append(at), seed=3)
    assert seen == [(number, 13) for number in range(1, 14)]
    assert engine.memory().weights_bytes == whole
    assert found.full_tpot_ms > 0 and found.made_by["seed"] == 3 and len(found.made_by["plans"]) == 6
    found.save(tmp_path / "latency.json")
    again = LatencyModel.load(tmp_path / "latency.json")
    assert [again(plan) for plan in plans] == [found(plan) for plan in plans]
    assert again == found
    measured = latency.measured_ratio(engine, plans[0], SMALL, rounds=6)
    assert measured.pairs == 6 and 0 < measured.low <= measured.median <= measured.high
    assert engine.memory().weights_bytes == whole
    with pytest.raises(PlanError, match="another model"):
        found(replace(plans[0], base=replace(plans[0].base, sha256="0" * 64)))
    foreign = replace(plans[1], base=replace(plans[1].base, sha256="0" * 64))
    with pytest.raises(PlanError, match="was made for"):
        latency.compare(engine, [plans[0], foreign], SMALL, rounds=1)
    assert engine.memory().weights_bytes == whole, "whole again, also after an error"
    with pytest.raises(LeapError, match="no TPOT"):
        latency.calibrate(engine, plans, replace(SMALL, output_tokens=1))
    engine.close()


def test_what_cannot_be_calibrated_or_read(space: PruningSpace, tmp_path: Path) -> None:
    plans = sample_plans(space, 5)
    with pytest.raises(LeapError, match="5 plans, 2 of them held out"):
        fit(plans, np.ones(5), DECODE, 1.0, held_out=2)
    path = tmp_path / "latency.json"
    fit(plans, np.ones(5), DECODE, 1.0, held_out=1).save(path)
    good = json.loads(path.read_text())
    for wrong in ([], {}, {**good, "format_version": 9}, {**good, "form": "cubic"}, {**good, "more": 1},
                  {**good, "coefficients": ["x"]}, {**good, "workload": 3}):  # fmt: skip
        path.write_text(json.dumps(wrong))
        with pytest.raises(LeapError, match="latency model"):
            LatencyModel.load(path)
