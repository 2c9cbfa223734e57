"""Random layers of one shape on one device, to time contenders on: weights rotate, so that no cache keeps them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from leap_kernels.config import KernelConfig
from leap_kernels.fused_moe import fused_moe
from leap_kernels.timing import Layer, median_us
from leap_kernels.tuning import Measure, Prepare, Shape

ROTATED_BYTES = 2**29
"""Weights read in one round, about: several times the L2 of any GPU (60 MB on an H200, 126 MB on a B200)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a layer gets from its router: x [T, H], ids int32 and weights fp32 [T, K].

    ``expert_map`` [experts of all ranks] int32: global id → local id or −1, where ranks share the experts.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    expert_map: torch.Tensor | None = None

    def local(self) -> torch.Tensor:
        """Of each slot that this rank computes its local expert, [≤ T·K]."""
        found = self.ids.flatten() if self.expert_map is None else self.expert_map[self.ids.flatten().long()]
        return found[found >= 0]

    def distinct(self) -> int:
        """Experts here that at least one token chose."""
        return len(self.local().unique())


class Workbench:
    """Sets of weights w13 [E, 2·I, H] and w2 [E, H, I], N(0, 1/fan-in)."""

    def __init__(self, shape: Shape, device: torch.device, rotated_bytes: int = ROTATED_BYTES) -> None:
        self.shape, self.device = shape, device
        self.dtype: torch.dtype = getattr(torch, shape.dtype)
        self.expert_bytes = 3 * shape.hidden * shape.width * self.dtype.itemsize
        # A single token reads top_k experts of a set (of all ranks) and no others: those must outgrow the cache.
        active = math.ceil(min(shape.top_k, shape.experts * shape.ranks) / shape.ranks)
        sets = max(2, round(rotated_bytes / (self.expert_bytes * active)))
        torch.manual_seed(0)
        self.w13 = [self._random(2 * shape.width, shape.hidden) for _ in range(sets)]
        self.w2 = [self._random(shape.hidden, shape.width) for _ in range(sets)]

    def _random(self, rows: int, columns: int) -> torch.Tensor:
        weights = torch.empty(self.shape.experts, rows, columns, dtype=self.dtype, device=self.device)
        return weights.normal_(std=columns**-0.5)

    def batch(self, tokens: int, seed: int = 0) -> Batch:
        """Random tokens, routed uniformly: the hardest case for memory.

        Where ranks share the experts, this is the rank with most to do, for which the others wait.
        """
        torch.manual_seed(seed)
        here, ranks, top_k = self.shape.experts, self.shape.ranks, self.shape.top_k
        x = torch.randn(tokens, self.shape.hidden, device=self.device).to(self.dtype)
        # Ranks may hold one expert fewer than this one, never so few that top_k cannot be chosen.
        everywhere = here if ranks == 1 else max(here * ranks, top_k)
        scores = torch.randn(tokens, everywhere, device=self.device)
        weights, ids = torch.softmax(scores, dim=1).topk(top_k)
        expert_map = None
        if ranks > 1:
            busiest = int((ids[ids < here * ranks] // here).bincount().argmax())
            expert_map = torch.full((everywhere,), -1, dtype=torch.int32, device=self.device)
            expert_map[busiest * here : (busiest + 1) * here] = torch.arange(here, device=self.device)
        return Batch(x, ids.to(torch.int32), weights / weights.sum(1, keepdim=True), expert_map)

    def ours(self, batch: Batch, config: KernelConfig | None = None) -> Layer:
        """Our kernel on a batch."""

        def run(index: int) -> object:
            return fused_moe(
                batch.x, self.w13[index], self.w2[index], topk_ids=batch.ids, topk_weights=batch.weights,
                expert_map=batch.expert_map, config=config,
            )  # fmt: skip

        return run

    def bytes_read(self, batch: Batch) -> int:
        """What any kernel must move at least: the chosen experts' weights once, x in and the result out."""
        return batch.distinct() * self.expert_bytes + 2 * batch.x.numel() * self.dtype.itemsize

    def flops(self, batch: Batch) -> int:
        """Multiplications and additions of the layer."""
        return 6 * batch.local().numel() * self.shape.hidden * self.shape.width

    def prepare(self, batch: Batch) -> Prepare:
        """Return what compiles configurations of ours for a batch on all cores at once; Triton keeps the results."""

        def compile_one(config: KernelConfig) -> None:
            # One that does not fit is found again, and counted as infinitely slow, when it is measured.
            with contextlib.suppress(OutOfResources, PTXASError, CompilationError):
                self.ours(batch, config)(0)

        def compile_all(configs: Sequence[KernelConfig]) -> None:
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
                list(pool.map(compile_one, configs))

        return compile_all

    def measure(self, batch: Batch, rounds: int = 5) -> Measure:
        """Return what times a configuration of ours on a batch; infinity for one that does not fit the chip."""
        return lambda config: guarded_us(lambda: self.ours(batch, config), len(self.w13), rounds, self.device)


def guarded_us(make: Callable[[], Layer], sets: int, rounds: int, device: torch.device) -> float:
    """Return the median µs of a layer, or infinity if Triton finds that it needs more than the chip has."""
    try:
        return median_us(make(), sets, rounds, device)
    except (OutOfResources, PTXASError, CompilationError):
        return math.inf
