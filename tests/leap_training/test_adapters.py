"""LoRA on experts through PEFT: an adapter for each retained expert, reloaded by PEFT alone in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from leap_serve.adapter import write_overlays
from leap_serve.checkpoint import Checkpoint
from leap_serve.cut.write import cut
from leap_serve.errors import LeapError, UnsupportedError
from leap_serve.plan import LayerPlan, Plan
from leap_training import adapters
from parity import uneven_plan
from tuning import ALPHA, RANK, cut_in_memory, with_random_adapter

Get = Callable[[str], Path]


def test_every_expert_has_an_adapter_of_its_own(family_checkpoint: Get, tmp_path: Path) -> None:
    full = family_checkpoint("qwen3_moe")
    plan = uneven_plan(full)
    tuned = with_random_adapter(cut_in_memory(full, plan))
    adapters.save(tuned, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for layer, planned in plan.layers.items():
        count = len(planned.retained)
        wrapper = tuned.base_model.model.model.layers[layer].mlp.experts  # down_proj outside, gate_up_proj inside
        for inner, module in (("", wrapper), ("base_layer.", wrapper.base_layer)):
            name = f"base_model.model.model.layers.{layer}.mlp.experts.{inner}lora_{{}}.weight"
            a, b = saved[name.format("A")], saved[name.format("B")]
            assert a.shape[0] == b.shape[1] == RANK * count
            delta = module.get_delta_weight("default")
            for expert in range(count):
                own_a, own_b = a[expert * RANK : (expert + 1) * RANK], b[:, expert::count]
                assert torch.allclose(delta[expert], ALPHA / RANK * own_b @ own_a, atol=1e-6)
            assert torch.linalg.matrix_rank(delta).tolist() == [RANK] * count
            assert len({tuple(one.flatten().tolist()) for one in delta}) == count


@pytest.mark.e2e
def test_it_reloads_in_a_fresh_process_through_peft_alone(family_checkpoint: Get, tmp_path: Path) -> None:
    full = family_checkpoint("qwen3_moe")
    base = Plan(Checkpoint.open(full).identity(), 8, {layer: LayerPlan((0, 2, 3, 7), 2) for layer in range(4)})
    cut(full, base, tmp_path / "cut")
    tuned = with_random_adapter(cut_in_memory(full, base))
    adapters.save(tuned, tmp_path / "saved")
    write_overlays(tmp_path / "cut", router_head=None, adapter=tmp_path / "saved", made_by={})
    script = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter").eval()
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten().tolist()))
assert "leap_serve" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "cut")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    got = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    with torch.no_grad():
        wanted = tuned(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten()
        tuned.disable_adapter_layers()
        without = tuned(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten()
    assert float((got - wanted).abs().max()) <= 1e-4
    assert float((got - without).abs().max()) > 0.1


def test_wrapping_needs_experts_and_a_rank(family_checkpoint: Get) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model: Any = cut_in_memory(family_checkpoint("olmoe"), uneven_plan(family_checkpoint("olmoe")))
    with pytest.raises(LeapError, match="rank: is 0"):
        adapters.wrap(model, 0, 1.0)
    config = AutoConfig.for_model("qwen3", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                  num_attention_heads=1, num_key_value_heads=1, head_dim=16)  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"Qwen3ForCausalLM: holds no experts\.gate_up_proj"):
        adapters.wrap(AutoModelForCausalLM.from_config(config), 2, 1.0)
    wrapped = adapters.wrap(model, 2, 4.0)
    trained = [name for name, value in wrapped.named_parameters() if value.requires_grad]
    assert trained and all("lora_" in name for name in trained)
