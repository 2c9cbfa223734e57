"""bench_kernel.py end to end on a CPU: tiny shapes, interpreted; it times only contenders that agree."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench" / "bench_kernel.py"


def loaded(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.e2e
def test_smoke(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["experts"], row["tokens"]) for row in rows] == [(4, 1), (4, 5), (3, 1), (3, 5)]
    for row in rows:
        assert set(row["us"]) == {"ours", "torch"} and min(row["us"].values()) > row["floor_us"] > 0
        assert row["smoke"] and row["hardware"]["cores"] and row["versions"]["triton"]
        assert "neither installed nor carried by this vLLM" in row["absent"]["OpenAI triton_kernels"]
        assert row["distinct_experts"] <= min(row["experts"], 2 * row["tokens"])
    assert "3 experts, top-2" in done.stdout


def runs_once() -> Callable[[], Callable[[int], torch.Tensor]]:
    """Makes a layer that runs and is right, but not a second time: as one that cannot be captured in a CUDA graph."""

    def make() -> Callable[[int], torch.Tensor]:
        left = [torch.ones(2)]
        return lambda _: left.pop()

    return make


def test_a_layer_that_runs_but_cannot_be_timed_is_left_out_with_its_reason() -> None:
    bench, cpu = loaded(SCRIPT), torch.device("cpu")
    sound = lambda: lambda _: torch.ones(2)  # noqa: E731
    made = {"ours": sound, "torch grouped_mm": runs_once(), "OpenAI triton_kernels": sound}
    running, absent = bench.agreeing(made, 2, cpu)
    assert set(running) == {"ours", "OpenAI triton_kernels"} and all(run() > 0 for run in running.values())
    assert absent == {"torch grouped_mm": "IndexError: pop from empty list"}
    with pytest.raises(IndexError):
        bench.agreeing({"ours": sound, "vLLM default": runs_once()}, 2, cpu)


def test_smoke_times_stay_out_of_the_results() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--smoke"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--smoke needs --out" in done.stderr


@pytest.mark.slow
def test_engine_smoke(tmp_path: Path) -> None:
    """Real vLLM on sparse checkpoints with random weights: fewer experts are fewer bytes, and uneven plans are served."""
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(SCRIPT.with_name("bench_engine_gpu.py")), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["experts"], row["batch"]) for row in rows] == [(e, b) for e in ("8", "4", "uneven") for b in (1, 2)]
    weights = {row["experts"]: row["weights_gib"] * 2**30 / 4 for row in rows}
    expert = 3 * 32 * 64 + 64  # its three matrices and its row of the router
    assert round(weights["8"] - weights["4"]) == 2 * 4 * expert
    assert round(weights["uneven"] - weights["4"]) == (2 + 5 - 2 * 4) * expert
    assert all(row["tpot_ms"]["median"] > 0 and row["ttft_ms"]["median"] > 0 for row in rows)
