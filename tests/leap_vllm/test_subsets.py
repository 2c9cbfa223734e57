"""Masked routing in vLLM's own routers: every kind, against a float64 definition, each token under its own plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leap_serve.errors import UnsupportedError

pytestmark = pytest.mark.e2e
E, K, T = 12, 4, 96
Plans = list[tuple[list[int], int, float]]
PLANS: Plans = [
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


def table_of(plans: Plans, fixed: bool = False) -> Any:
    """A layer's table with plans in its slots 1, 2, …"""
    from leap_vllm.subsets import LayerTable

    table = LayerTable(E, K, torch.device("cpu"), fixed=fixed)
    table.load(plans)
    return table


def routed(router: Any, table: Any, slots: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids [T, K] of logits routed by the plans in slots."""
    from leap_vllm.subsets import route

    return route(
        table, slots, logits, choosing_of(router), lambda z: router._compute_routing(z, z, None, input_ids=None)
    )


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


WHOLE: Plans = [(list(range(E)), K, 1.0)]


def cuts(kind: str, logits: torch.Tensor, slots: torch.Tensor, plans: Plans) -> torch.Tensor:
    """What each token's own cut would do; dense [T, E]."""
    every = WHOLE + plans
    return torch.stack([by_cutting(kind, z, *every[slot]) for z, slot in zip(logits, slots.tolist(), strict=True)])


@pytest.mark.parametrize("fixed", [False, True], ids=["eager", "fixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_routed_as_in_its_own_cut(kind: str, fixed: bool, logits: torch.Tensor) -> None:
    router, slots = router_of(kind), torch.arange(T) % 4
    weights, ids = routed(router, table_of(PLANS, fixed), slots, logits)
    assert weights.shape == ids.shape == (T, K)
    found = dense(weights, ids)
    assert (found - cuts(kind, logits, slots, PLANS)).abs().max() < 1e-5
    stock = dense(*router._compute_routing(logits, logits, None, input_ids=None))
    assert (found - stock)[slots == 0].abs().max() < 1e-6, "slot 0 is the stock routing"
    assert all((found - stock)[slots == slot].abs().max() > 1e-2 for slot in (1, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_one_slot_for_all_tokens(kind: str, logits: torch.Tensor) -> None:
    """A step whose requests share a plan names its slot once."""
    router, table = router_of(kind), table_of(PLANS)
    for slot in range(4):
        once = dense(*routed(router, table, torch.tensor([slot]), logits))
        assert torch.equal(once, dense(*routed(router, table, torch.full((T,), slot), logits)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_follows_what_is_written_into_the_tables(kind: str, logits: torch.Tensor) -> None:
    """As a CUDA graph does, a trace keeps the operations and the tensors of one step, and nothing of its Python."""
    from torch.fx.experimental.proxy_tensor import make_fx

    router, table = router_of(kind), table_of([], fixed=True)
    slots = torch.zeros(T, dtype=torch.long)
    recorded = make_fx(lambda z: routed(router, table, slots, z))(logits)
    stock = dense(*router._compute_routing(logits, logits, None, input_ids=None))
    assert (dense(*recorded(logits)) - stock).abs().max() < 1e-6, "recorded before any plan was there"
    for plans in (PLANS, PLANS[::-1], [([0, 2, 5, 6, 9, 10], 1, 1.0)]):
        table.load(plans)
        slots.copy_(torch.arange(T) % (len(plans) + 1))
        other = logits.flip(0)
        assert (dense(*recorded(other)) - cuts(kind, other, slots, plans)).abs().max() < 1e-5


@pytest.mark.parametrize("fixed", [False, True], ids=["eager", "fixed"])
@pytest.mark.parametrize("kind", ["softmax", "renormalised", "sigmoid", "bias"])
def test_fewer_retained_than_the_router_s_slots(kind: str, fixed: bool, logits: torch.Tensor) -> None:
    """A plan may retain fewer experts than the model's top_k: the slots left over must weigh nothing."""
    lone: Plans = [([5], 1, 1.0), ([2, 9], 2, 0.5)]
    slots = torch.arange(T) % 2 + 1
    found = dense(*routed(router_of(kind), table_of(lone, fixed), slots, logits))
    assert found.isfinite().all() and (found - cuts(kind, logits, slots, lone)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["softmax", "renormalised"])
def test_padding_stays_padding(kind: str, logits: torch.Tensor) -> None:
    """vLLM's routers on a GPU mark padded tokens by expert −1 and leave their weights at 0."""
    from leap_vllm.subsets import route

    router, table, padded = router_of(kind), table_of(PLANS, fixed=True), torch.arange(T)[:, None] >= T - 7
    slots = torch.arange(T) % 4

    def stock(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = router._compute_routing(z, z, None, input_ids=None)
        return weights.masked_fill(padded, 0.0), ids.masked_fill(padded, -1)

    weights, ids = route(table, slots, logits, choosing_of(router), stock)
    assert (ids[-7:] == -1).all() and (weights[-7:] == 0).all()
    expected = cuts(kind, logits, slots, PLANS)[:-7]
    assert (dense(weights[:-7], ids[:-7]) - expected).abs().max() < 1e-5


def test_bf16_logits_without_temperature_stay_bf16(logits: torch.Tensor) -> None:
    """The cut's router gets bf16 logits; so must the masked one, or ties would fall otherwise."""
    from leap_vllm.subsets import route

    seen: list[torch.dtype] = []

    def stock(z: torch.Tensor) -> Any:
        seen.append(z.dtype)
        return router._compute_routing(z, z, None, input_ids=None)

    router, half = router_of("renormalised"), logits.bfloat16()
    slots = torch.ones(T, dtype=torch.long)
    sets: list[Plans] = [[(PLANS[0][0], K, 1.0)], [(PLANS[0][0], K, 0.7)]]
    for plans in sets:
        route(table_of(plans), slots, half, choosing_of(router), stock)
    assert seen == [torch.bfloat16, torch.float32]


def test_what_cannot_be_masked_is_refused() -> None:
    from types import SimpleNamespace

    from leap_vllm import compat

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
    with pytest.raises(RuntimeError, match=r"Owner\.name has been hooked again"):
        undo_first()
    assert owner.name() == "second"
    undo_second()
    assert owner.name() == "first"
    undo_first()
    assert owner.name() == "class" and "name" not in vars(owner)
