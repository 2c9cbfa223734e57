"""bench/search_methods.py, as small as it goes: every kind of run once, in one engine, and resumable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
BENCH = Path(__file__).parents[2] / "bench" / "search_methods.py"
METHODS = ("reap", "greedy", "evo-counts", "evo-counts-esp", "rco", "leap")


def test_every_kind_of_run_is_measured_once(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"

    def bench(*flags: str) -> str:
        command = [sys.executable, str(BENCH), "--smoke", "--results", str(results), "--policies", str(tmp_path / "p")]
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "250"}
        done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    everything = [flag for method in METHODS for flag in ("--method", method)] + ["--meta", "--allocation"]
    bench(*everything)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    runs = {(row["method"], row["allocation"], row["warm"], row["seed"]): row for row in rows}
    # REAP once; five methods, two warm starts and three of --allocation that are not among them, for two seeds.
    assert len(rows) == len(runs) == 1 + 2 * (5 + 2 + 3)
    for (method, allocation, _, _), row in runs.items():
        counts = [len(ids) for ids in row["retained"]]
        assert sum(counts) <= 32 and (allocation == "global" or counts == [8] * 4)
        assert row["plans_evaluated"] <= 26 and 0 <= row["score"] <= 1
        losses = [loss for _, _, loss in row["improvements"]]
        assert losses == sorted(losses, reverse=True) and losses[-1] == row["search_loss"]
        last = row["points"][str(max(row["evaluations"], 1))]
        assert last["held_out_loss"] == row["held_out_loss"] != last["search_loss"]
        assert method == "rco" or row["improvements"][-1][0] <= row["plans_evaluated"]
    spent = runs["rco", "uniform", "", 0]
    assert spent["forward_items"] == spent["backward_items"] + 4 and spent["improvements"][-1][0] <= 26
    assert runs["evo-counts-esp", "global", "", 0]["search_loss"] < 1
    # A row that is there is not measured again, and the tables show each method.
    before = results.read_bytes()
    shown = bench(*everything)
    assert results.read_bytes() == before
    for label in (*METHODS, "leap from tasks", "leap from budget", "leap global", "share"):
        assert label in shown
