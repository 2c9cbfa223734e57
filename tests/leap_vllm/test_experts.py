"""Which kernel a layer of vLLM gets, and that the engine computes the same with ours and over expert-parallel ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_kernels import tuning
from leap_kernels.config import KernelConfig, Tile, default_config
from leap_kernels.tuning import Entry, Shape, Table
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli.tune_kernels import shapes_of
from leap_serve.plan import LayerPlan, Plan
from leap_vllm import compat_experts, experts
from leap_vllm.compat_experts import Chosen, MoeLayer
from parity import CONTROL, TOLERANCE, measure
from serving import ENVIRONMENT

LAYER = MoeLayer(16, 2048, 768, 8, "bfloat16", "TRITON", plain=True, ranks=1, batch_invariant=False)


class Stock:
    """Stands for vLLM's class: choose() only passes it on."""


@pytest.mark.parametrize("wanted", ["auto", "vllm", "nonsense"])
def test_vllms_kernel_stays_where_nobody_measured(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(experts.VARIABLE, wanted)
    for layer in (LAYER, replace(LAYER, backend="CPU"), replace(LAYER, backend="FLASHINFER_CUTLASS")):
        chosen = experts.choose(layer, Stock)
        assert (chosen.experts, chosen.kernel, chosen.launches) == (Stock, "vllm", None) and chosen.why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"plain": False}, "it is not plain SiLU·mul"), ({"batch_invariant": True}, "results must be batch-invariant"),
        ({"backend": "FLASHINFER_TRTLLM"}, "vLLM chose FLASHINFER_TRTLLM; pass --moe-backend triton"),
        ({"backend": "CPU"}, "ours needs a CUDA GPU"),
    ],
)  # fmt: skip
def test_ours_says_why_it_does_not_run(
    change: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(experts.VARIABLE, "ours")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    experts._warn.cache_clear()
    with caplog.at_level("WARNING", logger="vllm.leap"):
        assert experts.choose(replace(LAYER, **change), Stock) == Chosen(Stock, "vllm", None, why)
    assert f"MoE layers of 16 experts, H 2048, I 768, top-8, bfloat16 keep vLLM's kernel: {why}" in caplog.text


@pytest.mark.parametrize("wanted", ["auto", "ours", "vllm"])
def test_ranks_on_a_cpu_get_the_kernel_that_honours_the_expert_map(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(experts.VARIABLE, wanted)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chosen = experts.choose(replace(LAYER, backend="CPU", ranks=2), Stock)
    assert chosen.experts.__name__ == "MappedCpuExperts" and issubclass(chosen.experts, Stock)
    assert chosen.kernel == "vllm"


def measured(folder: Path, ours_us: float) -> Path:
    """A table for LAYER in a checkpoint's folder: vLLM takes 10 µs at each of two numbers of tokens."""
    entries = {m: Entry(default_config(m, 16, 8, 2), ours_us * m, 10.0, {"BLOCK_SIZE_M": 16}) for m in (1, 64)}
    return Table(Shape(16, 2048, 768, 8, "bfloat16"), tuning.INTERPRETED, entries).save(folder / "kernels")


def test_tables_beside_the_weights_decide_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv(experts.VARIABLE, raising=False)
    for name in (tuning.FOLDER_VARIABLE, "VLLM_TUNED_CONFIG_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    slow = replace(LAYER, model=str(tmp_path / "slow"))
    measured(tmp_path / "slow", 11.0)
    assert experts.choose(slow, Stock) == Chosen(Stock, "vllm", None, "measured as the faster one throughout")
    assert os.environ["VLLM_TUNED_CONFIG_FOLDER"] == str(tmp_path / "slow" / "kernels"), (
        "vLLM's own files are there, too"
    )
    fast = tmp_path / "fast" / "kernels"
    path = measured(tmp_path / "fast", 1.0)
    x, w13 = torch.empty(1, 2048, dtype=torch.bfloat16), torch.empty(16, 1536, 0)
    ids = torch.empty(1, 8)
    assert experts.launch("auto", fast, x, w13, ids) == default_config(1, 16, 8, 2)
    assert experts.launch("auto", fast, x.expand(64, -1), w13, ids) is False, "measured as slower there"
    assert experts.launch("ours", fast, x.expand(64, -1), w13, ids) == default_config(64, 16, 8, 2)
    assert experts.launch("ours", fast, x, w13[:8], ids) is True, "nobody measured 8 experts: the default launch"
    path.write_text("{")
    damaged = replace(LAYER, model=str(tmp_path / "fast"), experts=16, top_k=8)
    experts._table.cache_clear()
    assert experts.choose(damaged, Stock).why.startswith("nobody measured")
    assert experts.choose(replace(LAYER, model="an/id"), Stock).kernel == "vllm"
    assert "VLLM_TUNED_CONFIG_FOLDER" not in os.environ, "an engine's offer does not outlive it"


def test_ranks_that_share_the_experts_have_tables_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what a token chose is elsewhere: what was measured for 16 experts of 16 says nothing about 16 of 32."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv(experts.VARIABLE, raising=False)
    for name in (tuning.FOLDER_VARIABLE, "VLLM_TUNED_CONFIG_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    rank = replace(LAYER, model=str(tmp_path), ranks=2)
    alone = measured(tmp_path, 1.0)
    try:
        assert experts.choose(rank, Stock).why.startswith("nobody measured")
        shape = replace(Table.load(alone).shape, ranks=2)
        shared = replace(Table.load(alone), shape=shape).save(alone.parent)
        experts._table.cache_clear()
        chosen = experts.choose(rank, Stock)
        assert (chosen.kernel, chosen.launches) == ("ours", shared)
        assert experts.choose(replace(rank, ranks=1), Stock).launches == alone
    finally:
        compat_experts.offer_tuned_files(None)


def test_a_folder_that_the_user_named_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", "/named")
    compat_experts.offer_tuned_files(tmp_path)
    assert os.environ["VLLM_TUNED_CONFIG_FOLDER"] == "/named"


def test_a_second_engine_reads_its_own_tuned_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM caches its variables once an engine has started, and the files it has read for as long as it lives."""
    import vllm.envs as envs
    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs

    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    try:
        for warps in (4, 8):
            folder = tmp_path / str(warps)
            folder.mkdir()
            file = folder / compat_experts.vllm_file_name(3, 33, "bfloat16")
            file.write_text(json.dumps({"1": {"num_warps": warps}}))
            compat_experts.offer_tuned_files(folder)
            envs.enable_envs_cache()  # as an engine does at the end of its start
            assert get_moe_configs(3, 33, None) == {1: {"num_warps": warps}}
            assert compat_experts.tuned_file(3, 33, "bfloat16") == file
        compat_experts.offer_tuned_files(None)
        assert get_moe_configs(3, 33, None) is None
    finally:
        compat_experts.offer_tuned_files(None)
        envs.disable_envs_cache()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_vllm_reads_the_file_that_is_written_for_a_dtype(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked as its kernel asks: by the shapes of the weights and what its quantisation calls the dtype of x."""
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG

    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    launch = {"BLOCK_SIZE_M": 16, "num_warps": 2}
    (tmp_path / compat_experts.vllm_file_name(3, 33, dtype)).write_text(json.dumps({"1": launch}))
    try:
        compat_experts.offer_tuned_files(tmp_path)
        asked = FUSED_MOE_UNQUANTIZED_CONFIG.config_name(getattr(torch, dtype))
        assert fused_moe.try_get_optimal_moe_config((3, 66, 8), (3, 8, 33), 2, asked, 5) == launch
        assert compat_experts.tuned_file(3, 33, dtype) is not None
        told_apart = {name for name in ("bfloat16", "float16") if compat_experts.tuned_file(3, 33, name) is None}
        assert told_apart == ({"bfloat16", "float16"} if dtype == "float32" else set())
    finally:
        compat_experts.offer_tuned_files(None)


ENGINE = {**os.environ, **ENVIRONMENT, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}


def python(*command: str) -> str:
    """Run Python with an engine's environment, kernels interpreted; return what it prints."""
    done = subprocess.run([sys.executable, *command], env=ENGINE, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    "family", [pytest.param("qwen3_moe", marks=pytest.mark.e2e), pytest.param("llama4_text", marks=pytest.mark.slow)]
)
def test_engine_with_our_kernel_equals_stock(
    family: str, family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """vLLM runs our kernel, interpreted, launched as a table beside the weights says; Qwen3 renormalises, Llama-4 weighs
    the input."""
    model = str(shutil.copytree(family_checkpoint(family), tmp_path / family))
    (shape,) = shapes_of(Checkpoint.open(Path(model)), "float32", 1)
    entry = Entry(KernelConfig(16, 1, Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)), 1.0)
    table = Table(shape, tuning.INTERPRETED, {1: entry}).save(tmp_path / family / tuning.BESIDE_WEIGHTS)
    found = json.loads(python(str(Path(__file__).parents[1] / "kernel_script.py"), model).splitlines()[-1])
    ours, stock = found["ours"][model], found["vllm"][model]
    assert {(one["kernel"], one["experts_class"], one["launches"]) for one in ours["kernels"]} == {
        ("ours", "LeapExperts", str(table))
    }
    assert {one["kernel"] for one in stock["kernels"]} == {"vllm"}
    assert "LeapExperts" not in {one["experts_class"] for one in stock["kernels"]}
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
