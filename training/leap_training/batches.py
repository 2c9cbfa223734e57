"""Items to padded tensors, the loss on their answers, and experts as batched products."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from leap_serve.encoding import encode_items
from leap_serve.tasks.base import Item


class Batch(NamedTuple):
    """Token ids, next-token weights and padding mask, each [B, S]."""

    ids: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor

    def to(self, device: Any) -> Batch:
        """The same batch on a device."""
        return Batch(self.ids.to(device), self.weights.to(device), self.mask.to(device))


def collate(tokenizer: Any, items: Sequence[Item], prompt_weight: float) -> Batch:
    """Encode prompt and answer as the engines do, end with the end-of-text token, pad on the right.

    Answer tokens weigh 1 in the loss, prompt tokens ``prompt_weight``, padding 0.
    """
    encoded = encode_items(tokenizer, items)
    end = tokenizer.eos_token_id
    length = max(len(one.prompt) + len(one.answer) + 1 for one in encoded)
    ids = torch.full((len(items), length), end)
    weights = torch.zeros(len(items), length)
    mask = torch.zeros(len(items), length, dtype=torch.long)
    for row, one in enumerate(encoded):
        whole = len(one.prompt) + len(one.answer) + 1
        ids[row, : whole - 1] = torch.tensor(one.prompt + one.answer)
        weights[row, : len(one.prompt)] = prompt_weight
        weights[row, len(one.prompt) : whole] = 1.0
        mask[row, :whole] = 1
    return Batch(ids, weights, mask)


def token_losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Next-token cross-entropy of logits [B, S, V] at every position but the last, [B, S − 1], in nats."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), batch.ids[:, 1:], reduction="none")


def weighted_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean next-token cross-entropy of logits [B, S, V] under the batch's weights, in nats."""
    wanted = batch.weights[:, 1:]
    return (token_losses(logits, batch) * wanted).sum() / wanted.sum()


def padded_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the experts as batched products over [E, C, H], C the largest load, instead of a loop over E.

    Shapes: hidden_states [T, H], top_k_index and top_k_weights [T, K]; returns [T, H].
    """
    order, place, capacity = _places(top_k_index, self.num_experts)
    source = order // top_k_index.shape[1]
    padded = hidden_states.new_zeros(self.num_experts * capacity, hidden_states.shape[-1])
    padded = padded.index_copy(0, place, hidden_states[source]).view(self.num_experts, capacity, -1)
    gate, up = torch.bmm(padded, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    out = torch.bmm(torch.nn.functional.silu(gate) * up, self.down_proj.transpose(1, 2)).flatten(0, 1)[place]
    weighted = out * top_k_weights.reshape(-1)[order, None]
    return torch.zeros_like(hidden_states).index_add(0, source, weighted.to(hidden_states.dtype))


def _places(chosen: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Where the choices [T, K] lie in a padded [E·C]: the choices in order of experts, a place for each, and C."""
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)
    expert = flat[order]
    slot = torch.arange(flat.numel(), device=flat.device) - (counts.cumsum(0) - counts)[expert]
    capacity = int(counts.max())
    return order, expert * capacity + slot, capacity


def routed_llama4(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' Llama4TextMoe computes, without its products of zeros: all E experts on all T tokens.

    An expert that is not chosen gets the input 0 and so returns 0; here only chosen experts run, in batches.
    Shapes: hidden_states [..., H]; returns [T, H] and the router logits [T, E].
    """
    x = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(x)
    weights, chosen = scores.topk(self.top_k, -1)
    order, place, capacity = _places(chosen, self.num_experts)
    source = order // self.top_k
    inputs = x[source] * weights.reshape(-1)[order, None]
    padded = x.new_zeros(self.num_experts * capacity, self.hidden_dim).index_copy(0, place, inputs)
    out = self.experts(padded)[place]
    return self.shared_expert(x).index_add(0, source, out), logits


def use_padded_experts(model: Any) -> None:
    """Make a transformers MoE model compute its chosen experts in batches.

    Takes models with [E, 2I, H] and [E, H, I] expert weights, and Llama 4's text model.
    """
    if model.config.model_type == "llama4_text":
        for block in model.modules():
            if hasattr(block, "shared_expert") and hasattr(block, "router"):
                block.forward = MethodType(routed_llama4, block)
        return
    ALL_EXPERTS_FUNCTIONS.register("leap_padded", padded_experts)
    model.set_experts_implementation("leap_padded")


def use_fast_experts(model: Any) -> None:
    """On a CPU compute experts in batches where their form allows it; a GPU has its own grouped products."""
    experts = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    plain = all(
        isinstance(getattr(module, "act_fn", None), (torch.nn.SiLU, SiLUActivation))
        and not getattr(module, "is_transposed", True)
        and not getattr(module, "has_bias", True)
        and module.gate_up_proj.dim() == 3
        for module in experts
    )
    if experts and plain and model.device.type == "cpu":
        use_padded_experts(model)
