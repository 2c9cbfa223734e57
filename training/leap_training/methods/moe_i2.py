"""MoE-I²: how many experts each layer loses from its importance, which ones by a genetic search and real blocks.

Paper: Yang et al. 2024, «MoE-I²: Compressing Mixture of Experts Models through Inter-Expert Pruning and Intra-Expert
Low-Rank Decomposition». Layer importance: I_{l,e} = ‖F(X) − F_{−e}(X)‖_F, I_l = Σ_e I_{l,e}; the number of experts
pruned n_l ∝ 1/I_l. A genetic search per layer for the pruned set with the least ‖F'(X) − F(X)‖_F: population 100, 50
generations, a child is n_l experts drawn from the union of its parents' sets. The best 3 sets per layer stay, and of
every 3 consecutive layers all 27 combinations run through the real decoder blocks. Intra-expert rank: R_{l,e} =
⌊(I_{l,e} + ε)^α / Σ (I + ε)^α · R_a·M'_l⌋, α = 0.15, by truncated singular value decomposition.

Ours: n_l is clamped to E − top_k and rounded by largest remainder, so that the counts sum to the budget; parents are
the better half; 3 of 10 children swap one expert more; the layers before a group of three are whole while its
combinations are compared. Errors are those of the router cut to the kept experts, from NAEE's Gram matrices. The ranks'
matrices are multiplied back to dense for serving: that saves neither memory nor time, and the plan says so.

Cost: the forward passes of NAEE, twice the experts' outputs; E subsets per layer for the importance, then at most
population + generations × population / 2; per item and group one sequence through the layers before it and 28
through its own. Memory: one layer's Gram
matrices, T·E²·8 bytes. No gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from leap_serve.checkpoint import Checkpoint, width_of
from leap_serve.cut.rules import unfit_expert
from leap_serve.engine import Progress
from leap_serve.errors import UnsupportedError, UsageError
from leap_serve.plan import LayerPlan, Plan
from leap_serve.provenance import made_by
from leap_serve.weights.matrices import DTYPES
from leap_serve.weights.overlays import part_of_expert
from leap_training.methods.blocks import BlockModel, LayerResults
from leap_training.methods.naee import AT_ONCE, LayerData, check_temperatures
from leap_training.pruning_space import PruningSpace

Subset = tuple[int, ...]
"""Retained experts of a layer, increasing."""
Losses = Callable[[Sequence[Subset]], Sequence[float]]
GROUP = 3
"""Consecutive layers whose candidates are combined."""
CANDIDATES = 3
"""Sets of a layer that are combined."""
ALPHA, EPSILON = 0.15, 1e-6


@dataclass(frozen=True, slots=True)
class MoeI2Config:
    """Settings of the genetic search and of the low-rank option.

    Args:
        population, generations: as in the paper.
        rank: R_a, the average rank of the retained experts' matrices; None: full rank.
        seed: of what is drawn.
    """

    population: int = 100
    generations: int = 50
    rank: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError on the first setting that cannot be carried out."""
        if self.rank is not None and self.rank < 1:
            raise UsageError("--rank", f"is {self.rank}", "give 1 or more")


def check_rank(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedError where the cut could not truncate the experts; to be asked before a model is loaded."""
    if unfit := unfit_expert(
        checkpoint, lambda role, entry: entry.dtype in DTYPES and part_of_expert(role) is not None
    ):
        raise UnsupportedError(
            "--rank", f"truncates an unquantised gate, up and down matrix of every expert; {unfit} is none",
            "leave it out: whole experts are chosen all the same",
        )  # fmt: skip


def comes_even(space: PruningSpace) -> bool:
    """Whether all layers retain equally many whatever their importance is: one layer, all experts, or none to spare."""
    everything = space.routing.num_experts * len(space.layers)
    at_floor = space.budget == sum(space.top_k) and len(set(space.top_k)) == 1
    return len(space.layers) == 1 or space.budget == everything or at_floor


def pruned_counts(importance: Sequence[float], total: int, most: Sequence[int]) -> tuple[int, ...]:
    """Return n_l ∝ 1/I_l, 0 ≤ n_l ≤ most_l, that sum to ``total`` exactly (largest remainder).

    Raises UsageError where the layers cannot lose so many.
    """
    if not 0 <= total <= sum(most):
        raise UsageError("--budget", f"drops {total} experts, the layers' top_k allow {sum(most)}", "keep more")
    least = max(max(importance), 1e-300) * 1e-9
    worth = [1.0 / max(value, least) for value in importance]
    shares = [0.0] * len(worth)
    free = set(range(len(worth)))
    left = float(total)
    while free:
        scale = left / sum(worth[i] for i in free)
        full = {i for i in free if worth[i] * scale > most[i]}
        if not full:
            for i in free:
                shares[i] = worth[i] * scale
            break
        for i in full:
            shares[i] = float(most[i])
            left -= most[i]
        free -= full
    counts = [min(math.floor(share + 1e-9), cap) for share, cap in zip(shares, most, strict=True)]
    order = sorted(range(len(counts)), key=lambda i: (counts[i] - shares[i], i))
    for i in itertools.cycle(order):
        if sum(counts) == total:
            return tuple(counts)
        counts[i] += counts[i] < most[i]
    raise AssertionError("unreachable: there is at least one layer")


def genetic(
    losses: Losses, experts: int, keep: int, config: MoeI2Config, seed: Sequence[int]
) -> list[tuple[Subset, float]]:
    """Return the best sets of retained experts that the search met, and their losses; at most CANDIDATES, best first.

    Where the population could hold every set, every set is tried instead.
    """
    every, known = frozenset(range(experts)), dict[frozenset[int], float]()
    dropped = experts - keep

    def learn(sets: Sequence[frozenset[int]]) -> None:
        new = [one for one in dict.fromkeys(sets) if one not in known]
        for start in range(0, len(new), AT_ONCE):
            part = new[start : start + AT_ONCE]
            found = losses([tuple(sorted(every - one)) for one in part])
            known.update(zip(part, map(float, found), strict=True))

    def best(sets: Sequence[frozenset[int]], count: int) -> list[frozenset[int]]:
        return sorted(dict.fromkeys(sets), key=lambda one: (known[one], sorted(one)))[:count]

    if math.comb(experts, dropped) <= config.population:
        learn([frozenset(one) for one in itertools.combinations(range(experts), dropped)])
    else:
        random = np.random.default_rng(seed)
        population = [_draw(random, sorted(every), dropped) for _ in range(config.population)]
        learn(population)
        for _ in range(config.generations):
            parents = best(population, max(2, config.population // 2))
            children = [_child(random, parents, every, dropped) for _ in range(config.population // 2)]
            learn(children)
            population = best([*population, *children], config.population)
    return [(tuple(sorted(every - one)), known[one]) for one in best(list(known), CANDIDATES)]


def _draw(random: np.random.Generator, of: Sequence[int], count: int) -> frozenset[int]:
    return frozenset(map(int, random.choice(of, count, replace=False)))


def _child(
    random: np.random.Generator, parents: Sequence[frozenset[int]], every: frozenset[int], dropped: int
) -> frozenset[int]:
    """Draw from the union of two parents; sometimes swap one expert."""
    one, other = (parents[i] for i in random.choice(len(parents), 2, replace=len(parents) < 2))
    child = _draw(random, sorted(one | other), dropped)
    if random.random() < 0.3 and 0 < dropped < len(every):
        child = child - _draw(random, sorted(child), 1) | _draw(random, sorted(every - child), 1)
    return child


def ranks(importance: Sequence[float], average: int, most: int) -> tuple[int, ...]:
    """Return R_e of a layer's retained experts from their importance, within 1 … ``most``."""
    powers: npt.NDArray[np.float64] = (np.asarray(importance, np.float64) + EPSILON) ** ALPHA
    shares = powers / powers.sum() * average * len(powers)
    return tuple(int(min(max(math.floor(share), 1), most)) for share in shares)


def moe_i2(
    model: BlockModel,
    ids: Sequence[Sequence[int]],
    space: PruningSpace,
    folder: Path,
    results: LayerResults,
    config: MoeI2Config = MoeI2Config(),
    progress: Progress | None = None,
    capturing: Progress | None = None,
    **provenance: Any,
) -> Plan:
    """Choose counts and experts of every layer; what ``results`` knows is not computed again.

    Args:
        model: the full one.
        ids: calibration items, from ``model.encode``.
        space: a global one: how many experts are retained in all, and the layers' top_k.
        folder: where the layers' inputs are kept meanwhile.
        results: of this very search, so far.
        config: settings.
        progress: called with steps done and steps in all (two per layer and one per group).
        capturing: called with items done and items in all of the pass that writes the layers' inputs.
        provenance: what else ``made_by`` shall record.
    """
    config.check()
    check_temperatures(model.family, space.temperatures)
    search = _Search(model, ids, space, folder, results, config, progress, capturing)
    search.importances()
    counts = search.counts()
    search.candidates(counts)
    layers = search.combine()
    notices = list(space.notices)
    if len(set(counts.values())) > 1:
        notices.append("layers retain different numbers of experts: in vLLM the cut needs leap-serve's plugin")
    if config.rank is not None:
        layers, notice = search.low_rank(layers)
        notices.append(notice)
    of = {index: results.get(index) for index in layers}
    record = made_by(
        method="moe-i2", notices=notices, pruned={str(index): n for index, n in counts.items()},
        layer_importance={str(index): sum(one["importance"]) for index, one in of.items()},
        reconstruction={str(index): one["losses"][one["chosen"]] for index, one in of.items()},
        population=config.population, generations=config.generations, rank=config.rank, **provenance,
    )  # fmt: skip
    scores = {index: tuple(map(float, one["importance"])) for index, one in of.items()}
    return Plan(space.routing.base, space.routing.num_experts, layers, scores, record)


@dataclass(slots=True)
class _Search:
    """One search; ``results`` holds per layer: importance, then candidates and losses, then which is chosen."""

    model: BlockModel
    ids: Sequence[Sequence[int]]
    space: PruningSpace
    folder: Path
    results: LayerResults
    config: MoeI2Config
    progress: Progress | None
    capturing: Progress | None
    done: int = 0

    def importances(self) -> None:
        """Measure I_{l,e} of every layer."""
        experts = self.space.routing.num_experts
        for index in self._open(self.space.layers, "importance"):
            data, every = self._data(index), tuple(range(experts))
            without = [self._plan(index, every[:e] + every[e + 1 :]) for e in range(experts)]
            self.results.put(index, {"importance": data.losses(without)})

    def counts(self) -> dict[int, int]:
        """Return n_l."""
        importance = [sum(self.results.get(index)["importance"]) for index in self.space.layers]
        experts = self.space.routing.num_experts
        most = [experts - k for k in self.space.top_k]
        total = experts * len(most) - self.space.budget
        return dict(zip(self.space.layers, pruned_counts(importance, total, most), strict=True))

    def candidates(self, counts: dict[int, int]) -> None:
        """Search every layer's best sets."""
        experts = self.space.routing.num_experts
        for index in self._open(self.space.layers, "candidates"):
            data = self._data(index)

            def losses(sets: Sequence[Subset], data: LayerData = data, index: int = index) -> Sequence[float]:
                return data.losses([self._plan(index, kept) for kept in sets])

            found = genetic(losses, experts, experts - counts[index], self.config, [self.config.seed, index])
            known = self.results.get(index)
            self.results.put(
                index, known | {"candidates": [list(kept) for kept, _ in found], "losses": [loss for _, loss in found]}
            )

    def combine(self) -> dict[int, LayerPlan]:
        """Choose among the candidates of three layers at a time by the output of their last decoder block."""
        layers = self.space.layers
        groups = [layers[start : start + GROUP] for start in range(0, len(layers), GROUP)]
        for group in self._open(groups, "chosen"):
            options = list(itertools.product(*(range(len(self.results.get(i)["candidates"])) for i in group)))
            losses = self._block_losses(group, options) if len(options) > 1 else [0.0]
            for index, place in zip(group, options[int(np.argmin(losses))], strict=True):
                self.results.put(index, self.results.get(index) | {"chosen": place})
        known = {index: self.results.get(index) for index in layers}
        return {index: self._plan(index, tuple(one["candidates"][one["chosen"]])) for index, one in known.items()}

    def low_rank(self, layers: dict[int, LayerPlan]) -> tuple[dict[int, LayerPlan], str]:
        """Give every retained expert its rank, and say what that saves and what not."""
        hidden, width = self.model.model.config.get_text_config().hidden_size, width_of(self.model.checkpoint)
        given = self.config.rank or 1
        found: dict[int, LayerPlan] = {}
        for index, layer in layers.items():
            own = [self.results.get(index)["importance"][expert] for expert in layer.retained]
            found[index] = replace(layer, ranks=ranks(own, given, min(hidden, width)))
        factors = sum(3 * rank * (hidden + width) for layer in found.values() for rank in layer.ranks)
        dense = sum(3 * hidden * width * len(layer.retained) for layer in found.values())
        return found, (
            f"the experts' matrices are truncated to rank {given} on average and multiplied back to dense: memory and "
            f"time stay; as factors they would hold {factors:,} instead of {dense:,} parameters"
        )

    def _block_losses(self, group: Sequence[int], options: Sequence[tuple[int, ...]]) -> list[float]:
        """Σ_items ‖output of the group's last block under an option − of the full model‖_F, for every option."""
        experts = self.space.routing.num_experts
        full = {i: LayerPlan(tuple(range(experts)), self.model.layers[i].top_k) for i in self.space.layers}
        plans = [full]
        for option in options:
            own = {
                index: self._plan(index, tuple(self.results.get(index)["candidates"][place]))
                for index, place in zip(group, option, strict=True)
            }
            plans.append(full | own)
        whole = [Plan(self.space.routing.base, experts, plan) for plan in plans]
        total = torch.zeros(len(options), dtype=torch.float64)
        for one in self.ids:
            outputs = self.model.block_outputs(one, whole, group).double()
            total += (outputs[1:] - outputs[:1]).flatten(1).norm(dim=1).cpu()
        return total.tolist()

    def _open(self, steps: Sequence[Any], key: str) -> Any:
        """Yield the layers (or groups) that have no such result yet; all of them count as progress."""
        steps_in_all = 2 * len(self.space.layers) + math.ceil(len(self.space.layers) / GROUP)
        for step in steps:
            # A group's results are written layer by layer, so that a kill may leave the first of them alone.
            members = (step,) if isinstance(step, int) else step
            if any(key not in (self.results.get(index) or {}) for index in members):
                yield step
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, steps_in_all)

    def _data(self, index: int) -> LayerData:
        """Capture once what is asked for first, every layer's input, and read it from then on."""
        captured = self.model.captured(self.ids, self.folder, self.space.layers, self.capturing)
        return LayerData.of(self.model.layers[index], index, captured)

    def _plan(self, index: int, kept: Subset) -> LayerPlan:
        top_k = self.space.top_k[self.space.layers.index(index)]
        return LayerPlan(kept, min(top_k, len(kept)), self.space.temperature)
