"""Oracles of layer-wise methods: MoE blocks of transformers that are really cut, and what they put out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from leap_serve.checkpoint import Checkpoint
from leap_serve.tasks.base import Item
from leap_training.methods.blocks import BlockModel
from tiny_tokenizer import talking_copy

ITEMS = [Item(str(n), f"What is {n} and {n * n % 7}?", f" It is {n * 31 % 97}.") for n in range(3)]


def open_model(get: Callable[[str], Path], family: str, tmp_path: Path) -> BlockModel:
    return BlockModel(Checkpoint.open(talking_copy(get(family), tmp_path / family)))


def cut_block(model: BlockModel, layer: int, ids: Sequence[int]) -> Any:
    """The block with every row per expert sliced, as a cut has it: routing and experts are transformers' own."""
    block = copy.deepcopy(model.layers[layer].block)
    router, rows = getattr(block, model.family.router), list(ids)
    for part in (router, block.experts):
        for tensor in [*part.parameters(), *part.buffers()]:
            tensor.data = tensor.data[rows].contiguous()
    for part in (router, block.experts, block):
        for name in ("num_experts", "n_routed_experts", "out_features"):
            if hasattr(part, name):
                setattr(part, name, len(rows))
    return block


def output_of(block: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = block(x[None])
    return (y[0] if isinstance(y, tuple) else y).reshape(x.shape).double()
