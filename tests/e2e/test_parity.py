"""What vLLM serves is the pruned model: every family, full-vocabulary log-probabilities, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from families import make_checkpoint
from leap_serve.architectures import served_families
from leap_serve.checkpoint import resolve_model
from parity import CONTROL, TOLERANCE, measure, reap_plan, uneven_plan

pytestmark = pytest.mark.e2e
FAMILIES = [family.model_type for family in served_families()]


@pytest.fixture(scope="module")
def rows(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All families, cut unevenly, served one after another by one process."""
    models = {name: (family_checkpoint(name), uneven_plan(family_checkpoint(name))) for name in FAMILIES}
    return measure(models, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_cut_equals_masked_router(rows: Any, family: str) -> None:
    row = rows[family]
    assert len(set(row["retained"])) > 2 and len(set(row["temperature"])) > 2
    assert row["max_diff"] <= TOLERANCE, row


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_can_fail(rows: Any, family: str) -> None:
    controls = rows[family]["controls"]
    assert {"unpruned", "no temperature", "one other expert"} <= set(controls)
    assert min(controls.values()) > CONTROL, controls


def test_leap_tiny_cut_by_a_global_reap_plan(tmp_path: Path) -> None:
    plan = reap_plan("leap-tiny", tmp_path)
    assert len(set(plan.counts)) > 1, "a global plan gives the layers different counts"
    row = measure({"cut": (resolve_model("leap-tiny"), plan)}, tmp_path)["cut"]
    assert row["max_diff"] <= TOLERANCE, row
    assert min(row["controls"].values()) > CONTROL, row


def test_llama_4_with_a_dense_layer_before_every_moe_layer(tmp_path: Path) -> None:
    # The form of Maverick, and of llama4-tiny; the family's own checkpoint above has experts in every layer.
    folder = make_checkpoint("llama4_text", tmp_path / "full", interleave_moe_layer_step=2)
    row = measure({"cut": (folder, uneven_plan(folder))}, tmp_path)["cut"]
    assert len(row["retained"]) == 2 and row["max_diff"] <= TOLERANCE, row
    assert min(row["controls"].values()) > CONTROL, row


def test_tensor_parallel_two(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    # qwen3_moe has one tensor per expert and the gate inside the runner, gpt_oss fused tensors with biases
    # (and stock vLLM wants at least as many key/value heads as ranks of it).
    gpt_oss = make_checkpoint("gpt_oss", tmp_path / "full", num_key_value_heads=2)
    folders = {"qwen3_moe": family_checkpoint("qwen3_moe"), "gpt_oss": gpt_oss}
    models = {name: (folder, uneven_plan(folder)) for name, folder in folders.items()}
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    rows = measure(models, tmp_path, env, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert {name: row["max_diff"] <= TOLERANCE for name, row in rows.items()} == dict.fromkeys(rows, True), rows


@pytest.mark.slow
def test_compiled_twice_in_one_cache(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    # Two plans of the same sizes but other τ: what torch.compile traced for one must not serve the other.
    full = family_checkpoint("qwen3_moe")
    models = {
        "first": (full, uneven_plan(full)),
        "second": (full, uneven_plan(full, temperatures=(1.9, 0.6, 1.0, 1.2))),
    }
    rows = measure(models, tmp_path, {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}, enforce_eager=False)
    assert max(row["max_diff"] for row in rows.values()) <= TOLERANCE, rows
    assert (tmp_path / "cache" / "torch_compile_cache").is_dir(), "nothing was compiled"
