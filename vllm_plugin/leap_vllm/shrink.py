"""A plan applied to a running vLLM model: its layers become physically smaller, and whole again, without a reload.

Every expert parameter [E, …] of a layer is replaced by its retained rows [|I|, …], and its router gets
the retained columns of the logits. The full tensors are kept aside, so that nothing is read again and
the return is bit-exact. The gate itself still computes E logits: it is tiny beside one expert, and in
vLLM's CPU build its weight is packed out of sight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from leap_serve.errors import LeapError
from leap_vllm import compat, compat_runners
from leap_vllm.subsets import PlainPlan


class Shrunk:
    """A model under one plan, from construction to :meth:`restore`. Raises UnsupportedError before it touches anything."""

    def __init__(self, runner: Any, plan: PlainPlan) -> None:
        compat_runners.check_runner(runner)
        layers = compat.moe_layers(runner.get_model())
        if set(plan) != set(layers):
            raise LeapError(
                "plan", f"plans layers {sorted(plan)}, vLLM runs {sorted(layers)} here",
                "plan every MoE layer; pipeline parallelism is not supported",
            )  # fmt: skip
        for layer, found in layers.items():
            compat.choosing(f"layer {layer}", found)
            compat.check_shrinkable(f"layer {layer}", found)
        self._undo: list[Callable[[], None]] = []
        try:
            for layer, found in layers.items():
                self._shrink(found, *plan[layer])
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put the full tensors, the counts and the routers back."""
        while self._undo:
            self._undo.pop()()

    def _shrink(self, found: Any, retained: Any, top_k: int, temperature: float) -> None:
        router, experts = found.router, found.routed_experts
        ids = torch.tensor(list(retained), device=next(experts.parameters()).device)
        # A correction bias may or may not be registered as a parameter of the experts.
        rows = {id(tensor): tensor for tensor in (*experts.parameters(), compat.choosing("", found).bias)}
        for tensor in rows.values():
            if tensor is not None:
                # The objects stay, since kernels and routers refer to them.
                self._undo.append(partial(setattr, tensor, "data", tensor.data))
                tensor.data = tensor.data.index_select(0, ids)
        for owner, name, value in compat.sizes_of(found, len(ids), top_k):
            self._undo.append(partial(setattr, owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        stock = router._compute_routing

        def compute_routing(hidden_states: Any, router_logits: torch.Tensor, indices_type: Any, **more: Any) -> Any:
            left = router_logits.index_select(1, ids)
            left = left if temperature == 1.0 else left.float() / temperature
            return stock(hidden_states, left, indices_type, **more)

        self._undo.append(compat.replace_method(router, "_compute_routing", compute_routing))
