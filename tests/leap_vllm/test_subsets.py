"""Masked routing in vLLM's own routers: every kind, against a float64 definition, each token under its own plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leap_serve.errors import UnsupportedError

pytestmark = pytest.mark.e2e
E, K, T = 12, 4, 96
PLANS: list[tuple[list[int], int, float]] = [
    ([0, 1, 4, 5, 8, 9], 4, 1.0),
    ([2, 3, 6, 7, 10, 11], 2, 0.6),
    ([0, 3, 4, 7, 8, 11], 1, 1.7),
]
"""Two of each group of four. Retained ids, top_k, τ of slots 1 to 3."""
BIAS = torch.linspace(2.0, -2.0, E)
"""So strong that dropped experts would win by their bias alone."""


def router_of(kind: str) -> Any:
    """One of vLLM's routers, as its factory builds it on this platform."""
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router
    from vllm.model_executor.models.llama4 import Llama4MoE

    arguments: dict[str, dict[str, Any]] = {
        "softmax": dict(renormalize=False),
        "renormalised": dict(renormalize=True),
        "sigmoid": dict(renormalize=False, custom_routing_function=Llama4MoE.custom_routing_function),
        "bias": dict(
            use_grouped_topk=True, num_expert_group=1, topk_group=1, scoring_func="sigmoid", routed_scaling_factor=2.5,
            e_score_correction_bias=BIAS,
        ),
        "groups and bias": dict(
            use_grouped_topk=True, num_expert_group=3, topk_group=2, scoring_func="sigmoid", routed_scaling_factor=2.5,
            e_score_correction_bias=BIAS,
        ),
        "groups": dict(
            use_grouped_topk=True, num_expert_group=3, topk_group=2, scoring_func="softmax", renormalize=False
        ),
    }  # fmt: skip
    return create_fused_moe_router(K, E, **arguments[kind])


KINDS = ("softmax", "renormalised", "sigmoid", "bias", "groups and bias", "groups")


def choosing_of(router: Any) -> Any:
    """What the plugin reads off a router inside an ordinary MoE layer."""
    from types import SimpleNamespace

    from leap_vllm import compat

    layer = SimpleNamespace(
        router=router,
        moe_config=SimpleNamespace(dp_size=1, ep_size=1, is_sequence_parallel=False),
        routed_experts=SimpleNamespace(quant_method=SimpleNamespace(is_monolithic=False)),
    )
    return compat.choosing("layer 0", layer)


def dense(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Spread [T, K] over [T, E] in float64, so that the order of the slots does not count."""
    return torch.zeros(ids.shape[0], E, dtype=torch.float64).scatter_add_(1, ids.long(), weights.double())


def by_cutting(kind: str, z: torch.Tensor, ids: list[int], top_k: int, tau: float) -> torch.Tensor:
    """The routing of one token z [E] in a model that really holds nothing but ``ids``, in float64; dense [E]."""
    logits, bias = z.double()[ids] / tau, BIAS.double()[ids]
    scores = logits.sigmoid() if kind in ("sigmoid", "bias", "groups and bias") else logits.softmax(-1)
    merit = scores + bias if "bias" in kind else scores
    if "groups" in kind:
        parts = merit.view(3, -1)
        worth = parts.topk(2).values.sum(-1) if "bias" in kind else parts.amax(-1)
        best = worth.topk(2).indices
        merit = torch.full_like(parts, float("-inf")).index_copy_(0, best, parts[best]).flatten()
    chosen = merit.topk(top_k).indices
    weights = scores[chosen]
    if kind in ("renormalised", "bias", "groups and bias"):
        weights = weights / weights.sum()
    out = torch.zeros(E, dtype=torch.float64)
    out[torch.tensor(ids)[chosen]] = weights * (2.5 if "bias" in kind else 1.0)
    return out


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_routed_as_in_its_own_cut(kind: str, logits: torch.Tensor) -> None:
    from leap_vllm.subsets import LayerTable, route

    router = router_of(kind)
    table = LayerTable(PLANS, E, K, logits.device)
    slots = torch.arange(T) % 4
    weights, ids = route(
        table, slots, logits, choosing_of(router), lambda z: router._compute_routing(z, z, None, input_ids=None)
    )
    assert weights.shape == ids.shape == (T, K)
    found = dense(weights, ids)
    whole = [(list(range(E)), K, 1.0), *PLANS]
    expected = torch.stack([by_cutting(kind, z, *whole[slot]) for z, slot in zip(logits, slots.tolist(), strict=True)])
    assert (found - expected).abs().max() < 1e-5
    stock = dense(*router._compute_routing(logits, logits, None, input_ids=None))
    assert (found - stock)[slots == 0].abs().max() < 1e-6, "slot 0 is the stock routing"
    assert all((found - stock)[slots == slot].abs().max() > 1e-2 for slot in (1, 2, 3))


def test_fewer_retained_than_the_router_s_slots(logits: torch.Tensor) -> None:
    """A plan may retain fewer experts than the model's top_k: the slots left over must weigh nothing."""
    from leap_vllm.subsets import LayerTable, route

    lone = [([5], 1, 1.0), ([2, 9], 2, 0.5)]
    for kind in ("softmax", "renormalised", "sigmoid", "bias"):
        router = router_of(kind)
        found = dense(
            *route(
                LayerTable(lone, E, K, logits.device), torch.arange(T) % 2 + 1, logits, choosing_of(router),
                lambda z, r=router: r._compute_routing(z, z, None, input_ids=None),
            )
        )  # fmt: skip
        expected = torch.stack([by_cutting(kind, z, *lone[at % 2]) for at, z in enumerate(logits)])
        assert found.isfinite().all() and (found - expected).abs().max() < 1e-5, kind


def test_bf16_logits_without_temperature_stay_bf16(logits: torch.Tensor) -> None:
    """The cut's router gets bf16 logits; so must the masked one, or ties would fall otherwise."""
    from leap_vllm.subsets import LayerTable, route

    seen: list[torch.dtype] = []

    def stock(z: torch.Tensor) -> Any:
        seen.append(z.dtype)
        return router._compute_routing(z, z, None, input_ids=None)

    router, half = router_of("renormalised"), logits.bfloat16()
    slots = torch.ones(T, dtype=torch.long)
    for plans in ([(PLANS[0][0], K, 1.0)], [(PLANS[0][0], K, 0.7)]):
        route(LayerTable(plans, E, K, half.device), slots, half, choosing_of(router), stock)
    assert seen == [torch.bfloat16, torch.float32]


def test_what_cannot_be_masked_is_refused() -> None:
    from types import SimpleNamespace

    from leap_vllm import compat
    from leap_vllm.subsets import Subsets

    with pytest.raises(UnsupportedError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        Subsets(SimpleNamespace())
    layer = SimpleNamespace(
        router=router_of("softmax"),
        moe_config=SimpleNamespace(dp_size=1, ep_size=1, is_sequence_parallel=False),
        routed_experts=SimpleNamespace(quant_method=SimpleNamespace(is_monolithic=True)),
    )
    with pytest.raises(UnsupportedError, match="moe_backend='triton'"):
        compat.choosing("layer 0", layer)
    layer.routed_experts.quant_method.is_monolithic = False
    layer.router.custom_routing_function = lambda **_: None
    with pytest.raises(UnsupportedError, match="cannot be masked"):
        compat.choosing("layer 0", layer)


def test_a_replaced_method_comes_back() -> None:
    from leap_vllm.compat import replace_method

    class Owner:
        def name(self) -> str:
            return "class"

    owner = Owner()
    undo_first = replace_method(owner, "name", lambda: "first")
    undo_second = replace_method(owner, "name", lambda: "second")
    assert owner.name() == "second"
    undo_second()
    assert owner.name() == "first"
    undo_first()
    assert owner.name() == "class" and "name" not in vars(owner)
