"""bench/bench_tune.py, as small as it goes: a plan of the published rows is cut, tuned and scored, and rows are not made twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
BENCH = Path(__file__).parents[2] / "bench" / "bench_tune.py"


def test_the_full_model_the_cut_and_the_tuned_cut_are_scored_once(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        str(BENCH),
        "--smoke",
        "--what",
        "scores",
        "--experts",
        "8",
        "--task",
        "toy-gsm",
        "--seeds",
        "0",
    ]
    command += ["--results", str(results)]

    def bench() -> str:
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "200"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    bench()
    before = results.read_bytes()
    rows = {row["method"]: row for row in map(json.loads, before.splitlines())}
    assert list(rows) == ["full-model", "untuned", "leap"]
    # Even ten steps on forty items repair some of it.
    assert rows["full-model"]["loss"] < rows["leap"]["loss"] < rows["untuned"]["loss"]
    assert rows["leap"]["labels"] == 40 and [row["labels"] for row in rows["leap"]["curve"]] == [8, 16, 24, 32, 40]
    assert rows["leap"]["plan"] == rows["untuned"]["plan"]
    shown = bench()
    assert results.read_bytes() == before and "untuned" in shown
