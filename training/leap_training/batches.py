"""Items to padded tensors, the loss on their answers, and Llama 4's experts as grouped products."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch

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


def grouped_experts(self: Any, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Llama 4's experts on rows [T·K, H] that stand in order of their experts; ``ends`` [E] int32 says where each one's end."""
    gate, up = torch.nn.functional.grouped_mm(rows, self.gate_up_proj, offs=ends).chunk(2, dim=-1)
    return torch.nn.functional.grouped_mm(up * self.act_fn(gate), self.down_proj, offs=ends)


def routed_llama4(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' Llama4TextMoe computes, without its products of zeros: all E experts on all T tokens.

    An expert that is not chosen gets the input 0 and so returns 0; here only chosen experts run.
    Shapes: hidden_states [..., H]; returns [T, H] and the router logits [T, E].
    """
    x = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(x)
    weights, chosen = scores.topk(self.top_k, -1)
    order = chosen.flatten().argsort(stable=True)
    ends = torch.bincount(chosen.flatten(), minlength=self.num_experts).cumsum(0).int()
    source = order // self.top_k
    out = self.experts(x[source] * weights.flatten()[order, None], ends)
    return self.shared_expert(x).index_add(0, source, out), logits


def use_fast_experts(model: Any) -> None:
    """Make a transformers model compute only the experts that were chosen; all but Llama 4's text model do so by themselves."""
    if model.config.model_type != "llama4_text":
        return
    for block in model.modules():
        if hasattr(block, "shared_expert") and hasattr(block, "router"):
            block.forward = MethodType(routed_llama4, block)
            block.experts.forward = MethodType(grouped_experts, block.experts)
