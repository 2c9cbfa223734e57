"""Cut checkpoints in transformers: also those whose layers differ, skip experts or map their routers.

transformers builds every layer from one config. So a model of such a cut is built with the largest counts, and
before its weights are read each layer is shrunk to its own: the reader then finds parameters of the right shapes.
What a plan adds to a router runs as a hook on it, so it stays differentiable. T tokens, K top_k, E rows of a router.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from leap_serve.architectures import Family
from leap_serve.checkpoint import Checkpoint
from leap_serve.engines.torch_subsets import MaskedRouter, moe_blocks
from leap_serve.errors import LeapError, UnsupportedError
from leap_serve.plan import LayerPlan, Plan


def load_model(checkpoint: Checkpoint, dtype: str | torch.dtype) -> Any:
    """Return a checkpoint as a transformers causal LM on the CPU; router head and adapter beside it are not merged.

    Args:
        checkpoint: a full model, or a cut of any plan but one whose layers differ in width.
        dtype: as ``from_pretrained`` takes it.

    Raises LeapError where transformers refuses it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, plan = checkpoint.folder, checkpoint.plan
    try:
        if plan is None or plan.is_uniform:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            stock = type(AutoModelForCausalLM.from_config(config))
        return _uneven(stock, checkpoint, plan).from_pretrained(folder, config=config, dtype=dtype)
    except (ValueError, OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise LeapError(folder, f"transformers refuses it ({first[:600]})", "correct the model") from error


def _uneven(stock: Any, checkpoint: Checkpoint, plan: Plan) -> Any:
    """A subclass of a transformers model whose layers hold what a plan says."""
    if len({layer.width for layer in plan.layers.values()}) > 1:
        what = "its layers differ in width, which transformers cannot hold"
        raise UnsupportedError(checkpoint.folder, what, "use --engine vllm, whose plugin does")

    def build(self: Any, config: Any, *args: Any, **more: Any) -> None:
        stock.__init__(self, config, *args, **more)
        for index, block in moe_blocks(self, checkpoint.family).items():
            layer, router = plan.layers[index], getattr(block, checkpoint.family.router)
            rows = plan.num_experts if layer.maps_router else len(layer.retained)
            _resize(router, rows)
            _resize(block.experts, len(layer.retained))
            for holder in (router, block):
                if hasattr(holder, "top_k"):
                    holder.top_k = layer.top_k
            if hasattr(block, "num_experts"):
                block.num_experts = len(layer.retained)
            router.temperature = layer.temperature
            if layer.temperature != 1.0 or layer.maps_router or layer.skip is not None:
                routing = _Routing(checkpoint.family, layer, rows)
                router.register_forward_hook(routing)
                router.after = partial(routing.after, router)

    return type(stock.__name__, (stock,), {"__init__": build, "__module__": __name__})


def _resize(module: Any, count: int) -> None:
    """Give a router or a layer's experts room for so many (dimension 0 of every parameter and buffer)."""
    for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        room = value.detach().new_empty(count, *value.shape[1:])
        setattr(module, name, torch.nn.Parameter(room) if isinstance(value, torch.nn.Parameter) else room)
    for name in ("num_experts", "n_routed_experts"):
        if hasattr(module, name):
            setattr(module, name, count)


class _Routing:
    """A forward hook on a cut's router: what its plan says beyond the experts' number and top_k."""

    def __init__(self, family: Family, layer: LayerPlan, rows: int) -> None:
        self.family, self.layer = family, layer
        self.masked = MaskedRouter(family)
        self.masked.rows = [LayerPlan(tuple(range(rows)), layer.top_k, layer.temperature)]
        self.map = torch.tensor(layer.merge.matrix(rows), device="cpu") if layer.merge and layer.maps_router else None

    def __call__(self, router: Any, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return what the router's own output becomes: (logits, weights [T, K], ids [T, K]), of Llama 4 (scores, logits)."""
        merge = self.layer.merge
        if self.map is not None and merge is not None and merge.applied == "probabilities":
            return self._skipped(router, self._mapped(router, output, self.map))
        return self.after(router, self.masked(router, args, output))

    def after(self, router: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What comes after a choice among the router's rows, whoever made it: the map of ids, and skipping."""
        if self.map is not None:
            output = _renumbered(output, self.map.to(output[0].device))
        return self._skipped(router, output)

    def _mapped(self, router: Any, output: tuple[torch.Tensor, ...], matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Choose by softmax(z/τ)·W_RMᵀ (EEP)."""
        values = (output[0].float() / self.layer.temperature).softmax(-1) @ matrix.to(output[0].device).T
        weights, ids = values.topk(router.top_k, -1)
        if self.family.sums_to_one(router):
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * getattr(router, "routed_scaling_factor", 1.0)
        return output[0], weights.to(output[1].dtype), ids

    def _skipped(self, router: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Make the weights below β times the token's highest 0, the others of the same sum iff they are normalised (NAEE)."""
        if self.layer.skip is None:
            return output
        llama = len(output) == 2  # scores [T, E], 0 where an expert is not chosen, never normalised
        weights = output[0] if llama else output[1]
        left = weights.masked_fill(weights < self.layer.skip * weights.amax(-1, keepdim=True), 0.0)
        if llama:
            return left, output[1]
        if self.family.sums_to_one(router):
            left = left * (weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True))
        return output[0], left, output[2]


def _renumbered(output: tuple[torch.Tensor, ...], matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Replace each chosen expert by the slot that it was merged into (HC-SMoE)."""
    if len(output) == 2:  # Llama 4: scores [T, E], of which one is not 0
        return output[0] @ matrix.T.to(output[0].dtype), output[1]
    return output[0], output[1], matrix.argmax(0)[output[2]]
