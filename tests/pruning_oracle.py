"""An exact loss of subsets, small enough to try them all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_training.pruning_space import Chosen, Ledger, PruningSpace, Reward
from leap_training.saliency import Routing
from profiles import simulate

LAYERS, EXPERTS, KEEP = 2, 6, 3


class Oracle:
    """loss = 6 − Σ worth of the retained − Σ synergy of retained pairs of a layer; counts what it is asked."""

    def __init__(self, layers: int = LAYERS, experts: int = EXPERTS, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.worth = random.uniform(0.0, 0.6, (layers, experts))
        pairs = random.normal(0.0, 0.25, (layers, experts, experts))
        self.synergy = np.triu(pairs, 1)
        self.asked = 0
        self.calls: list[int] = []
        self.sizes: list[int] = []

    def loss(self, chosen: Chosen) -> float:
        kept = chosen.astype(float)
        together = np.einsum("le,lef,lf->", kept, self.synergy, kept)
        return float(6.0 - (self.worth * kept).sum() - together)

    def __call__(self, plans: Sequence[Plan]) -> list[float]:
        self.asked += len(plans)
        self.calls.append(len(plans))
        self.sizes += [sum(plan.counts) for plan in plans]
        return [self.loss(subset_of(plan)) for plan in plans]


def subset_of(plan: Plan) -> Chosen:
    chosen = np.zeros((len(plan.layers), plan.num_experts), bool)
    for row, layer in enumerate(plan.layers.values()):
        chosen[row, list(layer.retained)] = True
    return chosen


def profile(layers: int = LAYERS, experts: int = EXPERTS) -> Profile:
    return simulate(layers=layers, experts=experts, top_k=2, dead=0, first=1)


def ledger(oracle: Oracle, allocation: str = "uniform", experts: int = KEEP, reward: Reward | None = None) -> Ledger:
    layers, width = oracle.worth.shape
    space = PruningSpace.of(Routing.of(profile(layers, width)), experts=experts, allocation=allocation)
    return Ledger(oracle, space, reward or Reward())


def all_subsets(space: PruningSpace) -> list[Chosen]:
    """Every complete subset that spends the whole budget."""
    layers, experts = space.shape
    out = []
    for flat in itertools.combinations(range(layers * experts), space.budget):
        chosen = np.zeros(layers * experts, bool)
        chosen[list(flat)] = True
        counts = chosen.reshape(space.shape).sum(1)
        if space.complete(chosen.reshape(space.shape)) and (counts <= space.cap).all():
            out.append(chosen.reshape(space.shape))
    return out
