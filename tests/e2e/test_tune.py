"""`leap tune` as one types it: a real kill and the same curve, what lies beside the cut, two processes, refusals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cutting import plan_for
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.cut.export import export
from leap_serve.cut.write import cut
from leap_serve.engine import mean_loss
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.engines.vllm_engine import VllmEngine
from leap_serve.plan import LayerPlan, Merge, Plan
from leap_serve.tasks.registry import load_task
from leap_training.splits import validation_part
from leap_training.tune import Tuner
from leap_training.tune_config import TuneConfig, TuneData
from leap_training.tune_result import report_of, write_tuned

pytestmark = pytest.mark.e2e
SMALL = (
    "--task", "toy-code", "--rounds", "2", "--labels", "8", "--pool", "24", "--held-out", "8", "--steps", "6",
    "--batch", "4", "--rank", "2", "--router-warmup", "1", "--patience", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def even_cut(leap_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tune") / "even"
    cut(leap_tiny, plan_for(leap_tiny, lambda layer: tuple(range(layer, 64, 4))), out)
    return out


def command(folder: Path, *flags: str, launcher: Sequence[str] = ()) -> list[str]:
    start = [*launcher, "-m", "leap_serve.cli"] if launcher else [sys.executable, "-m", "leap_serve.cli"]
    return [*start, "tune", str(folder), *SMALL, *flags]


def curve_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "tune.json").read_text())["curve"]


def engine_scores(folder: Path, items: Sequence[Any]) -> list[Any]:
    engine = TorchEngine(folder, dtype="float32", device="cpu")
    try:
        return engine.score(items)
    finally:
        engine.close()


def two_processes() -> list[str]:
    """A launcher; `accelerate launch --cpu` starts one process whatever it is told, short of mpirun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
        "--master_port", port,
    ]  # fmt: skip


ENVIRONMENT = {
    **os.environ,
    "PYTHONSAFEPATH": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
}


def test_a_killed_run_continues_to_the_same_curve_and_two_processes_agree(even_cut: Path, tmp_path: Path) -> None:
    whole, killed, two = (tmp_path / name for name in ("whole", "killed", "two"))
    flags = ["--save-every", "1", "--no-rl-router", "--no-supervised-router"]

    def start(out: Path, state: str, launcher: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        line = command(even_cut, *flags, "-o", str(out), "--state", str(tmp_path / f"state-{state}"), launcher=launcher)
        return subprocess.Popen(line, env=ENVIRONMENT, start_new_session=True)

    process = start(killed, "two")
    state, deadline = tmp_path / "state-two" / "state.safetensors", time.monotonic() + 300
    while not state.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert state.exists() and not killed.exists()
    assert start(whole, "one").wait(timeout=300) == 0
    assert start(killed, "two").wait(timeout=300) == 0
    assert curve_of(killed) == curve_of(whole) and len(curve_of(whole)) == 2
    assert not state.exists()
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes()[-4096:] for folder in (whole, killed)]
    assert weights[0] == weights[1]
    # Accelerate, two processes on the CPU: the same items, half of them each, and so the same losses.
    assert start(two, "three", two_processes()).wait(timeout=300) == 0
    assert [json.loads((out / "tune.json").read_text())["processes"] for out in (whole, two)] == [1, 2]
    for ours, theirs in zip(curve_of(two), curve_of(whole), strict=True):
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], abs=1e-4)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_roll_out_their_own_rows_and_learn_one_router(even_cut: Path, tmp_path: Path) -> None:
    """The value baseline and the routers move by both processes' samples; a process without rows is refused.

    Five rows in three parts: one process rolls out three parts, the other two, and 2,048 does not divide by 3.
    """
    out = tmp_path / "two"
    uneven = ("--batch", "5", "--accumulate", "3", "--router-warmup", "4")
    line = command(even_cut, *uneven, "-o", str(out), launcher=two_processes())
    assert subprocess.run(line, env=ENVIRONMENT, timeout=600).returncode == 0
    for row in curve_of(out):
        assert row["router"]["updates"] >= 1 and row["router"]["kl_sliced"] > 0
    few = subprocess.run(
        [*line, "--force", "--batch", "1"], env=ENVIRONMENT, timeout=600, capture_output=True, text=True
    )
    assert few.returncode != 0 and "1 items in a step for 2 processes" in few.stderr


def test_what_is_left_beside_the_cut_exports_to_what_was_measured(
    even_cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Router forced by a large supervised rate; the exported checkpoint has the loss that the run reported."""
    out, plain = tmp_path / "tuned", tmp_path / "plain"
    line = command(even_cut, "--learning-rate", "0.01", "-o", str(out), "--json")[3:]
    assert main(line) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((out / "tune.json").read_text())
    assert report["labels"] == found["labels"] == 16 and report["made_by"]["task"] == "toy-code"
    assert report["fingerprint"] == Checkpoint.open(even_cut).plan.fingerprint  # type: ignore[union-attr]
    assert (out / "router_head.safetensors").exists() == found["router"]["kept"]
    assert not Checkpoint.open(even_cut).overlays, "the source of a copy was changed"
    assert main(["tune", str(out), *SMALL]) == 2 and "has tuned parts already" in capsys.readouterr().err
    assert main(["export", str(out), "-o", str(plain)]) == 0
    per_item = [score.loss for score in engine_scores(plain, validation_part(load_task("toy-code"), "router", 8))]
    promised = found["router"]["tuned_loss" if found["router"]["kept"] else "sliced_loss"]
    # The export is bf16, as the cut is.
    assert sum(per_item) / len(per_item) == pytest.approx(promised, abs=0.05)


def test_a_baseline_writes_a_plain_checkpoint(even_cut: Path, leap_tiny: Path, tmp_path: Path) -> None:
    """A cut to leap, its fingerprint in every part, and a model like any other to vLLM's own loader."""
    out = tmp_path / "kd"
    assert main(command(even_cut, "--baseline", "kd-experts", "--teacher", str(leap_tiny), "-o", str(out))[3:]) == 0
    assert Checkpoint.open(out).num_experts == 16 and not Checkpoint.open(out).overlays
    report = json.loads((out / "tune.json").read_text())
    assert report["config"]["distill"] == "experts" and report["labels"] == 16
    items = load_task("toy-code").items("validation", 4)
    scores = engine_scores(out, items)
    assert mean_loss(scores) < mean_loss(engine_scores(even_cut, items))
    assert main(["verify", str(out)]) == 0
    assert Checkpoint.open(out).config["architectures"] == ["Qwen3MoeForCausalLM"]
    engine = VllmEngine(str(out), dtype="float32", kv_cache_gib=0.5)
    try:
        assert mean_loss(engine.score(items)) == pytest.approx(mean_loss(scores), abs=1e-3)
    finally:
        engine.close()


def test_a_cut_that_merges_and_skips_is_tuned_and_served_as_it_was_measured(leap_tiny: Path, tmp_path: Path) -> None:
    """Clusters of eight behind a map of ids, and skipping in the first layer: router, adapter and plan meet in vLLM."""
    source = Checkpoint.open(leap_tiny)
    rows = tuple(tuple((e, 0.125) for e in range(first, first + 8)) for first in range(0, 64, 8))
    merge = Merge(rows, tuple(tuple((e, 1.0) for e, _ in row) for row in rows), "ids")
    layer = LayerPlan(tuple(range(0, 64, 8)), 4, merge=merge)
    layers = dict.fromkeys(source.moe_layers, layer) | {source.moe_layers[0]: replace(layer, skip=0.5)}
    cut(leap_tiny, Plan(source.identity(), 64, layers), tmp_path / "cut")
    items = load_task("toy-code").items("validation", 16)
    draw = load_task("toy-code").items("train", 48)
    data = TuneData(draw, items, items, items)
    config = TuneConfig(
        rounds=1, labels=24, steps=8, batch=8, rank=4, router_warmup=2, learning_rate=1e-2, lr_warmup=2, patience=0
    )
    tuner = Tuner(tmp_path / "cut", data, config)
    tuner.run()
    with tuner.agent.sliced():
        sliced, _ = tuner.item_losses(items)
    losses, _ = tuner.item_losses(items)
    assert abs(losses.mean() - sliced.mean()) > 1e-3, "the tuned routers matter"
    write_tuned(tuner, tmp_path / "cut", report_of(tuner, {"kept": True}))
    assert main(["verify", str(tmp_path / "cut")]) == 0
    export(tmp_path / "cut", tmp_path / "plain")
    again = Tuner(tmp_path / "plain", data, config)
    np.testing.assert_allclose(again.item_losses(items)[0], losses, atol=2e-2)  # the plain one's are rounded to bf16
    again.agent.close()
    engine = VllmEngine(str(tmp_path / "cut"), dtype="float32", kv_cache_gib=0.5)
    try:
        served = engine.score(items)
    finally:
        engine.close()
    for ours, theirs in zip(served, engine_scores(tmp_path / "plain", items), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-3)


def test_refusals_come_before_any_model_is_loaded(
    even_cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, status, words in (
        (["leap-tiny", "--task", "toy-gsm"], 2, "is a full model"),
        ([str(even_cut), "--task", "toy-gsm", "--baseline", "full"], 2, "name a folder for them with --out"),
        ([str(even_cut), "--task", "toy-gsm", "--baseline", "kd", "-o", str(tmp_path / "x")], 2, "--teacher"),
        ([str(even_cut), "--task", "toy-gsm", "--baseline", "vanilla", "-o", str(tmp_path / "x")], 2, "frequency"),
        ([str(even_cut)], 2, "exactly one is needed"),
        ([str(even_cut), "--task", "toy-gsm", "--steps", "7"], 2, "7 steps do not divide into 10 rounds"),
        ([str(even_cut), "--task", "toy-gsm", "--no-lora", "--no-rl-router", "--no-supervised-router"], 2, "nothing is left to tune"),
        ([str(even_cut), "--task", "toy-gsm", "--latency-coef", "0.1"], 2, "needs --latency, a calibration"),
        ([str(even_cut), "--task", "toy-gsm", "--max-length", "5", "--pool", "9"], 2, "of the 9 pool items has"),
    ):  # fmt: skip
        assert main(["tune", *line]) == status, line
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error, error
    assert not list(tmp_path.iterdir()) and not list(even_cut.parent.glob("*.tune"))
