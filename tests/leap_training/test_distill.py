"""Distillation terms against plain loops over tokens, experts and vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cutting import plan_for
from leap_serve.architectures import family_of
from leap_serve.cut.write import cut
from leap_serve.errors import UnsupportedError
from leap_training.batches import Batch
from leap_training.distill import Form, Teacher

KEPT = (0, 2, 3, 5, 7)


def a_batch() -> Batch:
    ids = torch.randint(3, 150, (2, 9), generator=torch.Generator().manual_seed(0))
    weights, mask = torch.ones(2, 9), torch.ones(2, 9, dtype=torch.long)
    weights[:, :4] = 0.0
    mask[1, 7:] = 0
    weights[1, 7:] = 0.0
    return Batch(ids, weights, mask)


@pytest.fixture(scope="module")
def student_of(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("distill") / "cut"
    whole = family_checkpoint("qwen3_moe")
    cut(whole, plan_for(whole, lambda layer: KEPT), folder)

    def get(form: Form) -> tuple[Any, Teacher, Any]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        teacher = Teacher(
            whole, model, family_of({"model_type": "qwen3_moe"}, whole), dict.fromkeys(range(4), KEPT), form
        )
        return model, teacher, AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()

    return get


def test_logit_distillation_is_the_kl_over_answer_tokens(student_of: Any) -> None:
    model, teacher, whole = student_of("logits")
    batch = a_batch()
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    found = teacher(batch, logits, float(batch.weights[:, 1:].sum()))
    with torch.no_grad():
        p = whole(input_ids=batch.ids, attention_mask=batch.mask).logits.double().softmax(-1)
    q = logits.detach().double().softmax(-1)
    apart = [
        float((p[row, at - 1] * (p[row, at - 1] / q[row, at - 1]).log()).sum())
        for row in range(2) for at in range(1, 9) if batch.weights[row, at]
    ]  # fmt: skip
    assert float(found) == pytest.approx(sum(apart) / len(apart), rel=1e-4) and float(found) > 0.01
    # A part of a minibatch counts by its share of the answer tokens.
    assert float(teacher(batch, logits, 2.0 * len(apart))) == pytest.approx(float(found) / 2, rel=1e-5)
    found.backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in model.parameters())


def inputs_of(model: Any, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _m, args: seen.append((args[0], args[1])))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=batch.ids, attention_mask=batch.mask)
    for hook in hooks:
        hook.remove()
    return seen


def one_expert(experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (experts.gate_up_proj[expert].double() @ x.double()).chunk(2)
    return experts.down_proj[expert].double() @ (torch.nn.functional.silu(gate) * up)


def test_expert_distillation_compares_each_chosen_expert_with_its_original(student_of: Any) -> None:
    model, teacher, whole = student_of("experts")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(1.1)
    batch = a_batch()
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    found = teacher(batch, logits, float(batch.weights[:, 1:].sum()))
    wanted = 0.0
    real = [t for t in range(18) if batch.mask.flatten()[t]]
    for place, ((x, ids), (known, _)) in enumerate(zip(inputs_of(model, batch), inputs_of(whole, batch), strict=True)):
        ours, theirs = (m.model.layers[place].mlp.experts for m in (model, whole))
        apart = size = 0.0
        for token in real:
            for expert in ids[token].tolist():
                target = one_expert(theirs, KEPT[expert], known[token])
                apart += float((one_expert(ours, expert, x[token]) - target).square().sum())
                size += float(target.square().sum())
        wanted += apart / size
        if place == 0:
            assert apart / size == pytest.approx(0.01, rel=1e-3)  # the same input, the output 1.1 times as large
    assert float(found) == pytest.approx(wanted, rel=1e-3)
    found.backward()
    assert float(model.model.layers[0].mlp.experts.down_proj.grad.abs().max()) > 0


def test_a_family_that_weighs_inputs_has_no_expert_term(family_checkpoint: Callable[[str], Path]) -> None:
    folder = family_checkpoint("llama4_text")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="weighs the experts' inputs"):
        Teacher(folder, model, family_of({"model_type": "llama4_text"}, folder), {}, "experts")
