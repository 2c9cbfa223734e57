"""Parameters and FLOPs per token: by hand, and against what torch counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cutting import plan_of
from leap_serve.checkpoint import Checkpoint
from leap_serve.cut.write import cut
from leap_serve.flops import flops_per_token, parameters
from leap_serve.plan import LayerPlan
from synthetic import make, qwen_config, qwen_tensors


def test_parameters_and_flops_by_hand(model: Path, tmp_path: Path) -> None:
    embed, head, norm, router, expert = 32 * 16, 32 * 16, 16, 8 * 16, 3 * 8 * 16
    full = parameters(Checkpoint.open(model))
    assert full.total == embed + head + 2 * (norm + router + 8 * expert)
    assert full.active == embed + head + 2 * (norm + router + 2 * expert)
    # Embedding look-up and norms are no matrix products.
    assert full.matmul == head + 2 * (router + 2 * expert)
    assert flops_per_token(Checkpoint.open(model)) == 2 * full.matmul

    plan = plan_of(model, {0: LayerPlan((0, 2, 5), 1), 1: LayerPlan((1, 3, 4, 7), 2)})
    cut(model, plan, tmp_path / "out")
    foreseen, found = parameters(Checkpoint.open(model), plan), parameters(Checkpoint.open(tmp_path / "out"))
    assert foreseen == found
    assert found.total == embed + head + 2 * norm + 7 * 16 + 7 * expert
    assert found.matmul == head + 7 * 16 + 3 * expert


def test_flops_of_a_tied_embedding_and_of_packed_weights(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {name: spec for name, spec in qwen_tensors().items() if name != "lm_head.weight"}
    tied = make(tmp_path / "tied", tensors, qwen_config())
    assert parameters(Checkpoint.open(tied)).matmul == 32 * 16 + 2 * (8 * 16 + 2 * 3 * 8 * 16)
    for name in [name for name in tensors if ".experts." in name]:
        shape = tensors.pop(name)[1]
        tensors[name.replace("weight", "qweight")] = ("I32", (shape[0], shape[1] // 8))
        tensors[name.replace("weight", "scales")] = ("F16", (1, shape[1]))
    packed = make(tmp_path / "packed", tensors, qwen_config(quantization_config={"quant_method": "gptq", "bits": 4}))
    assert parameters(Checkpoint.open(packed)) == parameters(Checkpoint.open(tied))


def test_a_plan_counts_what_its_cut_holds(tmp_path: Path) -> None:
    tensors: dict[str, Any] = dict(qwen_tensors())
    own = {k.replace("model.layers.0.", "model.layers.2."): v for k, v in tensors.items() if "layers.0." in k}
    mtp = make(tmp_path / "mtp", tensors | own | {"model.layers.2.eh_proj.weight": ("F32", (4, 8))}, qwen_config())
    for layer in (0, 1):
        del tensors[f"model.layers.{layer}.mlp.gate.weight"]
        tensors[f"model.layers.{layer}.mlp.gate.0.weight"] = ("F32", (24, 16))
        tensors[f"model.layers.{layer}.mlp.gate.2.weight"] = ("F32", (8, 24))
    deep = make(tmp_path / "deep", tensors, qwen_config())
    for source in (mtp, deep):
        plan = plan_of(source, {0: LayerPlan((0, 2, 5), 1), 1: LayerPlan((1, 3, 4, 7), 2)})
        cut(source, plan, tmp_path / f"{source.name}-cut")
        held = parameters(Checkpoint.open(tmp_path / f"{source.name}-cut"))
        assert parameters(Checkpoint.open(source), plan) == held != parameters(Checkpoint.open(source))


def test_flops_leave_out_mtp_layers_and_count_the_real_model(family_checkpoint: Callable[[str], Path]) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    folder = family_checkpoint("qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.tensor([[7]]), use_cache=False)
    # One token attends to itself alone: QKᵀ and PV add 2·2·heads·head_dim a layer, which the theory leaves out.
    attention = 4 * 2 * 2 * 2 * 32
    assert counter.get_total_flops() - attention == flops_per_token(Checkpoint.open(folder))
