"""Skipping and router maps in vLLM's terms: every token by hand, and shapes that never change."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from leap_serve.plan import LayerPlan, Merge
from leap_vllm.router import apply_plan, skipped

T, E, K = 40, 8, 4


def routed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, and the weights and ids of a softmax router that renormalises; in no order, as vLLM may give them."""
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(T, E, generator=random) * 2
    values, ids = z.softmax(-1).topk(K, -1, sorted=False)
    mixed = torch.stack([torch.randperm(K, generator=random) for _ in range(T)])
    return z, (values / values.sum(-1, keepdim=True)).gather(1, mixed), ids.gather(1, mixed).int()


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("beta", [0.05, 0.4, 1.0])
def test_skipping_token_by_token(beta: float, renormalise: bool) -> None:
    _, weights, ids = routed()
    left, named = skipped(weights, ids, beta, renormalise)
    assert left.shape == weights.shape and named.shape == ids.shape and named.dtype == ids.dtype
    skips = 0
    for w, i, got, name in zip(weights.tolist(), ids.tolist(), left.tolist(), named.tolist(), strict=True):
        best = max(range(K), key=w.__getitem__)
        keep = [value >= beta * w[best] for value in w]
        scale = sum(w) / sum(v for v, k in zip(w, keep, strict=True) if k) if renormalise else 1.0
        assert got == pytest.approx([v * scale if k else 0.0 for v, k in zip(w, keep, strict=True)], rel=1e-5)
        assert name == [e if k else i[best] for e, k in zip(i, keep, strict=True)], "no other expert is read"
        skips += K - sum(keep)
    assert (skips == T * (K - 1)) if beta == 1.0 else skips > 0


def test_padded_tokens_stay_padded() -> None:
    weights, ids = torch.zeros(2, K), torch.full((2, K), -1, dtype=torch.int32)
    left, named = skipped(weights, ids, 0.5, True)
    assert torch.equal(left, weights) and torch.equal(named, ids)


def planned(z: torch.Tensor, layer: LayerPlan, **router: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Weights and ids that a router of vLLM gives under a plan, and what it gives without."""
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

    made = create_fused_moe_router(K, E, **router)
    stock = made.select_experts(hidden_states=z, router_logits=z)
    apply_plan(made, layer, E, torch.device("cpu"))
    return *made.select_experts(hidden_states=z, router_logits=z), stock


@pytest.mark.e2e
def test_ids_are_mapped_to_slots_and_weights_stay() -> None:
    z, _, _ = routed()
    clusters = (((0, 1.0), (3, 1.0), (7, 1.0)), ((1, 1.0), (2, 1.0)), ((4, 1.0), (5, 1.0), (6, 1.0)))
    got, slots, (weights, ids) = planned(z, LayerPlan((0, 1, 4), 3, merge=Merge(clusters, clusters, "ids")))
    of = {e: slot for slot, row in enumerate(clusters) for e, _ in row}
    assert torch.equal(got, weights) and slots.dtype == ids.dtype
    assert slots.tolist() == [[of[e] for e in row] for row in ids.tolist()]


@pytest.mark.e2e
@pytest.mark.parametrize("renormalise", [True, False])
def test_probabilities_are_mapped_before_the_choice(renormalise: bool) -> None:
    z, _, _ = routed()
    rows = (((0, 0.5), (3, 0.25)), ((1, 1.0),), ((2, 0.1), (4, 2.0)), ((6, 0.3), (7, 0.9)), ((5, 1.0),))
    layer = LayerPlan((0, 1, 2, 5, 6), K, 1.7, skip=0.3, merge=Merge(rows, rows))
    got, slots, (_, ids) = planned(z, layer, renormalize=renormalise)
    assert slots.dtype == ids.dtype
    for logits, w, s in zip(z, got.tolist(), slots.tolist(), strict=True):
        p = (logits / 1.7).softmax(-1)
        mapped = sorted(((float(sum(c * p[e] for e, c in row)), slot) for slot, row in enumerate(rows)), reverse=True)
        total = sum(v for v, _ in mapped[:K]) if renormalise else 1.0
        strong = [(v / total, slot) for v, slot in mapped[:K] if v >= 0.3 * mapped[0][0]]
        again = 1 / sum(v for v, _ in strong) if renormalise else 1.0
        expected = [(v * again, slot) for v, slot in strong] + [(0.0, mapped[0][1])] * (K - len(strong))
        assert w == pytest.approx([v for v, _ in expected], rel=1e-4) and s == [slot for _, slot in expected]


@pytest.mark.e2e
def test_a_router_that_is_no_plain_softmax_is_refused() -> None:
    from leap_serve.errors import UnsupportedError

    rows = tuple(((e, 1.0),) for e in range(K))
    layer = LayerPlan((0, 1, 2, 3), K, merge=Merge(rows, rows))
    odd: dict[str, Any] = {"use_grouped_topk": True, "num_expert_group": 2, "topk_group": 1, "scoring_func": "sigmoid"}
    with pytest.raises(UnsupportedError, match="no plain softmax router"):
        planned(routed()[0], layer, **odd)


@pytest.mark.gpu
@pytest.mark.parametrize("applied", ["probabilities", "ids"])
def test_a_cuda_graph_holds_the_map_and_the_skipping(applied: Literal["probabilities", "ids"]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

    device = torch.device("cuda")
    clusters = (((0, 1.0), (3, 1.0)), ((1, 1.0), (2, 1.0)), ((4, 1.0), (5, 1.0)), ((6, 1.0), (7, 1.0)))
    router = create_fused_moe_router(K, E, renormalize=True)
    apply_plan(router, LayerPlan((0, 1, 4, 6), K, skip=0.4, merge=Merge(clusters, clusters, applied)), E, device)
    z = torch.zeros(T, E, device=device)

    def step() -> Any:
        return router._compute_routing(z, z, None, input_ids=None)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for seed in range(3):
        z.copy_(routed(seed)[0])
        graph.replay()
        for got, wanted in zip(recorded, step(), strict=True):
            torch.testing.assert_close(got, wanted)
