"""The router temperature, applied exactly once and at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


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
