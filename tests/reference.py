"""The reference that parity is measured against: stock transformers on the FULL model, its routers masked.

Knows nothing of leap_serve's code: dropped experts get the logit −inf, the rest is divided by τ, top_k is
the layer's own, and what follows is the family's scoring as its paper and transformers have it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Layer = tuple[Sequence[int], int, float]
"""Retained ids, top_k, τ."""


def masked_logits(z: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Return z/τ [T, E] in fp32, −inf for dropped experts."""
    retained, _, temperature = layer
    mask = torch.full_like(z, float("-inf"), dtype=torch.float32)
    mask[:, list(retained)] = 0.0
    return z.float() / temperature + mask


def softmax_route(router: Any, x: torch.Tensor, layer: Layer, renormalise: bool) -> tuple[torch.Tensor, ...]:
    """Softmax over the retained experts, top-k, renormalised or not: Qwen, OLMoE, Mixtral."""
    z = F.linear(x, router.weight)
    weights, ids = masked_logits(z, layer).softmax(-1).topk(layer[1], -1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return z, weights.to(x.dtype), ids


def topk_softmax_route(router: Any, x: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, ...]:
    """Top-k of the logits, softmax over those: GPT-OSS."""
    z = F.linear(x, router.weight, router.bias)
    values, ids = masked_logits(z, layer).topk(layer[1], -1)
    return z, values.softmax(-1).to(x.dtype), ids


def sigmoid_route(router: Any, x: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, ...]:
    """Top-k of the logits, sigmoid of those, zero elsewhere: Llama-4."""
    z = F.linear(x, router.weight)
    values, ids = masked_logits(z, layer).topk(layer[1], -1)
    return torch.zeros_like(z).scatter_(1, ids, values.sigmoid().to(z.dtype)), z


def sigmoid_bias_route(router: Any, x: torch.Tensor, layer: Layer, scale: float, renormalise: bool) -> Any:
    """σ(z/τ) weighs, σ(z/τ) + bias selects: GLM-4.5 without groups."""
    z = masked_logits(F.linear(x.float(), router.weight.float()), layer)
    scores = z.sigmoid()
    choice = (scores + router.e_score_correction_bias).masked_fill(z.isinf(), float("-inf"))
    ids = choice.topk(layer[1], -1).indices
    weights = scores.gather(1, ids)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return z, weights * scale, ids


def route_of(config: Any) -> Callable[..., Any]:
    """Return route(router, x [T, H], layer) for a model's config."""
    family = config.model_type
    if family == "gpt_oss":
        return topk_softmax_route
    if family == "llama4_text":
        return sigmoid_route
    if family == "glm4_moe":
        return lambda router, x, layer: sigmoid_bias_route(
            router, x, layer, config.routed_scaling_factor, config.norm_topk_prob
        )
    renormalise = family == "mixtral" or config.norm_topk_prob
    return lambda router, x, layer: softmax_route(router, x, layer, renormalise)


@torch.no_grad()
def reference_logprobs(
    folder: Path, layers: Mapping[int, Layer], prompts: Sequence[Sequence[int]], dtype: str = "float32"
) -> list[torch.Tensor]:
    """Return log-softmax [tokens, vocabulary] of each prompt under the full model with masked routers.

    Without ``layers`` the model runs as it is.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
    model.eval()
    route = route_of(model.config)
    for index, layer in layers.items():
        router = router_of(model.model.layers[index])

        def hook(module: Any, args: Any, output: Any, layer: Layer = layer) -> Any:
            return route(module, args[0].reshape(-1, args[0].shape[-1]), layer)

        router.register_forward_hook(hook)
    return [model(torch.tensor([list(prompt)])).logits[0].float().log_softmax(-1) for prompt in prompts]


def router_of(layer: Any) -> Any:
    """Return the router module of a transformers decoder layer."""
    found = [module for module in layer.modules() if type(module).__name__.endswith(("Router", "router"))]
    assert len(found) == 1, [type(module).__name__ for module in layer.modules()]
    return found[0]
