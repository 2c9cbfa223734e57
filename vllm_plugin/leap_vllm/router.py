"""The router temperature, applied exactly once and at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leap_serve.errors import UnsupportedError

if TYPE_CHECKING:
    import torch


def apply_temperature(runner: Any, layer: int, temperature: float) -> None:
    """Make an MoE layer route by z/τ: softmax(z/τ), or σ(z/τ) for sigmoid routers.

    The logits z [T, E] are divided in fp32 before vLLM's own scoring, top-k and renormalisation run on
    them, so a correction bias stays unscaled and takes part in the selection only. The router's
    weights stay as they are: in bf16 a baked-in τ that is not a power of two would round them.

    Args:
        runner: vLLM's MoERunner of the layer.
        layer: its index, for errors.
        temperature: τ > 0; at 1 nothing is touched.

    Raises:
        UnsupportedError: the layer's kernel computes the routing itself and would skip τ.
    """
    if temperature == 1.0:
        return
    if runner.is_monolithic:
        raise UnsupportedError(
            f"layer {layer}",
            f"router temperature {temperature} needs vLLM's own router, but the chosen MoE kernel routes by itself",
            "serve with --moe-backend triton",
        )
    router = runner.router
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
