"""bench_kernel.py end to end on a CPU: tiny shapes, interpreted; it times only contenders that agree."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from leap_serve.engine import RequestTiming
from leap_serve.measure import sample

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
    # Measured again: what another device, or another dtype, or the time before the tuning left.
    for row, change in zip(rows, ({"device": "B"}, {"dtype": "float16"}, {"tuned": True}, {}), strict=True):
        row |= change
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    again = [json.loads(line) for line in out.read_text().splitlines()[4:]]
    assert [(row["experts"], row["tokens"]) for row in again] == [(4, 1), (4, 5), (3, 1)]


@pytest.mark.e2e
def test_vllms_default_is_measured_without_the_files_that_were_tuned(tmp_path: Path) -> None:
    """Left to choose, vLLM reads a tuned file first: «vLLM default» would be «vLLM tuned» under another name.

    The bench runs where a caller has set the variable; asked afterwards in the same process, vLLM knows no tuned launch.
    """
    ask = (
        "import runpy, sys\n"
        "from leap_vllm.compat_experts import vllm_file_name\n"
        "from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs\n"
        "folder, sys.argv = sys.argv[1], sys.argv[2:]\n"
        "open(folder + '/' + vllm_file_name(3, 33, 'bfloat16'), 'w').write('{\"1\": {}}')\n"
        "print('before', get_moe_configs(3, 33, None))\n"
        "get_moe_configs.cache_clear()\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
        "print('after', get_moe_configs(3, 33, None))\n"
    )
    bench = [str(SCRIPT), "--smoke", "--experts", "3", "--tokens", "1", "--out", str(tmp_path / "rows.jsonl")]
    env = {**os.environ, "VLLM_TUNED_CONFIG_FOLDER": str(tmp_path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", ask, str(tmp_path), *bench]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "before {1: {}}" in done.stdout and "after None" in done.stdout


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


def engine_row(experts: str, decode_ms: float) -> dict[str, Any]:
    """What a batch of four gives whose prompts are prefilled one a step of 100 ms; then 16 steps of decoding."""
    steps = [100.0] * 4 + [decode_ms] * 16
    ends = [sum(steps[: number + 1]) / 1e3 for number in range(len(steps))]
    found = sample([RequestTiming(tuple(ends[first:])) for first in range(4)], [2048] * 4)
    metrics = {name: {"median": getattr(found, name)} for name in ("tpot_ms", "itl_ms", "ttft_ms", "output_tok_s")}
    return {"experts": experts, "kernel": "vllm", "input_tokens": 2048, "batch": 4, "weights_gib": 1.0, "kv_gib": 1.0,
            "largest_batch": None, "launches": {"kernels/E=16,N=32.json": 40, "default": 8}, **metrics}  # fmt: skip


def test_the_speed_up_of_decoding_is_free_of_prefill(capsys: pytest.CaptureFixture[str]) -> None:
    """Decoding is four times as fast; the prefill of other requests, the same for both, hides most of that in TPOT."""
    loaded(SCRIPT.with_name("bench_engine_gpu.py")).show([engine_row("128", 8.0), engine_row("16", 2.0)], "128")
    cells = [line.split() for line in capsys.readouterr().out.splitlines() if "vllm" in line.split()]
    assert [row[2] for row in cells] == ["default+kernels"] * 2
    assert [row[5:7] for row in cells] == [["8.00", "1.00"], ["2.00", "4.00"]]
    assert [row[8] for row in cells] == ["1.00", "1.53"]


def test_rows_from_elsewhere_do_not_pass_for_those_that_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another device, another dtype, or launches that were not tuned yet: --resume measures again."""
    bench = loaded(SCRIPT.with_name("bench_engine_gpu.py"))
    for name in ("LEAP_KERNEL_CONFIGS", "VLLM_TUNED_CONFIG_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    here = {**bench.GPU, "device": "A GPU", "batches": (1,), "contexts": ((8, 4),)}
    (key,) = bench.wanted(here, "16", "vllm")
    row = {**bench.about(here, "16", "vllm"), "input_tokens": 8, "batch": 1}
    assert bench.key_of(json.loads(json.dumps(row))) == key
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    assert bench.wanted(here, "16", "vllm") == {key}, "an empty folder tunes nothing"
    (tmp_path / "E=16,N=768,device_name=A_GPU.json").touch()
    others = [bench.wanted(one, "16", "vllm") for one in (here, {**here, "device": "B"}, {**here, "dtype": "float32"})]
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER")
    others += [bench.wanted({**here, **change}, "16", "vllm") for change in ({"device": "B"}, {"dtype": "float32"})]
    assert key not in set().union(*others) and len(set().union(*others)) == 5


@pytest.mark.slow
def test_engine_smoke(tmp_path: Path) -> None:
    """Real vLLM on sparse checkpoints with random weights: fewer experts are fewer bytes, and uneven plans are served."""
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(SCRIPT.with_name("bench_engine_gpu.py")), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["experts"], row["batch"]) for row in rows] == [(e, b) for e in ("8", "4", "uneven") for b in (1, 2)]
    assert all((row["device"], row["dtype"], row["tuned"]) == ("cpu", "float32", False) for row in rows)
    assert all(row["launches"] == {"default": 2} for row in rows)
    weights = {row["experts"]: row["weights_gib"] * 2**30 / 4 for row in rows}
    expert = 3 * 32 * 64 + 64  # its three matrices and its row of the router
    assert round(weights["8"] - weights["4"]) == 2 * 4 * expert
    assert round(weights["uneven"] - weights["4"]) == (2 + 5 - 2 * 4) * expert
    assert all(row[name]["median"] > 0 for row in rows for name in ("tpot_ms", "itl_ms", "ttft_ms"))
