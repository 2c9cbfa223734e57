"""bench_kernel.py end to end on a CPU: tiny shapes, interpreted; it times only contenders that agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "bench_kernel.py"


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
