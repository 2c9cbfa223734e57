"""Router heads of plans that share one engine: tuned rows take the place of the gate's for the tokens of their slot.

T tokens, H hidden, E experts of a layer, N places for heads (place 0 is «no head»), R rows of the largest head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load
from torch.nn.functional import linear, pad

from leap_serve.errors import LeapError

LayerHead = tuple[torch.Tensor, torch.Tensor | None]
"""weight [|I|, H] and bias [|I|], or None."""


class HeadTable:
    """The heads of one layer: weight [N, R, H] and bias [N, R] in the model's dtype, ids [N, R] (E where there is no row).

    Args:
        num_experts: E.
        slots: of the plans, slot 0 included.
        device: of the layer.
    """

    def __init__(self, num_experts: int, slots: int, device: torch.device) -> None:
        self.num_experts = num_experts
        self.place_of = torch.zeros(slots, dtype=torch.long, device=device)
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.ids = torch.full((1, 0), num_experts, device=device)
        self.weight = self.bias = torch.zeros(1, 0, 0, device=device)

    def put(self, slot: int, retained: Sequence[int], head: LayerHead, dtype: torch.dtype) -> None:
        """Give a slot its head; rounds to ``dtype``, that of the model, as a merged head would be."""
        device, (weight, bias) = self.place_of.device, head
        rows = weight.to(device, dtype)
        more = torch.zeros(len(rows), dtype=dtype, device=device) if bias is None else bias.to(device, dtype)
        self._held[slot] = (torch.tensor(list(retained), device=device), rows, more)
        self._pack()

    def drop(self, slot: int) -> None:
        """Take a slot's head away; harmless when it has none."""
        if self._held.pop(slot, None) is not None:
            self._pack()

    def logits(self, hidden: torch.Tensor, logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Return logits [T, E] in which tokens of headed slots have their head's logits for its experts.

        Args:
            hidden: [T, ≥ H], what the gate has seen; a kernel's padding may follow.
            logits: [T, E], the gate's.
            slots: [T], or [1] where all tokens share one.
        """
        if not self._held:
            return logits
        place = self.place_of.index_select(0, slots)
        weight, bias, shape = self.weight, self.bias, self.weight.shape
        hidden = hidden[:, : shape[2]].to(logits.dtype)
        if len(place) == 1:
            own = linear(hidden, weight.index_select(0, place)[0].to(logits.dtype))
        else:
            every = linear(hidden, weight.flatten(0, 1).to(logits.dtype)).view(-1, shape[0], shape[1])
            own = every.gather(1, place[:, None, None].expand(-1, 1, shape[1]))[:, 0]
        own = own + bias.index_select(0, place).to(logits.dtype)
        ids = self.ids.index_select(0, place).expand(len(logits), -1)
        # What has no row lands in a column behind the experts'.
        return pad(logits, (0, 1)).scatter(1, ids, own)[:, : self.num_experts]

    def _pack(self) -> None:
        """Lay the heads out anew; a step that runs has its own references to the old ones."""
        device = self.place_of.device
        self.place_of.zero_()
        rows = max((len(ids) for ids, _, _ in self._held.values()), default=0)
        any_rows = next((weight for _, weight, _ in self._held.values()), self.weight[0])
        self.ids = torch.full((len(self._held) + 1, rows), self.num_experts, device=device)
        self.weight = any_rows.new_zeros(len(self._held) + 1, rows, any_rows.shape[1])
        self.bias = any_rows.new_zeros(len(self._held) + 1, rows)
        for place, (slot, (ids, weight, bias)) in enumerate(self._held.items(), 1):
            count = len(ids)
            self.ids[place, :count], self.weight[place, :count], self.bias[place, :count] = ids, weight, bias
            self.place_of[slot] = place
        # The packed rows are the ones that are kept.
        self._held = {
            slot: (self.ids[place, : len(ids)], self.weight[place, : len(ids)], self.bias[place, : len(ids)])
            for place, (slot, (ids, _, _)) in enumerate(self._held.items(), 1)
        }


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
