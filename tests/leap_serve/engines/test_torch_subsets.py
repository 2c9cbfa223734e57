"""Masked routers of transformers: every kind, groups included, against a float64 definition of the cut router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cutting import plan_for
from families import SPECIFIC
from leap_serve.architectures import family_of
from leap_serve.checkpoint import Checkpoint
from leap_serve.engine import mean_esp
from leap_serve.engines import torch_subsets
from leap_serve.engines.subsets import check_plans
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.engines.torch_subsets import MaskedRouter, masked_routers
from leap_serve.errors import PlanError, UnsupportedError
from leap_serve.plan import LayerPlan
from leap_serve.tasks.base import Item
from leap_serve.workload import Workload
from parity import reference_layers, uneven_plan
from reference import reference_logprobs
from tiny_tokenizer import talking_copy

E, K, B, S, H = 12, 4, 4, 25, 16
ROWS = [
    LayerPlan(tuple(range(E)), K),
    LayerPlan((0, 1, 4, 5, 8, 9), 4),
    LayerPlan((2, 3, 6, 7, 10, 11), 2, 0.6),
    LayerPlan((0, 3, 4, 7, 8, 11), 1, 1.7),
]
"""The plan of each batch row; two of each group of four in all but the first, which retains everything."""


def router_of(family: str, groups: int = 1) -> Any:
    """A random router of transformers."""
    from transformers import AutoConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
    from transformers.models.llama4.modeling_llama4 import Llama4Router
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    of = {"olmoe": OlmoeTopKRouter, "gpt_oss": GptOssTopKRouter, "llama4_text": Llama4Router}
    config = AutoConfig.for_model(
        family, hidden_size=H, num_experts_per_tok=K, norm_topk_prob=family != "olmoe", n_group=groups,
        topk_group=min(2, groups), routed_scaling_factor=2.5,
        **{family_of({"model_type": family}, "test").num_experts_key: E},
    )  # fmt: skip
    made = of.get(family, Glm4MoeTopkRouter)(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.5, generator=random)
    if family == "glm4_moe":
        # So strong that dropped experts would win by their bias alone.
        made.e_score_correction_bias.copy_(torch.linspace(2.0, -2.0, E))
    return made


def by_cutting(router: Any, family: str, z: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """The routing of one token z [E] in a model that really holds nothing but the plan's experts; dense [E]."""
    ids = list(plan.retained)
    logits = z.double()[ids] / plan.temperature
    scores = logits.sigmoid() if family in ("glm4_moe", "llama4_text") else logits.softmax(-1)
    merit = scores
    if family == "glm4_moe":
        merit = scores + router.e_score_correction_bias.double()[ids]
        parts = merit.view(router.num_group, -1)
        best = parts.topk(2).values.sum(-1).topk(router.topk_group).indices
        merit = torch.full_like(parts, float("-inf")).index_copy_(0, best, parts[best]).flatten()
    chosen = merit.topk(plan.top_k).indices
    weights = scores[chosen]
    if family in ("glm4_moe", "gpt_oss"):
        weights = weights / weights.sum()
    out = torch.zeros(E, dtype=torch.float64)
    out[torch.tensor(ids)[chosen]] = weights * (2.5 if family == "glm4_moe" else 1.0)
    return out


@pytest.mark.parametrize(
    ("family", "groups"), [("olmoe", 1), ("gpt_oss", 1), ("llama4_text", 1), ("glm4_moe", 1), ("glm4_moe", 3)]
)
@torch.no_grad()
def test_every_row_is_routed_as_in_its_own_cut(family: str, groups: int) -> None:
    router, x = router_of(family, groups), torch.randn(B * S, H, generator=torch.Generator().manual_seed(1))
    stock = router(x)
    hook = MaskedRouter(family_of({"model_type": family}, "test"))
    hook.rows = ROWS
    handle = router.register_forward_hook(hook)
    masked = router(x)
    handle.remove()

    def dense(output: Any) -> torch.Tensor:
        if family == "llama4_text":
            return output[0].double()
        return torch.zeros(B * S, E, dtype=torch.float64).scatter_add_(1, output[2], output[1].double())

    z = stock[1] if family == "llama4_text" else stock[0]
    expected = torch.stack([by_cutting(router, family, z[t], ROWS[t // S]) for t in range(B * S)])
    assert (dense(masked) - expected).abs().max() < 1e-5
    assert (dense(masked) - dense(stock))[:S].abs().max() < 1e-6, "a plan that retains everything changes nothing"
    assert all((dense(masked) - dense(stock))[row * S : (row + 1) * S].abs().max() > 1e-2 for row in (1, 2, 3))


ITEMS = [Item("0", "The quick brown fox", " jumps."), Item("1", "", "x + 1"), Item("2", "0123456789", "")]


@pytest.mark.parametrize("family", SPECIFIC)
def test_layers_really_shrink_and_grow_back(
    family: str, family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = TorchEngine(talking_copy(family_checkpoint(family), tmp_path / family), dtype="float32", device="cpu")
    model = engine.checkpoint
    plan = uneven_plan(model.folder)
    one_expert = sum(
        p[0].numel() for p in torch_subsets.moe_blocks(engine._model, model.family)[3].experts.parameters()
    )
    full, whole, masked = engine.score(ITEMS), engine.memory().weights_bytes, engine.score_plans([plan], ITEMS)[0]
    text = engine.generate(["Once upon"], 6)
    engine.apply(uneven_plan(model.folder, seed=5))
    engine.apply(plan)
    assert [s.logprob for s in engine.score(ITEMS)] == pytest.approx([s.logprob for s in masked], abs=1e-4)
    assert [s.logprob for s in full] != pytest.approx([s.logprob for s in masked], abs=1e-2)
    dropped = sum(model.num_experts - count for count in plan.counts)
    assert engine.memory().weights_bytes == whole - 4 * one_expert * dropped
    for ask in (lambda: engine.score_plans([plan], ITEMS), lambda: engine.profile(ITEMS)):
        with pytest.raises(UnsupportedError, match="restore them first"):
            ask()
    with pytest.raises(PlanError, match="was made for"):
        engine.apply(replace(plan, base=replace(plan.base, sha256="0" * 64)))
    measured = engine.measure(Workload("latency", input_tokens=4, output_tokens=3, batch=2), rounds=2)
    assert len(measured.samples) == 2 and measured.memory.weights_bytes < whole
    engine.restore()
    engine.restore()
    assert (engine.score(ITEMS), engine.generate(["Once upon"], 6)) == (full, text)
    assert engine.memory().weights_bytes == whole
    engine.close()


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_esp_is_the_overlap_of_both_distributions(
    family: str, family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = talking_copy(family_checkpoint(family), tmp_path / family)
    plans = [uneven_plan(model, 1), uneven_plan(model, 2)]
    engine = TorchEngine(model, dtype="float32", device="cpu")
    found = engine.score_plans(plans, ITEMS, esp=True)
    encoded = [engine.tokenize([item.prompt, item.answer]) for item in ITEMS]
    engine.close()
    ids = [[*prompt, *answer, 2] for prompt, answer in encoded]
    full = reference_logprobs(model, {}, ids)
    for plan, row in zip(plans, found, strict=True):
        kept = reference_logprobs(model, reference_layers(plan), ids)
        for (prompt, _), p, q, whole, score in zip(encoded, full, kept, ids, row, strict=True):
            places = range(max(1, len(prompt)) - 1, len(whole) - 1)
            assert score.tokens == len(places)
            assert score.logprob == pytest.approx(sum(float(q[at, whole[at + 1]]) for at in places), abs=1e-4)
            overlap = [float(torch.minimum(p[at].exp(), q[at].exp()).sum()) for at in places]
            assert score.esp == pytest.approx(sum(overlap) / len(overlap), abs=1e-5)
            assert 0.05 < score.esp < 0.95, "too near to an end to show anything"
    total = sum(score.tokens for score in found[0])
    assert mean_esp(found[0]) == pytest.approx(sum((s.esp or 0) * s.tokens for s in found[0]) / total)


def test_a_model_without_routers_is_refused() -> None:
    family = family_of({"model_type": "olmoe"}, "test")
    with pytest.raises(UnsupportedError, match="no router"), masked_routers(torch.nn.Linear(2, 2), family):
        pass


def test_plans_must_speak_of_the_model(family_checkpoint: Any, tmp_path: Path) -> None:
    model = Checkpoint.open(family_checkpoint("qwen3_moe"))
    plan, identity = plan_for(model.folder, lambda layer: (0, 3, 5 + layer % 2)), model.identity()
    check_plans(model, identity, [plan, plan])
    for wrong, message in (
        (replace(plan, base=replace(plan.base, sha256="0" * 64)), "was made for"),
        (replace(plan, layers=dict(list(plan.layers.items())[1:])), r"in layers \[1, 2, 3\]"),
        (replace(plan, num_experts=9), "plans 9 experts"),
        (replace(plan, layers={index: replace(one, top_k=3) for index, one in plan.layers.items()}), "top_k 3"),
    ):
        with pytest.raises(PlanError, match=rf"plan 1: .*{message}"):
            check_plans(model, identity, [plan, wrong])
