"""The benches of methods, of LExI's figures and of memory, as small as they go; rows that are there are not made twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
BENCH = Path(__file__).parents[2] / "bench"


def rows_of(script: str, folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Run a bench twice; the rows of the first time, which the second leaves alone."""
    results = folder / "rows.jsonl"
    command = [sys.executable, str(BENCH / script), "--smoke", "--work", str(folder), "--results", str(results), *flags]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    written = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr[-2000:]
        written.append(results.read_bytes())
    assert written[0] == written[1]
    return [json.loads(line) for line in written[0].splitlines()]


def test_methods_are_scored_before_and_after_the_same_tuning(tmp_path: Path) -> None:
    flags = ("--task", "toy-gsm", "--seeds", "0", "--tuning", "--methods", "full-model", "random", "hc-smoe", "lexi")
    rows = {(row["method"], row["tuning"]): row for row in rows_of("bench_methods.py", tmp_path, *flags)}
    short = "2 steps, 8 items"
    assert list(rows) == [
        ("full-model", "none"), ("random", "none"), ("hc-smoe", "none"), ("lexi", "none"),
        ("random", short), ("hc-smoe", short), ("lexi", short),
    ]  # fmt: skip
    assert rows["full-model", "none"]["loss"] < rows["random", short]["loss"] < rows["random", "none"]["loss"]
    # Merged experts behind a router map, and an uneven top_k, are tuned as they are; lexi keeps all weights and saves FLOPs.
    for method in ("hc-smoe", "lexi"):
        assert 0 <= rows[method, short]["score"] <= 1 and rows[method, short]["plan"] == rows[method, "none"]["plan"]
        assert rows[method, short]["loss"] < rows[method, "none"]["loss"]
    assert rows["lexi", "none"]["weights_share"] == 1.0 > rows["lexi", "none"]["flops_share"]
    assert rows["random", "none"]["retained"] == [8] * 4 and rows["random", "none"]["weights_share"] < 0.3


def test_lexis_figures_have_a_row_for_every_way_to_take_away(tmp_path: Path) -> None:
    rows = rows_of("bench_lexi.py", tmp_path)
    speeds = {(row["method"], row["setting"]): row for row in rows if row["bench"] == "lexi-speed"}
    assert list(speeds) == [
        ("inter", "50 %"), ("intra", "50 %"), ("lexi", "50 %"), ("inter + lexi", "50 % + 50 %"), ("skip", "β = 1"), ("merge", "50 %"), ("map", "87.5 %"),
        ("uneven", "87.5 %"), ("llama4 inter", "50 %"),
    ]  # fmt: skip
    assert speeds["uneven", "87.5 %"]["contenders"][0]["retained"] == [12, 4]
    assert speeds["merge", "50 %"]["contenders"][0]["retained"] == [32, 32]
    assert [row["contenders"][1]["top_k"] for row in (speeds["inter", "50 %"], speeds["llama4 inter", "50 %"])] == [
        [4, 4],
        [1, 1],
    ]
    assert speeds["inter", "50 %"]["contenders"][0]["retained"] == [32, 32]
    assert sum(speeds["lexi", "50 %"]["contenders"][0]["top_k"]) == 4
    crossed = speeds["inter + lexi", "50 % + 50 %"]["contenders"][0]
    assert crossed["retained"] == [32, 32] and sum(crossed["top_k"]) == 4
    assert speeds["skip", "β = 1"]["active_experts"] == 1.0 > speeds["skip", "β = 1"]["flops_share"]
    assert speeds["lexi", "50 %"]["weights_share"] == 1.0 > speeds["intra", "50 %"]["weights_share"]
    for row in speeds.values():
        assert row["ratio_a_over_b"]["total_tok_s"]["median"] > 0
    drawn = [row for row in rows if row["bench"] == "lexi-sensitivity"]
    assert [(row["layer"], row["top_k"]) for row in drawn] == [(layer, k) for layer in range(4) for k in (1, 2, 3, 4)]
    for layer in range(4):
        of = [row["deviation"] for row in drawn if row["layer"] == layer]
        assert of == sorted(of, reverse=True) and of[-1] == 0.0 and drawn[4 * layer]["std_error"] > 0
    scored = {(row["method"], row["setting"]): row for row in rows if row["bench"] == "lexi"}
    assert list(scored) == [
        ("base", "0 %"),
        ("inter", "12.5 %"),
        ("inter + lexi", "50 % + 50 %"),
        ("skip", "β_l of NAEE"),
    ]
    assert scored["inter + lexi", "50 % + 50 %"]["retained"] == [32] * 4
    skips = scored["skip", "β_l of NAEE"]
    assert 1.0 < skips["active_experts"] < 4.0 and skips["flops_share"] < 1.0 == skips["weights_share"]


def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    rows = {row["method"]: row for row in rows_of("bench_memory.py", tmp_path, "--methods", "load", "naee", "intra")}
    assert list(rows) == ["load", "naee", "intra"]
    for row in rows.values():
        assert row["peak_bytes"] > row["model_bytes"] > 0
        assert row["peak_bytes"] > row["anonymous_bytes"] > 2**20
        assert row["inputs_bytes"] == 4 * row["tokens"] * 64 * 2 and row["tokens"] > 50
