"""A transformers model whose experts are merged and whose routers follow a map: what EEP's second phase evaluates.

T tokens, E experts of the full model, r slots; W_EM and W_RM are [r, E].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from leap_serve.architectures import Family
from leap_serve.errors import UnsupportedError
from leap_training.methods.blocks import CHUNK, BlockModel


@dataclass(frozen=True, slots=True)
class Maps:
    """Of one layer: W_EM and W_RM, both [r, E] float32, and how many of the r slots a token uses."""

    experts: torch.Tensor
    router: torch.Tensor
    top_k: int


def check_maps(family: Family) -> None:
    """Raise UnsupportedError where routers give no softmax for a map to follow; to be asked before a model is loaded."""
    if family.router_kind not in ("softmax", "topk-softmax"):
        raise UnsupportedError(
            "--method eep", f"{family.model_type}'s router ({family.router_kind}) has no softmax to map",
            "choose another --method",
        )  # fmt: skip


def route(z: torch.Tensor, maps: Maps, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and slots [T, K] of logits z [T, E]: softmax(z)·W_RMᵀ, then top-k, then renormalising."""
    weights, slots = (z.float().softmax(-1) @ maps.router.T).topk(maps.top_k, -1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return weights, slots


def merge(experts: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return Σ_e W_EM[s, e]·W_e of every slot, [r, …] in the tensor's dtype, of W_EM [r, E] and a tensor [E, …].

    Summed in float64 and rounded once, CHUNK numbers at a time, so that no float64 copy of all experts is held.
    """
    flat = tensor.flatten(1)
    found = torch.empty(len(experts), flat.shape[1], dtype=tensor.dtype, device=tensor.device)
    step = max(1, CHUNK // len(flat))
    for start in range(0, flat.shape[1], step):
        found[:, start : start + step] = experts.double() @ flat[:, start : start + step].double()
    return found.view(len(experts), *tensor.shape[1:])


@contextmanager
def merged_experts(model: BlockModel, layers: Mapping[int, Maps]) -> Iterator[None]:
    """While open, the model's experts are Σ_e W_EM[s, e]·W_e and its routers follow W_RM; the full ones stay aside."""
    undo: list[Callable[[], Any]] = []
    try:
        for index, maps in layers.items():
            layer = model.layers[index]
            router, experts = layer.router, layer.block.experts
            renormalise = model.family.sums_to_one(router)

            def choose(
                _router: Any, _args: Any, output: tuple[torch.Tensor, ...], maps: Maps = maps, own: bool = renormalise
            ) -> tuple[torch.Tensor, ...]:
                weights, slots = route(output[0], maps, own)
                return output[0], weights.to(output[1].dtype), slots

            undo.append(router.register_forward_hook(choose).remove)
            for tensor in experts.parameters():
                undo.append(partial(setattr, tensor, "data", tensor.data))
                tensor.data = merge(maps.experts, tensor.data)
            undo.append(partial(setattr, experts, "num_experts", experts.num_experts))
            experts.num_experts = len(maps.experts)
        yield
    finally:
        while undo:
            undo.pop()()
