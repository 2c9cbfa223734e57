"""What a plan adds to a router at run time: its temperature, a map to merged experts, and dynamic skipping.

T tokens, E rows of the router, r experts that the layer holds, K top_k. Nothing here has a shape that depends on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from leap_vllm import compat

if TYPE_CHECKING:
    import torch

    from leap_serve.plan import LayerPlan


def apply_plan(router: Any, layer: LayerPlan, num_experts: int, device: torch.device) -> None:
    """Make a router of vLLM (a BaseRouter) route as a plan says beyond its experts and top_k."""
    import torch

    if layer.merge is not None and layer.maps_router and layer.merge.applied == "probabilities":
        matrix = torch.tensor(layer.merge.matrix(num_experts), dtype=torch.float32, device=device)
        map_probabilities(router, matrix, layer.temperature)
    else:
        if layer.temperature != 1.0:
            apply_temperature(router, layer.temperature)
        if layer.merge is not None and layer.maps_router:
            map_ids(router, layer.merge.slots(num_experts), device)
    if layer.skip is not None:
        skip_weak(router, layer.skip)


def apply_temperature(router: Any, temperature: float) -> None:
    """Make a router of vLLM (a BaseRouter) route by z/τ: softmax(z/τ), or σ(z/τ) for sigmoid routers.

    The logits z [T, E] are divided in fp32 before vLLM's own scoring, top-k and renormalisation run on
    them, so a correction bias stays unscaled and takes part in the selection only. The router's
    weights stay as they are: in bf16 a baked-in τ that is not a power of two would round them.
    """
    route = router._compute_routing

    def compute_routing(
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return route(hidden_states, router_logits.float() / temperature, indices_type, input_ids=input_ids)

    router._compute_routing = compute_routing


def map_ids(router: Any, slots: Sequence[int], device: torch.device) -> None:
    """Replace each expert that a router of E experts chooses by the slot it was merged into (HC-SMoE).

    Two choices of one slot stay two, each with its weight: their sum is what the merged expert counts.
    """
    import torch

    route = router._compute_routing
    table = torch.tensor(list(slots), device=device)

    def compute_routing(hidden_states: Any, router_logits: Any, indices_type: Any, **more: Any) -> Any:
        weights, ids = route(hidden_states, router_logits, indices_type, **more)
        return weights, table[ids.long()].to(ids.dtype)

    router._compute_routing = compute_routing


def map_probabilities(router: Any, matrix: torch.Tensor, temperature: float) -> None:
    """Route by softmax(z/τ)·W_RMᵀ, W_RM = ``matrix`` [r, E], then top-k, renormalised iff the model does (EEP)."""
    import torch

    top_k, renormalise = compat.softmax_routing(router)
    transposed = matrix.T.contiguous()

    def compute_routing(_hidden_states: Any, router_logits: torch.Tensor, indices_type: Any, **_more: Any) -> Any:
        mapped = (router_logits.float() / temperature).softmax(-1) @ transposed
        weights, ids = mapped.topk(top_k, -1)
        if renormalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return weights, ids.to(indices_type or torch.int32)

    router._compute_routing = compute_routing


def skip_weak(router: Any, beta: float) -> None:
    """Leave out the choices whose weight is below β times the token's highest (NAEE §3.3; k > 2 ours).

    A choice that is left out weighs 0 and names the token's best expert: shapes stay as they are, which CUDA graphs
    and fused kernels need, and no expert is read for its sake. Its products are still computed. The others are
    renormalised to the same sum iff the model renormalises.
    """
    route, renormalise = router._compute_routing, compat.renormalises(router)

    def compute_routing(hidden_states: Any, router_logits: Any, indices_type: Any, **more: Any) -> Any:
        weights, ids = route(hidden_states, router_logits, indices_type, **more)
        return skipped(weights, ids, beta, renormalise)

    router._compute_routing = compute_routing


def skipped(
    weights: torch.Tensor, ids: torch.Tensor, beta: float, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and ids [T, K], those below β times the row's highest weight being 0 and the best expert's."""
    import torch

    highest, place = weights.max(-1, keepdim=True)
    keep = weights >= beta * highest
    left = weights.masked_fill(~keep, 0.0)
    if renormalise:
        least = torch.finfo(left.dtype).tiny  # padded tokens weigh nothing
        left = left * (weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp_min(least))
    return left, torch.where(keep, ids, ids.gather(1, place))
