"""ΔW against PEFT's own: every family, uneven counts, tensor by tensor; one parameter alone; bf16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from leap_serve.adapter import write_overlays
from leap_serve.architectures import served_families
from leap_serve.checkpoint import Checkpoint, check_cut
from leap_serve.cut.write import cut
from leap_serve.weights.merge import Merge
from parity import uneven_plan
from tuning import cut_in_memory, tune_at_random

FAMILIES = [family.model_type for family in served_families()]
Get = Callable[[str], Path]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def opened(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(folder)
    check_cut(checkpoint)
    return checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_files_are_those_of_pefts_own_merge(family_checkpoint: Get, tmp_path: Path, family: str) -> None:
    full = family_checkpoint(family)
    plan = uneven_plan(full)
    cut(full, plan, tmp_path / "cut")
    before = tensors_of(tmp_path / "cut")
    # PEFT merges in memory, transformers writes it back in the family's own layout: nothing of ours is in there.
    tuned = tune_at_random(full, plan, tmp_path / "cut", tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "theirs")
    theirs, merge = tensors_of(tmp_path / "theirs"), Merge(opened(tmp_path / "cut"))
    assert set(theirs) == set(before)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, theirs[name])}
    assert changed == merge.names and len(changed) < len(before)
    for name, tensor in before.items():
        merged = merge.merged(name, tensor)
        assert merged.dtype == tensor.dtype and float((merged - theirs[name]).abs().max()) <= 1e-6, name


def test_one_parameter_alone_rslora_and_another_precision(family_checkpoint: Get, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    full = family_checkpoint("gpt_oss")
    plan = uneven_plan(full)
    cut(full, plan, tmp_path / "cut")
    model = cut_in_memory(full, plan)
    config = LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=[], init_lora_weights=False,
                        target_parameters=["mlp.experts.down_proj"])  # fmt: skip
    torch.manual_seed(0)
    tuned = get_peft_model(model, config)
    for name, value in tuned.named_parameters():
        value.data = value.bfloat16().float() if "lora_" in name else value
    tuned.save_pretrained(tmp_path / "saved")
    write_overlays(tmp_path / "cut", router_head=None, adapter=tmp_path / "saved", made_by={})
    merge, before = Merge(opened(tmp_path / "cut")), tensors_of(tmp_path / "cut")
    tuned.merge_and_unload().save_pretrained(tmp_path / "theirs")
    theirs = tensors_of(tmp_path / "theirs")
    assert merge.names == {f"model.layers.{layer}.mlp.experts.down_proj" for layer in plan.layers}
    for name in merge.names:
        assert float((merge.merged(name, before[name]) - theirs[name]).abs().max()) <= 1e-6
        # A bf16 tensor gets the fp32 sum, rounded once.
        half = before[name].bfloat16()
        wanted = (half.float() + (theirs[name] - before[name])).bfloat16()
        # One step of bf16 apart where the sums round differently; 1e-6 is for sums that cancel.
        torch.testing.assert_close(merge.merged(name, half).float(), wanted.float(), rtol=2**-7, atol=1e-6)
        assert (merge.merged(name, half) == wanted).float().mean() > 0.999
