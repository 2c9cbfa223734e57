"""The examples as one runs them, with little to do; and that the authors' interface gives what its README promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from leap_serve.checkpoint import Checkpoint, check_cut
from leap_serve.examples import basic_usage, custom_task, model_comparison
from leap_serve.plan import Plan

pytestmark = pytest.mark.e2e
LITTLE: dict[str, dict[str, Any]] = {
    "profile": {"limit": 16, "engine": "torch"},
    "search": {"method": "gate-mass"},
    "tune": {"rounds": 1, "labels": 16, "steps": 4, "batch": 8, "held-out": 8, "rank": 2, "router-warmup": 1},
}


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    results = custom_task.main(tmp_path, episodes=16, settings=LITTLE)
    assert results["items"] == 76 and results["metric"] == "exact match" and 0 <= results["accuracy"] <= 1
    tuned = Checkpoint.open(tmp_path / "tuned")
    check_cut(tuned)
    assert tuned.plan is not None and tuned.plan.counts == [16] * 4 and tuned.overlays
    report = json.loads((tmp_path / "tuned" / "tune.json").read_text())
    assert report["labels"] == 16 and report["pool"] == 231
    assert results["flop_reduction"] == pytest.approx(1.0, abs=0.1), "top_k decides the FLOPs of a token"
    assert results["weights_reduction"] > 3


def test_methods_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = model_comparison.main(tmp_path, methods=("random", "gate-mass"), items=16)
    assert losses["full model"] < losses["gate-mass"] < losses["random"]
    assert capsys.readouterr().out.splitlines()[-3].startswith("full model")
    assert Plan.load(tmp_path / "gate-mass.json").counts == [16] * 4


@pytest.mark.slow
def test_basic_usage(tmp_path: Path) -> None:
    """As it stands in the README, real engine and all."""
    settings = {**basic_usage.SHORT, "bench": {"kind": "memory"}, "eval": {"limit": 20}}
    results = basic_usage.main(tmp_path, settings=settings)
    assert (tmp_path / "bench.jsonl").exists() and (tmp_path / "eval.json").exists()
    assert results["accuracy"] > 0.5 and results["items"] == 100
    assert results["weights_reduction"] > 3
