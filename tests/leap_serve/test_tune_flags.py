"""What leap tune makes of its flags: the price of an expert read, and items that are too long."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cutting import plan_for
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import tune
from leap_serve.cut.write import cut
from leap_serve.errors import UsageError
from leap_serve.tasks.base import Item
from leap_serve.workload import Workload
from leap_training.latency import LatencyModel
from leap_training.tune import TuneData
from tiny_tokenizer import talking_copy


@pytest.fixture(scope="module")
def small_cut(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    whole = talking_copy(family_checkpoint("qwen3_moe"), folder / "whole")
    cut(whole, plan_for(whole, lambda layer: (0, 2, 3, 5, 7)), folder / "cut")
    return folder / "cut"


def parsed(folder: Path, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args([str(folder), "--task", "toy-gsm", *flags])


def test_an_expert_read_costs_what_the_engine_measured(
    small_cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Checkpoint.open(small_cut).plan
    assert plan is not None
    path, load = tmp_path / "latency.json", Workload("w", 4, 4, 24)
    model = LatencyModel(
        plan.base.sha256, load, 9.0, "distinct-per-layer", (0.3, 0.01, 0.02, 0.03, 0.04, 0.1),
        {"distinct-per-layer": 0.034}, 12, 4,
    )  # fmt: skip
    model.save(path)
    config = tune._config(parsed(small_cut, "--latency-coef", "0.5", "--latency", str(path)), small_cut)
    assert config.router.latency_coef == 0.5
    assert config.router.latency_per_read == (0.01, 0.02, 0.03, 0.04) and config.router.latency_batch == 24
    assert "off by 3.4 % on 4 plans" in capsys.readouterr().out
    replace(model, form="counts").save(path)
    with pytest.raises(UsageError, match="not how many are read"):
        tune._config(parsed(small_cut, "--latency-coef", "0.5", "--latency", str(path)), small_cut)
    replace(model, base_sha256="0" * 64).save(path)
    with pytest.raises(UsageError, match="measured on another model"):
        tune._config(parsed(small_cut, "--latency-coef", "0.5", "--latency", str(path)), small_cut)
    with pytest.raises(UsageError, match="needs --latency, a calibration"):
        tune._config(parsed(small_cut, "--latency-coef", "0.5"), small_cut)


def test_items_that_are_too_long_are_left_out_and_counted(small_cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A letter is a token here: 2 + 3 and the end of text are 6."""
    items = [Item(str(n), "ab", "c" * n) for n in (3, 4, 5)]
    data = TuneData(items, [], items[:2], items[:1])
    kept = tune._shorter(data, small_cut, 7)
    assert (kept.pool, kept.stopping, kept.router) == (items[:2], items[:2], items[:1])
    assert "1 of 3 pool items have more than 7 tokens: left out" in capsys.readouterr().out
    with pytest.raises(UsageError, match="the shortest of the 3 pool items has 6 tokens"):
        tune._shorter(data, small_cut, 5)
