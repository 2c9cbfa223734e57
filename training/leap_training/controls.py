"""Searches without a policy, at the same number of plan evaluations as the agent's (methods.md §2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from leap_serve.engine import Engine, mean_esp
from leap_serve.errors import LeapError, UsageError
from leap_serve.plan import Plan
from leap_serve.tasks.base import Item
from leap_training.pruning_space import Chosen, Evaluator, Ledger, PruningSpace
from leap_training.saliency import Scores

if TYPE_CHECKING:
    from leap_training.rco import Cost

Report = Callable[[float], None]
"""Called with the evaluations spent so far, after every batch of them."""
PARENTS = 16
"""The best plans so far that an evolution breeds from."""


def esp_evaluator(engine: Engine, items: Sequence[Item]) -> Evaluator:
    """1 − ESP against the full model, in [0, 1], in place of the loss: EvoESAP's own fitness."""

    def evaluate(plans: Sequence[Plan]) -> list[float]:
        return [1.0 - mean_esp(scores) for scores in engine.score_plans(plans, items, esp=True)]

    return evaluate


@dataclass(frozen=True, slots=True)
class Material:
    """What a method that learns by gradients needs beside the ledger.

    Args:
        model: folder of the full checkpoint.
        items: those that the ledger's losses are of, so that no method sees more data than another.
        state: folder to save to and to continue from, or None.
        identity: what decides the ledger's losses beside model, items and reward, for a state to be continued (JSON).
    """

    model: Path
    items: Sequence[Item]
    state: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Given:
    """What a search is given beside its ledger.

    Args:
        scores: the ranking to start at; a random search does without.
        evaluations: how many plans the ledger may hold in the end.
        seed: of everything that is drawn.
        batch: plans evaluated at once.
    """

    scores: Scores
    evaluations: int
    seed: int
    report: Report | None = None
    material: Material | None = None
    batch: int = 16


Search = Callable[[Ledger, Given], "Cost | None"]
"""Fills the ledger, whose best is the find; returns what it cost where that is more than the ledger's evaluations."""


def random_subsets(ledger: Ledger, given: Given) -> None:
    """Evaluate uniformly random legal subsets."""
    random = np.random.default_rng(given.seed)
    _spend(ledger, lambda known, idle: _random_subset(known.space, random), given)


def greedy(ledger: Ledger, given: Given) -> None:
    """Add experts one after the other, each the best of several candidates, then swap single experts.

    Adding begins with every layer's top_k highest-ranked experts and spends half of the evaluations; candidates
    are drawn by their share of their layer's saliency. Swapping tries a batch of random single swaps of the best plan
    at once, the ranking's own plan included, and keeps the best; where no single swap is new any more, two are made
    at once, then three, and so on.
    """
    random = np.random.default_rng(given.seed)
    ledger([ledger.space.best_of(given.scores)], given.evaluations)
    _add(ledger, given, random)

    def neighbour(known: Ledger, idle: int) -> Chosen:
        made = known.best()[0]
        for _ in range(1 + idle // 4):
            made = swapped(made, known.space, random)
        return made

    _spend(ledger, neighbour, given)


def evolution(ledger: Ledger, given: Given) -> None:
    """Evolve a population of the 16 best plans so far, begun with the ranking's plan and mutants of it.

    A child takes each layer from one of two parents, drawn by binary tournaments, then swaps one to three experts.
    """
    random = np.random.default_rng(given.seed)
    start = ledger.space.best_of(given.scores)
    ledger([start], given.evaluations)
    begun = ledger.evaluations

    def child(known: Ledger, idle: int) -> Chosen:
        if known.evaluations < begun + given.batch:
            made = start
            for _ in range(int(random.integers(1, 9))):
                made = swapped(made, known.space, random)
            return made
        one, other = _parent(known, random), _parent(known, random)
        mixed = np.where(random.random(len(one))[:, None] < 0.5, one, other)
        # With unequal counts a mixture of layers may miss the budget; then the first parent stands.
        made = mixed if mixed.sum() == known.space.budget else one
        for _ in range(int(random.integers(1, 4))):
            made = swapped(made, known.space, random)
        return made

    _spend(ledger, child, given)


def evolve_counts(ledger: Ledger, given: Given) -> None:
    """Evolve how many experts each layer keeps, the ranking within layers being fixed (in EvoESAP's manner).

    Begun with the global ranking's counts and with equal ones. A child is one of the 16 best plans, drawn by binary
    tournaments, after one to three level switches: some experts fewer in one layer, as many more in another. Raises
    UsageError where the allocation is uniform: its counts are fixed. With a ledger of :func:`esp_evaluator` the fitness
    is EvoESAP's.
    """
    check_method("evo-counts", ledger.space)
    random, space = np.random.default_rng(given.seed), ledger.space
    order = np.stack([np.argsort(-np.asarray(given.scores[layer]), kind="stable") for layer in space.layers])

    def plan_of(counts: npt.NDArray[np.int64]) -> Chosen:
        chosen = np.zeros(space.shape, bool)
        np.put_along_axis(chosen, order, np.arange(space.shape[1]) < counts[:, None], 1)
        return chosen

    start = space.best_of(given.scores)
    ledger([start, plan_of(_even(space))], given.evaluations)
    own = {start.tobytes(), plan_of(_even(space)).tobytes()}

    def child(known: Ledger, idle: int) -> Chosen:
        # What others put into the ledger is not of this ranking.
        counts = _parent(known, random, own).sum(1)
        for _ in range(int(random.integers(1, 4))):
            counts = _switched(counts, space, random, 4 + idle)
        own.add(plan_of(counts).tobytes())
        return plan_of(counts)

    _spend(ledger, child, given)


def learn_scores(ledger: Ledger, given: Given) -> Cost:
    """:func:`leap_training.rco.rco` on the material's model and items."""
    if given.material is None:
        raise LeapError("--method rco", "learns from the model itself", "give its folder and the items as Material")
    from leap_training.rco import rco

    own = given.material
    return rco(
        own.model, ledger, given.scores, own.items, given.evaluations, given.seed, given.report, state=own.state,
        identity=own.identity,
    )  # fmt: skip


SEARCHES: Mapping[str, Search] = {
    "random-search": random_subsets,
    "greedy": greedy,
    "evolution": evolution,
    "evo-counts": evolve_counts,
    "rco": learn_scores,
}


def check_method(name: str, space: PruningSpace) -> None:
    """Raise UsageError where a method has nothing to search in a space; to be asked before a model is loaded."""
    if name == "evo-counts" and space.uniform:
        raise UsageError(
            "--method evo-counts", "chooses how many experts each layer keeps, and --allocation uniform fixes that",
            "add --allocation global",
        )  # fmt: skip


def swapped(chosen: Chosen, space: PruningSpace, random: np.random.Generator) -> Chosen:
    """Drop one expert, add another; in uniform spaces within one layer, else wherever the floors allow."""
    out = chosen.copy()
    counts = chosen.sum(1)
    dropable = chosen if space.uniform else chosen & (counts > np.array(space.top_k))[:, None]
    if not dropable.any() or chosen.all():
        return out
    drop = random.choice(np.flatnonzero(dropable))
    open_ = ~chosen
    if space.uniform:
        open_[np.arange(len(chosen)) != drop // chosen.shape[1]] = False
    if open_.any():
        out.flat[drop] = False
        out.flat[random.choice(np.flatnonzero(open_))] = True
    return out


def _add(ledger: Ledger, given: Given, random: np.random.Generator) -> None:
    """Greedy forward selection over the space's schedule, on half of the evaluations that are left."""
    space = ledger.space
    found = np.stack([np.asarray(given.scores[layer], np.float64) for layer in space.layers])
    share = np.log(np.maximum(found / np.maximum(found.sum(1, keepdims=True), 1e-300), 1e-9))
    chosen, picks = np.zeros(space.shape, bool), list(space.schedule)
    while not space.complete(chosen):
        open_ = _open(space, chosen, picks.pop(0))
        chosen.flat[np.where(open_, share, -np.inf).argmax()] = True
    width = (given.evaluations - ledger.evaluations) // 2 // max(1, len(picks))
    for layer in picks if width else []:
        open_ = _open(space, chosen, layer)
        # Gumbel-top-k: candidates without repetition, drawn by their share.
        drawn = np.where(open_, share + random.gumbel(size=space.shape), -np.inf).ravel()
        candidates = []
        for place in drawn.argsort()[::-1][: min(width, int(open_.sum()))]:
            candidates.append(chosen.copy())
            candidates[-1].flat[place] = True
        rewards = ledger(candidates, given.evaluations)
        chosen = candidates[int(np.argmax([-np.inf if reward is None else reward for reward in rewards]))]
        if given.report is not None:
            given.report(ledger.evaluations)


def _open(space: PruningSpace, chosen: Chosen, layer: int | None) -> Chosen:
    """The experts that the pick of this layer (None: of any) may add."""
    open_ = space.allowed(chosen)
    if layer is not None:
        open_[np.arange(len(chosen)) != layer] = False
    return open_


def _random_subset(space: PruningSpace, random: np.random.Generator) -> Chosen:
    chosen = np.zeros(space.shape, bool)
    for layer in space.schedule:
        chosen.flat[random.choice(np.flatnonzero(_open(space, chosen, layer)))] = True
    return chosen


def _parent(known: Ledger, random: np.random.Generator, among: set[bytes] | None = None) -> Chosen:
    """One of the best plans so far, of the given ones if any are: the better of two."""
    keys = [key for key in known.rewards if among is None or key in among]
    best = sorted(keys, key=lambda key: -known.rewards[key])[:PARENTS]
    return known.subset(best[random.integers(0, len(best), 2).min()])


def _even(space: PruningSpace) -> npt.NDArray[np.int64]:
    """Counts [L] that spend the budget as evenly as the floors allow."""
    counts = np.array(space.top_k)
    while counts.sum() < space.budget:
        counts[np.argmin(counts)] += 1
    return counts


def _switched(
    counts: npt.NDArray[np.int64], space: PruningSpace, random: np.random.Generator, most: int
) -> npt.NDArray[np.int64]:
    """Move up to ``most`` experts' worth of budget from one layer to another, within floors and cap."""
    giving = np.flatnonzero(counts > np.array(space.top_k))
    if not len(giving):
        return counts
    source = int(random.choice(giving))
    taking = np.flatnonzero((counts < space.cap) & (np.arange(len(counts)) != source))
    if not len(taking):
        return counts
    target = int(random.choice(taking))
    room = min(counts[source] - space.top_k[source], space.cap - counts[target], most)
    moved = counts.copy()
    size = int(random.integers(1, room + 1))
    moved[source] -= size
    moved[target] += size
    return moved


def _spend(ledger: Ledger, draw: Callable[[Ledger, int], Chosen], given: Given) -> None:
    """Evaluate batches of drawn subsets; ends early where a hundred batches bring nothing new."""
    idle = 0
    while ledger.evaluations < given.evaluations and idle < 100:
        before = ledger.evaluations
        ledger([draw(ledger, idle) for _ in range(given.batch)], given.evaluations)
        idle = idle + 1 if ledger.evaluations == before else 0
        if given.report is not None:
            given.report(ledger.evaluations)
