"""Searches without learning, at the same number of plan evaluations as the agent's (methods.md §2)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from leap_training.pruning_space import Chosen, Ledger, PruningSpace
from leap_training.saliency import Scores

Report = Callable[[Ledger], None]
"""Called after every batch of evaluations."""


def random_subsets(
    ledger: Ledger, scores: Scores, evaluations: int, seed: int, report: Report | None = None, batch: int = 16
) -> None:
    """Evaluate uniformly random legal subsets."""
    random = np.random.default_rng(seed)
    _spend(ledger, lambda known, idle: _random_subset(known.space, random), evaluations, batch, report)


def greedy(
    ledger: Ledger, scores: Scores, evaluations: int, seed: int, report: Report | None = None, batch: int = 16
) -> None:
    """Hill-climb from the ranking's plan: try ``batch`` random single swaps of the best plan, keep the best.

    Where no single swap is new any more, two are made at once, then three, and so on.
    """
    random = np.random.default_rng(seed)
    ledger([ledger.space.best_of(scores)], evaluations)

    def neighbour(known: Ledger, idle: int) -> Chosen:
        made = known.best()[0]
        for _ in range(1 + idle // 4):
            made = swapped(made, known.space, random)
        return made

    _spend(ledger, neighbour, evaluations, batch, report)


def evolution(
    ledger: Ledger, scores: Scores, evaluations: int, seed: int, report: Report | None = None, batch: int = 16
) -> None:
    """Evolve a population of the 16 best plans so far, begun with the ranking's plan and mutants of it.

    A child takes each layer from one of two parents, drawn by binary tournaments, then swaps one to three experts.
    """
    random = np.random.default_rng(seed)
    start = ledger.space.best_of(scores)
    ledger([start], evaluations)

    def child(known: Ledger, idle: int) -> Chosen:
        if known.evaluations < batch:
            made = start
            for _ in range(int(random.integers(1, 9))):
                made = swapped(made, known.space, random)
            return made
        keys = sorted(known.rewards, key=lambda key: -known.rewards[key])[:16]
        one, other = (known.subset(keys[random.integers(0, len(keys), 2).min()]) for _ in range(2))
        mixed = np.where(random.random(len(one))[:, None] < 0.5, one, other)
        # With unequal counts a mixture of layers may miss the budget; then the first parent stands.
        made = mixed if mixed.sum() == known.space.budget else one
        for _ in range(int(random.integers(1, 4))):
            made = swapped(made, known.space, random)
        return made

    _spend(ledger, child, evaluations, batch, report)


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


def _random_subset(space: PruningSpace, random: np.random.Generator) -> Chosen:
    chosen = np.zeros(space.shape, bool)
    for layer in space.schedule:
        open_ = space.allowed(chosen)
        if layer is not None:
            open_[np.arange(len(chosen)) != layer] = False
        chosen.flat[random.choice(np.flatnonzero(open_))] = True
    return chosen


def _spend(
    ledger: Ledger, draw: Callable[[Ledger, int], Chosen], evaluations: int, batch: int, report: Report | None
) -> None:
    """Evaluate batches of drawn subsets; ends early where a hundred batches bring nothing new."""
    idle = 0
    while ledger.evaluations < evaluations and idle < 100:
        before = ledger.evaluations
        ledger([draw(ledger, idle) for _ in range(batch)], evaluations)
        idle = idle + 1 if ledger.evaluations == before else 0
        if report is not None:
            report(ledger)


SEARCHES = {"random-search": random_subsets, "greedy": greedy, "evolution": evolution}
