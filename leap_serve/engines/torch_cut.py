"""Cut checkpoints in transformers: also those whose layers differ in experts, top_k or router temperature.

transformers builds every layer from one config. So a model of an uneven cut is built with the largest counts, and
before its weights are read each layer is shrunk to its own: the reader then finds parameters of the right shapes.
"""

from __future__ import annotations

from typing import Any

import torch

from leap_serve.checkpoint import Checkpoint
from leap_serve.engines.torch_subsets import MaskedRouter, moe_blocks
from leap_serve.errors import LeapError, UnsupportedError
from leap_serve.plan import LayerPlan, Plan


def load_model(checkpoint: Checkpoint, dtype: str | torch.dtype) -> Any:
    """Return a checkpoint as a transformers causal LM on the CPU; router head and adapter beside it are not merged.

    Args:
        checkpoint: a full model, or a cut, even or uneven.
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
    layers = plan.layers.values()
    if len({layer.width for layer in layers}) > 1 or any(one.skip is not None or one.maps_router for one in layers):
        what = "its layers differ in width, skip experts or map their routers, which transformers cannot hold"
        raise UnsupportedError(checkpoint.folder, what, "use --engine vllm, whose plugin does")

    def build(self: Any, config: Any, *args: Any, **more: Any) -> None:
        stock.__init__(self, config, *args, **more)
        for layer, block in moe_blocks(self, checkpoint.family).items():
            _shrink(getattr(block, checkpoint.family.router), block.experts, plan.layers[layer])
            _temper(getattr(block, checkpoint.family.router), MaskedRouter(checkpoint.family), plan.layers[layer])

    return type(stock.__name__, (stock,), {"__init__": build, "__module__": __name__})


def _shrink(router: Any, experts: Any, layer: LayerPlan) -> None:
    """Give a layer's router and experts room for its own |I| (dimension 0), and the router its own top_k."""
    count = len(layer.retained)
    for module in (router, experts):
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            room = value.detach().new_empty(count, *value.shape[1:])
            setattr(module, name, torch.nn.Parameter(room) if isinstance(value, torch.nn.Parameter) else room)
        for name in ("num_experts", "n_routed_experts"):
            if hasattr(module, name):
                setattr(module, name, count)
    router.top_k = layer.top_k


def _temper(router: Any, masked: MaskedRouter, layer: LayerPlan) -> None:
    """Divide a router's logits by τ, all its experts retained; ``router.temperature`` says by what."""
    router.temperature = layer.temperature
    if layer.temperature != 1.0:
        masked.rows = [LayerPlan(tuple(range(len(layer.retained))), layer.top_k, layer.temperature)]
        router.register_forward_hook(masked)
