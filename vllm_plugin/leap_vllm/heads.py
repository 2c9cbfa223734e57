"""Router heads of plans that share one engine: tuned rows take the place of the gate's for the tokens of their slot.

T tokens, H hidden, E experts of a layer, R rows of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load
from torch.nn.functional import linear

from leap_serve.errors import LeapError

LayerHead = tuple[torch.Tensor, torch.Tensor | None]
"""weight [|I|, H] and bias [|I|], or None."""
TokensOf = Mapping[int, torch.Tensor | None]
"""Slot → the places of its tokens in a step, long and on the layer's device, or None where all are its own."""


class HeadTable:
    """The heads of one layer by slot: ids [R], weight [R, H] and bias [R] in the model's dtype.

    Each head meets its own tokens only. One product of all tokens with all heads would be fewer calls, and T·R·H
    multiplications for every head that is there; it cost 64 µs a layer where this costs 10 (T = 32, R = 16, H = 128).

    Args:
        device: of the layer.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}

    def put(self, slot: int, retained: Sequence[int], head: LayerHead, dtype: torch.dtype) -> None:
        """Give a slot its head; rounds to ``dtype``, that of the model, as a merged head would be."""
        weight, bias = (None if one is None else one.to(self._device, dtype) for one in head)
        assert weight is not None
        self._held[slot] = (torch.tensor(list(retained), device=self._device), weight, bias)

    def drop(self, slot: int) -> None:
        """Take a slot's head away; harmless when it has none."""
        self._held.pop(slot, None)

    def logits(self, hidden: torch.Tensor, logits: torch.Tensor, tokens_of: TokensOf) -> torch.Tensor:
        """Return logits [T, E] in which tokens of headed slots have their head's logits for its experts.

        Args:
            hidden: [T, ≥ H], what the gate has seen; a kernel's padding may follow.
            logits: [T, E], the gate's; left as they are.
            tokens_of: the headed slots of the step; one without a head here keeps the gate's logits.
        """
        found = logits
        for slot, places in tokens_of.items():
            held = self._held.get(slot)
            if held is None:
                continue
            if found is logits:
                found = logits.clone()
            ids, weight, bias = held
            seen = hidden[:, : weight.shape[1]] if places is None else hidden[places, : weight.shape[1]]
            own = linear(*(None if one is None else one.to(logits.dtype) for one in (seen, weight, bias)))
            if places is None:
                found[:, ids] = own
            else:
                found[places[:, None], ids] = own
        return found


def read_heads(content: bytes, plan: Mapping[int, Any], where: str) -> dict[int, LayerHead]:
    """Parse router_head.safetensors: MoE layer → its head. Raises LeapError where a layer's rows are not the plan's."""
    tensors, heads = load(content), dict[int, LayerHead]()
    for layer in plan:
        weight, bias = tensors.pop(f"layers.{layer}.weight", None), tensors.pop(f"layers.{layer}.bias", None)
        if weight is None:
            if bias is not None:
                raise LeapError(where, f"layers.{layer}.bias comes without its weight", "tune again")
            continue
        if len(weight) != len(plan[layer][0]):
            what = f"layer {layer} has {len(weight)} rows, the plan retains {len(plan[layer][0])}"
            raise LeapError(where, what, "give the head that was tuned for this plan")
        heads[layer] = (weight, bias)
    if tensors:
        raise LeapError(where, f"tensor {min(tensors)} belongs to no layer of the plan", "tune again")
    return heads
