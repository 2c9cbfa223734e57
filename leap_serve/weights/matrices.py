"""The gate, up and down matrix of every expert, whichever way a family lays them on disk; read one at a time.

[out, in] is a matrix as a linear layer applies it: gate and up [I, H], down [H, I]. A family either stores each as a
tensor of its own, or all experts of a layer as ``gate_up_proj`` [E, H, 2·I], gate before up, and ``down_proj`` [E, I, H].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from leap_serve.architectures import Family, Role
from leap_serve.weights.overlays import part_of, part_of_expert
from leap_serve.weights.tensorfile import TensorEntry

if TYPE_CHECKING:
    from leap_serve.checkpoint import Checkpoint

Array = npt.NDArray[Any]
Which = Literal["gate", "up", "down"]
DTYPES: Mapping[str, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""safetensors dtype → how numpy reads it; BF16 is the upper half of a float32."""


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """One expert's matrix: a tensor, or of a fused tensor [E, in, out] the expert's block and in it a range of ``out``."""

    layer: int
    expert: int
    part: Which
    entry: TensorEntry
    columns: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        if self.columns is None:
            return self.entry.shape[0], self.entry.shape[1]
        return self.columns[1] - self.columns[0], self.entry.shape[1]

    def read(self) -> Array:
        """Return the matrix [out, in] in float32."""
        if self.columns is None:
            return values(self.entry)
        return _floats(raw(self.entry)[self.expert][:, slice(*self.columns)], self.entry.dtype).T


def expert_matrices(checkpoint: Checkpoint) -> Iterator[ExpertMatrix]:
    """Return every expert's matrices, in the order of the checkpoint's tensors; nothing for what has none (has_matrices)."""
    for name, entry in checkpoint.tensors.items():
        role = checkpoint.role(name)
        part = part_of_expert(role)
        if part is not None:
            yield ExpertMatrix(role.layer, role.expert, part, entry)
        elif (fused := part_of(role, name)) is not None and has_matrices(checkpoint.family, role, name):
            experts, _, out = entry.shape
            halves: dict[Which, tuple[int, int]] = {"down": (0, out)}
            if fused.parameter == "gate_up_proj":
                halves = {"gate": (0, out // 2), "up": (out // 2, out)}
            for expert in range(experts):
                for half, columns in halves.items():
                    yield ExpertMatrix(role.layer, expert, half, entry, columns)


def has_matrices(family: Family, role: Role, name: str) -> bool:
    """Whether a tensor of experts consists of matrices that expert_matrices finds; scales, biases and mixed halves do not."""
    return part_of_expert(role) is not None or (
        family.fused_halves and role.kind == "fused" and part_of(role, name) is not None
    )


def values(entry: TensorEntry, row: int | None = None) -> Array:
    """Read a tensor, or one index of its dimension 0, as float32."""
    return _floats(raw(entry) if row is None else raw(entry)[row], entry.dtype)


def raw(entry: TensorEntry) -> Array:
    """Map a tensor as it lies in its file; bfloat16 as uint16."""
    return np.memmap(entry.file, np.dtype(DTYPES[entry.dtype]), "r", entry.begin, entry.shape)


def _floats(found: Array, dtype: str) -> Array:
    return (found.astype("<u4") << 16).view("<f4") if dtype == "BF16" else found.astype("<f4")
