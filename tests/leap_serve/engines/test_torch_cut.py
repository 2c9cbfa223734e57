"""Uneven cuts in transformers: the same answers as the full model sliced in memory, for every layout of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from extras_reference import clustered_logprobs, extras_logprobs
from families import make_checkpoint
from leap_serve.checkpoint import Checkpoint
from leap_serve.cut.write import cut
from leap_serve.engines.torch_cut import load_model
from leap_serve.engines.torch_subsets import moe_blocks
from leap_serve.errors import UnsupportedError
from leap_serve.plan import LayerPlan, Plan
from parity import CONTROL, TOLERANCE, largest_difference, merging_plan, prompts, uneven_plan
from tuning import cut_in_memory, logprobs_of

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "llama4_text", "glm4_moe")
PROMPTS = prompts(160)[:4]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_uneven_cut_answers_as_the_sliced_model(
    family: str, family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    full = family_checkpoint(family)
    plan = uneven_plan(full)
    cut(full, plan, tmp_path / "cut")
    model = load_model(Checkpoint.open(tmp_path / "cut"), torch.float32).eval()
    blocks = moe_blocks(model, Checkpoint.open(full).family)
    assert [block.experts.down_proj.shape[0] for block in blocks.values()] == plan.counts
    got = logprobs_of(model, PROMPTS)
    assert largest_difference(got, logprobs_of(cut_in_memory(full, plan), PROMPTS)) <= TOLERANCE
    flat = replace(plan, layers={i: replace(layer, temperature=1.0) for i, layer in plan.layers.items()})
    assert largest_difference(got, logprobs_of(cut_in_memory(full, flat), PROMPTS)) > CONTROL


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_whose_router_maps_ids_answers_as_the_reference(
    family: str, family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    full = family_checkpoint(family)
    plan = merging_plan(full, "ids")
    cut(full, plan, tmp_path / "cut")
    got = logprobs_of(load_model(Checkpoint.open(tmp_path / "cut"), torch.float32).eval(), PROMPTS)
    assert largest_difference(got, clustered_logprobs(full, plan, PROMPTS)) <= TOLERANCE


@pytest.mark.parametrize("family", ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe"))
def test_a_cut_that_maps_probabilities_or_skips_answers_as_the_reference(
    family: str, family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    full = family_checkpoint(family)
    uneven = uneven_plan(full)
    strong = {i: replace(one, skip=0.8 if one.top_k > 1 else None) for i, one in uneven.layers.items()}
    plans = {"map": merging_plan(full, "probabilities"), "skip": replace(uneven, layers=strong)}
    for name, plan in plans.items():
        cut(full, plan, tmp_path / name)
        got = logprobs_of(load_model(Checkpoint.open(tmp_path / name), torch.float32).eval(), PROMPTS)
        wanted, _ = extras_logprobs(full, plan, PROMPTS)
        assert largest_difference(got, wanted) <= TOLERANCE
        without = replace(plan, layers={i: replace(one, skip=None) for i, one in plan.layers.items()})
        assert name == "map" or largest_difference(got, extras_logprobs(full, without, PROMPTS)[0]) > CONTROL


def test_skipping_where_scores_stand_in_a_row_of_all_experts(tmp_path: Path) -> None:
    """Llama 4's form with two experts a token: scores [T, E], which are not renormalised."""
    full = make_checkpoint("llama4_text", tmp_path / "full", num_experts_per_tok=2)
    source = Checkpoint.open(full)
    every = LayerPlan(tuple(range(8)), 2, skip=0.8)
    cut(full, Plan(source.identity(), 8, dict.fromkeys(source.moe_layers, every)), tmp_path / "cut")
    seen: list[list[torch.Tensor]] = []
    for folder in (full, tmp_path / "cut"):
        model = load_model(Checkpoint.open(folder), torch.float32).eval()
        block = moe_blocks(model, source.family)[source.moe_layers[0]]
        inputs = torch.randn(40, block.router.weight.shape[1], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            seen.append(list(block.router(inputs)))
    (whole, logits), (left, same) = seen
    assert torch.equal(logits, same)
    strong = whole >= 0.8 * whole.amax(-1, keepdim=True)
    torch.testing.assert_close(left, torch.where(strong, whole, 0.0))
    assert 40 < int((left > 0).sum()) < 80


def test_widths_that_differ_are_refused(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    full = family_checkpoint("qwen3_moe")
    plan = uneven_plan(full)
    cut(full, plan, tmp_path / "cut")
    narrow = {
        i: replace(layer, channels=tuple(tuple(range(2 + i)) for _ in layer.retained))
        for i, layer in plan.layers.items()
    }
    with pytest.raises(UnsupportedError, match="differ in width"):
        load_model(replace(Checkpoint.open(tmp_path / "cut"), plan=replace(plan, layers=narrow)), torch.float32)
