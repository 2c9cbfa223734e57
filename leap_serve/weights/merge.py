"""Router head and adapter merged into the weights of a cut, one tensor at a time.

The sum is computed in fp32 and rounded once: by the plugin to the dtype that is served, by ``leap export`` to
that of the checkpoint. So a bf16 checkpoint served in fp32 loses nothing of ΔW, and served in bf16 it answers
as its export does; what a step of bf16's 8 bits cannot hold of ΔW is then lost.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from leap_serve.weights.overlays import Factors, Part, part_of, read_factors, router_rows

if TYPE_CHECKING:
    from leap_serve.checkpoint import Checkpoint
    from leap_serve.weights.tensorfile import TensorEntry

_KEPT = 4
"""Pairs of factors in memory: shards list a layer's experts together, but not parameter by parameter."""


class Merge:
    """What the overlays of a checked cut make of its tensors; holds only a few factors in memory.

    Args:
        checkpoint: one that check_cut let through.
        adapter: False leaves the adapter out (``leap serve --unmerged``).
    """

    def __init__(self, checkpoint: Checkpoint, adapter: bool = True) -> None:
        self._rows = router_rows(checkpoint)
        factors = read_factors(checkpoint) if adapter else {}
        self._parts: dict[str, Part] = {}
        for name in checkpoint.tensors if factors else ():
            part = part_of(checkpoint.role(name), name)
            if part is not None and (part.layer, part.parameter) in factors:
                self._parts[name] = part
        self._factors = factors
        self._load = lru_cache(maxsize=_KEPT)(_load)

    @property
    def names(self) -> set[str]:
        """Tensors of the checkpoint that the overlays change."""
        return self._rows.keys() | self._parts.keys()

    @property
    def head_names(self) -> set[str]:
        """Tensors of router_head.safetensors."""
        return {entry.name for entry in self._rows.values()}

    def merged(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor of the checkpoint as the overlays make it: a new one, or the same if they leave it alone.

        A new one has the shape and device of ``tensor``, and ``dtype`` (None: its dtype too). ``tensor`` may be a
        view of a file and is never written to.
        """
        dtype = dtype or tensor.dtype
        row = self._rows.get(name)
        if row is not None:
            return _read(row).to(tensor.device, dtype)
        part = self._parts.get(name)
        if part is None:
            return tensor
        factors = self._factors[part.layer, part.parameter]
        if part.expert is not None:
            half = part.half if part.parameter == "gate_up_proj" else None
            return self._sum(factors, part.expert, tensor, half).to(dtype)
        out = torch.empty_like(tensor, dtype=dtype)
        for expert in range(factors.experts):  # one expert's sum at a time
            out[expert] = self._sum(factors, expert, tensor[expert])
        return out

    def _sum(self, factors: Factors, expert: int, tensor: torch.Tensor, half: int | None = None) -> torch.Tensor:
        """Return W + ΔW of one expert in fp32; ``tensor`` is its [d1, d2], or that half of d1."""
        a, b = self._load(factors, tensor.device)
        left, right = b[:, :, expert], a[expert]
        if half is not None:
            left = left.chunk(2)[half]
        if factors.transposed:
            left, right = right.T, left.T
        return torch.addmm(tensor.float(), left, right, alpha=factors.scaling)


def _load(factors: Factors, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [E, r, in] and B [out, r, E] in fp32."""
    a, b = _read(factors.a).to(device, torch.float32), _read(factors.b).to(device, torch.float32)
    return a.reshape(factors.experts, factors.rank, -1), b.reshape(-1, factors.rank, factors.experts)


def _read(entry: TensorEntry) -> torch.Tensor:
    with safe_open(entry.file, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(entry.name)
        return tensor
