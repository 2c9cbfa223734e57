"""Which kernel a layer of vLLM gets, and that the engine computes the same with ours and over expert-parallel ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leap_serve.checkpoint import Checkpoint
from leap_serve.plan import LayerPlan, Plan
from leap_vllm import experts
from leap_vllm.compat_experts import MoeLayer
from parity import CONTROL, TOLERANCE, measure
from serving import ENVIRONMENT

LAYER = MoeLayer(16, 2048, 768, 8, "bfloat16", "TRITON", plain=True, ranks=1, batch_invariant=False)


class Stock:
    """Stands for vLLM's class: choose() only passes it on."""


@pytest.mark.parametrize("wanted", ["auto", "vllm", "nonsense"])
def test_vllms_kernel_stays_where_nobody_measured(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(experts.VARIABLE, wanted)
    for layer in (LAYER, replace(LAYER, backend="CPU"), replace(LAYER, backend="FLASHINFER_CUTLASS")):
        assert experts.choose(layer, Stock) is Stock


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"plain": False}, "it is not plain SiLU·mul"), ({"batch_invariant": True}, "results must be batch-invariant"),
        ({"backend": "FLASHINFER_TRTLLM"}, "vLLM chose FLASHINFER_TRTLLM; pass --moe-backend triton"),
        ({"backend": "CPU"}, "our MoE kernel needs a CUDA GPU"),
    ],
)  # fmt: skip
def test_ours_says_why_it_does_not_run(
    change: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(experts.VARIABLE, "ours")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    experts._say.cache_clear()
    with caplog.at_level("WARNING", logger="vllm.leap"):
        assert experts.choose(replace(LAYER, **change), Stock) is Stock
    assert why in caplog.text


@pytest.mark.parametrize(
    "family", [pytest.param("qwen3_moe", marks=pytest.mark.e2e), pytest.param("llama4_text", marks=pytest.mark.slow)]
)
def test_engine_with_our_kernel_equals_stock(family: str, family_checkpoint: Callable[[str], Path]) -> None:
    """vLLM itself runs our kernel, interpreted; Qwen3 renormalises, Llama-4 weighs the input."""
    model = str(family_checkpoint(family))
    env = {**os.environ, **ENVIRONMENT, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(Path(__file__).parents[1] / "kernel_script.py"), model]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    ours, stock = found["ours"][model], found["vllm"][model]
    assert ours["classes"] == ["LeapExperts"] and "LeapExperts" not in stock["classes"]
    rows = zip(ours["logprobs"], stock["logprobs"], strict=True)
    apart = max(abs(a - b) for one, other in rows for a, b in zip(one, other, strict=True))
    assert 0 < apart <= TOLERANCE


@pytest.mark.e2e
def test_expert_parallel_ranks_on_a_cpu(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Five experts over two ranks; stock vLLM's CPU kernel ignores expert_map and dies of it."""
    full = family_checkpoint("qwen3_moe")
    checkpoint = Checkpoint.open(full)
    plan = Plan(
        checkpoint.identity(), checkpoint.num_experts,
        {layer: LayerPlan((0, 2, 3, 5, 7), checkpoint.top_k, 1.0) for layer in checkpoint.moe_layers},
    )  # fmt: skip
    row = measure(
        {"five": (full, plan)}, tmp_path, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        tensor_parallel_size=2, distributed_executor_backend="mp", enable_expert_parallel=True,
    )["five"]  # fmt: skip
    assert row["max_diff"] <= TOLERANCE, row
    assert min(row["controls"].values()) > CONTROL, row
