"""How the kernels are launched: tile sizes, and which way the experts' outputs are summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Reduction = Literal["rows", "by_expert", "atomic"]
"""rows: one row per slot, then a sum in order. by_expert: one launch, experts in order, E/K times the arithmetic.
atomic: fp32 additions in whatever order; the only one whose last bits change from run to run."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One grouped product: a program computes block_n columns in steps of block_k."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Everything that may be tuned for one (|I|, H, I, top_k, dtype, device, M).

    Args:
        block_m: rows of one expert that a program handles, 16 … 256, a power of two.
        group_m: blocks of rows that walk the columns together.
        gate_up: the first product; its block_n counts gate columns, and as many up columns come with them.
        down: the second.
        reduction: see Reduction.
    """

    block_m: int
    group_m: int
    gate_up: Tile
    down: Tile
    reduction: Reduction = "rows"

    def __post_init__(self) -> None:
        sizes = {"block_m": self.block_m}
        for name, tile in (("gate_up", self.gate_up), ("down", self.down)):
            sizes |= {f"{name}.block_n": tile.block_n, f"{name}.block_k": tile.block_k}
        for name, size in sizes.items():
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} is {size}, expected a power of two of at least 16")
        if self.group_m < 1 or self.reduction not in get_args(Reduction):
            raise ValueError(
                f"group_m {self.group_m}, reduction {self.reduction!r}: expected ≥ 1, {get_args(Reduction)}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values; :meth:`from_json` reads them back."""
        return asdict(self)

    def to_ints(self) -> list[int]:
        """Return what an operator's schema can hold; :meth:`from_ints` reads it back."""
        tiles = [n for t in (self.gate_up, self.down) for n in (t.block_n, t.block_k, t.num_warps, t.num_stages)]
        return [self.block_m, self.group_m, *tiles, get_args(Reduction).index(self.reduction)]

    @classmethod
    def from_ints(cls, value: Sequence[int]) -> KernelConfig:
        """Build from what :meth:`to_ints` returned."""
        return cls(value[0], value[1], Tile(*value[2:6]), Tile(*value[6:10]), get_args(Reduction)[value[10]])

    @classmethod
    def from_json(cls, value: Any) -> KernelConfig:
        """Build from parsed JSON. Raises ValueError where a key is missing or unknown."""
        try:
            tiles = {name: _tile(value[name]) for name in ("gate_up", "down")}
            return cls(**{**value, **tiles})
        except (TypeError, KeyError) as error:
            known = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"not a kernel configuration ({error}): {value}, expected {known}") from None


def _tile(value: dict[str, int]) -> Tile:
    return Tile(**value)


def default_config(num_tokens: int, num_experts: int, top_k: int, element_bytes: int) -> KernelConfig:
    """Return a configuration from sizes alone, for shapes that nobody has tuned.

    Few rows per expert: narrow columns, so that a small |I| still gives every multiprocessor a program
    (|I| = 8 at I = 768 in tiles of 32 columns: 192), and deep pipelines, since the weights' bytes are all that
    counts. Many rows: tiles that feed the tensor cores. fp32 halves the depth, to stay within shared memory.
    """
    rows = num_tokens * top_k / max(1, min(num_experts, num_tokens * top_k))
    wide = element_bytes > 2
    if rows <= 16:
        return KernelConfig(16, 1, Tile(32, 64 if wide else 128, 4, 3), Tile(32, 64 if wide else 128, 4, 3))
    if rows <= 48:
        return KernelConfig(32, 1, Tile(64, 32 if wide else 64, 4, 3), Tile(64, 32 if wide else 64, 4, 4))
    if wide:  # products in fp32 proper run on the plain cores; on four warps they spill on sm_80
        return KernelConfig(64, 8, Tile(64, 32, 8, 3), Tile(64, 32, 8, 3))
    if rows <= 192:
        return KernelConfig(64, 8, Tile(64, 64, 4, 3), Tile(128, 64, 4, 3))
    return KernelConfig(128, 8, Tile(64, 64, 8, 3), Tile(128, 64, 8, 3))
