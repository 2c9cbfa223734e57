"""leap bench and leap env as users call them, on real engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from families import make_checkpoint
from processes import SERVER_ENV
from tiny_tokenizer import add_tokenizer

pytestmark = pytest.mark.e2e
SMALL = ["--input-tokens", "8", "--output-tokens", "4", "--warmup", "0"]


def leap(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "leap_serve.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=600, check=False, env={**os.environ, **SERVER_ENV, **(env or {})},
    )  # fmt: skip


def rows_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    return rows


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_moe with 4 experts, top-1; its sibling in family_checkpoint has 8 and top-2."""
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("n") / "narrow", num_experts=4, num_experts_per_tok=1)


def test_latency_of_two_interleaved(family_checkpoint: Callable[[str], Path], narrow: Path, tmp_path: Path) -> None:
    results, wide = tmp_path / "rows.jsonl", family_checkpoint("qwen3_moe")
    done = leap(
        "bench", "latency", narrow, "--vs", wide, "--batch", "1", "3", "--rounds", "2", *SMALL,
        "--results", results, "--json",
    )  # fmt: skip
    rows = rows_of(done)
    assert [row["workload"]["batch"] for row in rows] == [1, 3]
    for row in rows:
        a, b = row["contenders"]
        assert (a["label"], b["label"]) == ("narrow", "qwen3_moe")
        assert (a["retained"], a["top_k"]) == ([4] * 4, [1] * 4)
        assert (b["retained"], b["top_k"]) == ([8] * 4, [2] * 4)
        # One expert less per token: three 64×32 matrices in each of four layers, and half of the router's rows.
        assert b["flops_per_token"] - a["flops_per_token"] == 2 * 4 * (3 * 64 * 32 + 4 * 64)
        for side in (a, b):
            assert side["metrics"]["tpot_ms"]["n"] == 2
            assert 0 < side["metrics"]["tpot_ms"]["p10"] <= side["metrics"]["tpot_ms"]["p90"]
            assert side["metrics"]["e2el_ms"]["median"] >= side["metrics"]["ttft_ms"]["median"]
        assert row["ratio_a_over_b"]["tpot_ms"]["pairs"] == 2
        assert row["versions"]["torch"] and row["hardware"]["cores"] and "bench latency" in row["command"]
    assert [json.loads(line) for line in results.read_text().splitlines()] == rows
    assert "A/B" in done.stdout and "TPOT ms" in done.stdout and "MFLOPs/token" in done.stdout


def test_memory_tells_weights_from_cache(narrow: Path, tmp_path: Path) -> None:
    done = leap("bench", "memory", narrow, *SMALL, "--kv-cache-gib", "0.25", "--results", tmp_path / "r", "--json")
    (row,) = rows_of(done)
    held = row["contenders"][0]["metrics"]
    assert 0.2 < held["kv_cache_gib"] <= 0.25
    assert 0 < held["weights_bytes"] < 2 * row["contenders"][0]["weights_bytes_on_disk"]
    assert held["peak_gib"] > held["weights_gib"]


def test_serving_with_vllms_own_client(narrow: Path, tmp_path: Path) -> None:
    model = add_tokenizer(narrow)
    done = leap(
        "bench", "serve", model, "--batch", "6", "--concurrency", "3", "--rounds", "2", *SMALL,
        "--results", tmp_path / "r", "--json", env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )  # fmt: skip
    (row,) = rows_of(done)
    assert (row["workload"]["batch"], row["workload"]["concurrency"], row["workload"]["request_rate"]) == (6, 3, None)
    metrics = row["contenders"][0]["metrics"]
    assert metrics["ttft_ms"]["n"] == 2 and metrics["ttft_ms"]["median"] > 0
    assert metrics["output_tok_s"]["median"] == pytest.approx(4 * metrics["requests_s"]["median"], rel=1e-6)


def test_a_bad_contender_measures_nothing_and_records_nothing(narrow: Path, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    done = leap("bench", "latency", narrow, "--vs", tmp_path / "absent", *SMALL, "--results", results)
    assert done.returncode == 1
    assert "absent: no such folder" in done.stderr and "Traceback" not in done.stderr
    assert not results.exists()
    # Found by the engine, in the contender's own process.
    done = leap("bench", "latency", narrow, "--dtype", "float7", *SMALL, "--results", results)
    assert done.returncode == 1
    assert "float7" in done.stderr and "Traceback" not in done.stderr
    assert not results.exists()


def test_env_finds_the_plugin_switched_off(tmp_path: Path) -> None:
    broken = tmp_path / "torchcodec"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('built for another torch')\n")
    done = leap("env", "--json", env={"VLLM_PLUGINS": "other", "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "VLLM_PLUGINS='other'" in done.stderr and "unset it" in done.stderr
    assert "torchcodec" in done.stderr and "pip uninstall torchcodec" in done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["ok"] is False
    wrong = {check["name"] for check in found["checks"] if check["ok"] is False}
    # A package that cannot be imported may take vLLM's own modules with it, which is why it is looked for.
    assert {"plugin", "torchcodec"} <= wrong <= {"plugin", "torchcodec", "vLLM's inner functions"}
