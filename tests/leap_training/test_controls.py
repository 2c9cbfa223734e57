"""The controls against an exact oracle on spaces small enough to try every subset, or every allocation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from leap_serve.errors import LeapError, UsageError
from leap_training.controls import SEARCHES, Given, check_method, swapped
from leap_training.pruning_space import Chosen, PruningSpace
from leap_training.saliency import scores
from pruning_oracle import Oracle, all_subsets, ledger, profile

PROFILE = profile()
SCORES = scores(PROFILE, "reap")
BY_PLANS = [name for name in SEARCHES if name != "rco"]
LEGAL = [pair for pair in itertools.product(BY_PLANS, ["uniform", "global"]) if pair != ("evo-counts", "uniform")]


class Larger(Oracle):
    """Losses of larger plans that stay positive, as real ones are."""

    def loss(self, chosen: Chosen) -> float:
        return super().loss(chosen) + 10


def within_budget(space: PruningSpace, chosen: Chosen) -> bool:
    counts = chosen.sum(1)
    return bool(space.complete(chosen) and counts.sum() <= space.budget and (counts <= space.cap).all())


@pytest.mark.parametrize(("name", "allocation"), LEGAL)
def test_controls_spend_what_they_are_given_on_legal_plans(name: str, allocation: str) -> None:
    # 16 of four layers of 8, so that there are more than 60 allocations.
    oracle = Larger(layers=4, experts=8)
    found = scores(profile(layers=4, experts=8), "reap")
    book = ledger(oracle, allocation, experts=4)
    told: list[float] = []
    SEARCHES[name](book, Given(found, 60, 0, told.append))
    assert oracle.asked == book.evaluations == told[-1] == 60 and told == sorted(told)
    assert all(within_budget(book.space, book.subset(key)) for key in book.losses)
    whole = [key for key in book.losses if book.subset(key).sum() == book.space.budget]
    assert len(whole) == 60 if name != "greedy" else len(whole) > 20
    if name != "random-search":
        assert next(iter(book.losses)) == book.space.best_of(found).tobytes()
        assert book.best()[2] < oracle.loss(book.space.best_of(found))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("name", ["greedy", "evolution"])
def test_searches_find_the_optimum_of_a_tiny_space(name: str, allocation: str, seed: int) -> None:
    oracle = Oracle(seed=seed)
    book = ledger(oracle, allocation)
    subsets = all_subsets(book.space)
    SEARCHES[name](book, Given(SCORES, len(subsets) // 2, seed))
    assert book.best()[2] == pytest.approx(min(map(oracle.loss, subsets)), abs=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counts_evolve_to_the_best_allocation_of_the_ranking(seed: int) -> None:
    oracle, found = Larger(layers=4, experts=8, seed=seed), scores(profile(layers=4, experts=8), "reap")
    book = ledger(oracle, "global", experts=4)
    space = book.space
    order = [np.argsort(-found[layer], kind="stable") for layer in space.layers]
    best, every = np.inf, 0
    for counts in itertools.product(range(2, 9), repeat=4):
        if sum(counts) == space.budget:
            chosen = np.zeros(space.shape, bool)
            for layer, count in enumerate(counts):
                chosen[layer, order[layer][:count]] = True
            best, every = min(best, oracle.loss(chosen)), every + 1
    SEARCHES["evo-counts"](book, Given(found, 2 * every // 3, seed))
    assert book.best()[2] == pytest.approx(best, abs=1e-9)
    # The ranking within layers is never left.
    for key in book.losses:
        for layer, row in enumerate(book.subset(key)):
            assert set(np.flatnonzero(row)) == set(order[layer][: row.sum()])


def test_greedy_adds_before_it_swaps() -> None:
    oracle = Oracle()
    book = ledger(oracle)
    SEARCHES["greedy"](book, Given(SCORES, 60, 0))
    sizes = [int(book.subset(key).sum()) for key in book.losses]
    # The ranking's plan of 6; from the floors of 2 + 2 the fifth and the sixth expert; then swaps of the best.
    added = sizes[1 : sizes.index(6, 1)]
    assert sizes[0] == 6 and added and set(added) == {5} and set(sizes[1 + len(added) :]) == {6}
    # What is added stays: every candidate of the sixth contains the best of the fifth.
    fifth = max((key for key in book.rewards if book.subset(key).sum() == 5), key=lambda key: book.rewards[key])
    sixth = next(key for key in list(book.losses)[1:] if book.subset(key).sum() == 6)
    assert (book.subset(fifth) <= book.subset(sixth)).all()


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_swap_changes_one_expert_and_stays_legal(allocation: str) -> None:
    space, random = ledger(Oracle(), allocation).space, np.random.default_rng(0)
    chosen = space.best_of(SCORES)
    for _ in range(50):
        other = swapped(chosen, space, random)
        assert (other != chosen).sum() == 2 and within_budget(space, other)
        chosen = other


def test_controls_end_where_nothing_new_is_left() -> None:
    book = ledger(Oracle(), "global", experts=6)
    for name in BY_PLANS:
        if name != "greedy":  # which tries smaller plans on its way
            SEARCHES[name](book, Given(SCORES, 50, 0))
    assert book.evaluations == 1
    SEARCHES["greedy"](book, Given(SCORES, 50, 0))
    assert book.evaluations < 50


def test_what_cannot_be_searched_is_refused_with_a_sentence() -> None:
    with pytest.raises(UsageError, match="allocation global"):
        check_method("evo-counts", ledger(Oracle()).space)
    with pytest.raises(UsageError, match="allocation global"):
        SEARCHES["evo-counts"](ledger(Oracle()), Given(SCORES, 50, 0))
    with pytest.raises(LeapError, match="learns from the model"):
        SEARCHES["rco"](ledger(Oracle()), Given(SCORES, 50, 0))
    for name, allocation in LEGAL:
        check_method(name, ledger(Oracle(), allocation).space)
