"""The same layer in plain torch: the kernel's oracle in tests and benchmarks. Slow, and easy to read."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional


def reference_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    router_logits: torch.Tensor | None = None,
    *,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    top_k: int | None = None,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    renormalise: bool = True,
    scale: float = 1.0,
    weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute what :func:`leap_kernels.fused_moe` computes, with its arguments; fp64 where x is fp64, else fp32.

    Returns [T, H] in x's dtype. Arguments are not checked.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    if router_logits is not None:
        assert top_k is not None
        topk_ids, topk_weights = reference_routing(
            router_logits.to(exact), top_k, scoring, temperature, bias, renormalise, scale
        )
    assert topk_ids is not None and topk_weights is not None
    ids = topk_ids.long()
    if expert_map is not None:
        ids = torch.where(ids >= 0, expert_map.long()[ids.clamp(min=0)], -1)
    out = torch.zeros(x.shape, dtype=exact, device=x.device)
    for expert in range(w13.shape[0]):
        token, choice = torch.nonzero(ids == expert, as_tuple=True)
        if not len(token):
            continue
        weight = topk_weights[token, choice].to(exact)[:, None]
        rows = x[token].to(exact)
        if weight_on_input:
            rows = rows * weight
        gate, up = (rows @ w13[expert].to(exact).T).chunk(2, dim=1)
        rows = (functional.silu(gate) * up) @ w2[expert].to(exact).T
        out.index_add_(0, token, rows if weight_on_input else rows * weight)
    return out.to(x.dtype)


def reference_routing(
    logits: torch.Tensor,
    top_k: int,
    scoring: str,
    temperature: float,
    bias: torch.Tensor | None,
    renormalise: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return topk_ids int64 and topk_weights [T, K] from logits [T, E], computed in the logits' dtype.

    Ranked by logit, or by score + bias where there is a bias; among equals the lower id wins.
    """
    z = logits / temperature
    scores = torch.softmax(z, dim=1) if scoring == "softmax" else torch.sigmoid(z)
    key = z if bias is None else scores + bias.to(z.dtype)
    ids = torch.sort(key, dim=1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalise:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-20)
    return ids, weights * scale
