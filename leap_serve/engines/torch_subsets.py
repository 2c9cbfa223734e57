"""Routers of transformers behind masks, every batch row under its own plan: the reference for scoring plans.

T = B·S tokens of B rows, E experts of a layer, K the model's top_k. Dropped experts get the logit −inf,
what is left is divided by τ, and slots beyond the plan's own top_k weigh nothing (methods: §5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from leap_serve.architectures import Family
from leap_serve.errors import UnsupportedError
from leap_serve.plan import LayerPlan, Plan


class MaskedRouter:
    """A forward hook on one router; ``rows`` must hold the layer's plan of every batch row before a forward pass."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.rows: Sequence[LayerPlan] = ()

    def __call__(self, router: Any, _args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Replace what the router chose: (logits, weights [T, K], ids [T, K]), of Llama-4 (scores [T, E], logits)."""
        llama = self.family.router_kind == "sigmoid"
        z = output[1] if llama else output[0]
        keep, temperature, top_k = self._tables(z.shape[1], z.device)
        each = z.shape[0] // len(self.rows)
        keep, temperature, top_k = (t.repeat_interleave(each, 0) for t in (keep, temperature, top_k))
        masked = (z.float() / temperature[:, None]).masked_fill(~keep, float("-inf"))
        # Experts that the plan leaves: −inf elsewhere. Ranks at or beyond the plan's top_k weigh nothing.
        choice = self._choice(router, masked)
        values, ids = choice.topk(router.top_k, -1)
        surplus = (torch.arange(router.top_k, device=z.device) >= top_k[:, None]) | values.isinf()
        if llama:
            weights = masked.gather(1, ids).sigmoid().masked_fill(surplus, 0.0)
            return torch.zeros_like(z).scatter_(1, ids, weights.to(z.dtype)), z
        if self.family.router_kind == "sigmoid-bias":
            weights = masked.sigmoid().gather(1, ids)
        else:
            # Softmax over all that are retained; renormalised it equals the softmax over the chosen (GPT-OSS).
            weights = masked.softmax(-1).gather(1, ids)
        weights = weights.masked_fill(surplus, 0.0)
        if self.family.sums_to_one(router):
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * getattr(router, "routed_scaling_factor", 1.0)
        return output[0], weights.to(output[1].dtype), ids

    def _choice(self, router: Any, masked: torch.Tensor) -> torch.Tensor:
        """Return what the top-k is taken of, [T, E]: the logits, or σ + bias within the best groups."""
        if self.family.router_kind != "sigmoid-bias":
            return masked
        choice = (masked.sigmoid() + router.e_score_correction_bias).masked_fill(masked.isinf(), float("-inf"))
        if router.num_group == 1:
            return choice
        grouped = choice.unflatten(1, (router.num_group, -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(router.topk_group, -1).indices
        allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=masked.device).scatter_(1, best, True)
        return grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)

    def _tables(self, experts: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keep [B, E], τ [B] and top_k [B] of the rows."""
        keep = torch.zeros(len(self.rows), experts, dtype=torch.bool)
        for row, plan in enumerate(self.rows):
            keep[row, list(plan.retained)] = True
        temperature = torch.tensor([plan.temperature for plan in self.rows])
        top_k = torch.tensor([plan.top_k for plan in self.rows])
        return keep.to(device), temperature.to(device), top_k.to(device)


class MaskedRouters:
    """All masked routers of a model, by layer."""

    def __init__(self) -> None:
        self.layers: dict[int, MaskedRouter] = {}

    def assign(self, plans: Sequence[Plan]) -> None:
        """Say under which plan each row of the next batch runs."""
        for layer, router in self.layers.items():
            router.rows = [plan.layers[layer] for plan in plans]


@contextmanager
def masked_routers(model: torch.nn.Module, family: Family) -> Iterator[MaskedRouters]:
    """Hook every router of a transformers model; the hooks are off again at the end."""
    found, handles = MaskedRouters(), []
    try:
        for layer, block in moe_blocks(model, family).items():
            found.layers[layer] = MaskedRouter(family)
            handles.append(getattr(block, family.router).register_forward_hook(found.layers[layer]))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def moe_blocks(model: torch.nn.Module, family: Family) -> dict[int, Any]:
    """Return the modules that hold a router and experts, by layer; UnsupportedError where there are none."""
    found = {
        int(name.split("layers.")[-1].split(".")[0]): block
        for name, block in model.named_modules()
        if hasattr(block, "experts") and hasattr(block, family.router)
    }
    if not found:
        raise UnsupportedError(type(model).__name__, "has no router that can be masked", "load a MoE model")
    return found


class Shrunk:
    """A transformers model under one plan, from construction to :meth:`restore`.

    Every expert parameter [E, …] holds its retained rows only, and the masked router's choice is renumbered to
    them and cut to the plan's top_k: the router itself still computes E logits. The full tensors stay aside.
    """

    def __init__(self, model: torch.nn.Module, family: Family, plan: Plan) -> None:
        self._family = family
        self._undo: list[Callable[[], None]] = []
        for layer, block in moe_blocks(model, family).items():
            self._shrink(block, plan.layers[layer])

    def restore(self) -> None:
        """Put the full tensors, the counts and the routers back."""
        while self._undo:
            self._undo.pop()()

    def _shrink(self, block: Any, layer: LayerPlan) -> None:
        router, experts = getattr(block, self._family.router), block.experts
        ids = torch.tensor(layer.retained, device=router.weight.device)
        masked = MaskedRouter(self._family)
        masked.rows = [layer]
        renumber = torch.zeros(router.weight.shape[0], dtype=torch.long, device=ids.device)
        renumber[ids] = torch.arange(len(ids), device=ids.device)

        def choose(module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            first, second, *chosen = masked(module, args, output)
            if not chosen:  # Llama-4: scores [T, E], logits
                return first.index_select(1, ids), second
            return first, second[:, : layer.top_k], renumber[chosen[0][:, : layer.top_k]]

        self._undo.append(router.register_forward_hook(choose).remove)
        for tensor in experts.parameters():
            self._undo.append(partial(setattr, tensor, "data", tensor.data))
            tensor.data = tensor.data.index_select(0, ids)
        self._undo.append(partial(setattr, experts, "num_experts", experts.num_experts))
        experts.num_experts = len(ids)
