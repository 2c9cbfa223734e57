"""Uneven cuts in transformers: the same answers as the full model sliced in memory, for every layout of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leap_serve.checkpoint import Checkpoint
from leap_serve.cut.write import cut
from leap_serve.engines.torch_cut import load_model
from leap_serve.engines.torch_subsets import moe_blocks
from leap_serve.errors import UnsupportedError
from parity import CONTROL, TOLERANCE, largest_difference, prompts, uneven_plan
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


def test_what_transformers_cannot_hold_is_refused(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    full = family_checkpoint("qwen3_moe")
    plan = uneven_plan(full)
    first = min(plan.layers)
    cut(full, plan, tmp_path / "cut")
    skipping = replace(plan, layers={**plan.layers, first: replace(plan.layers[first], skip=0.5)})
    with pytest.raises(UnsupportedError, match="skip experts"):
        load_model(replace(Checkpoint.open(tmp_path / "cut"), plan=skipping), torch.float32)
