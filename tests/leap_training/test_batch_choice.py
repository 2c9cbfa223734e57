"""Eq. 17 and its greedy maximiser: values by hand, brute force on small pools, no copies, and the other diversity."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from leap_training.batch_choice import greedy, k_means_plus_plus, objective

KINDS = ("spread", "clusters", "one side")
"""Pools whose states lie anywhere, in three narrow clusters with near-copies, or all in one orthant."""


def pool(number: int) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """A random pool of 3 to 12 items: u, h, η and a batch size."""
    random = np.random.default_rng(number)
    total, width = int(random.integers(3, 13)), int(random.choice([2, 3, 8]))
    h = random.normal(size=(total, width))
    kind = KINDS[number % 3]
    if kind == "clusters":
        h = random.normal(size=(3, width))[random.integers(0, 3, total)] + 0.05 * h
    elif kind == "one side":
        h = np.abs(h)
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    u = random.uniform(0, math.log(16), total) if number % 2 else random.uniform(1.9, 2.1, total)
    eta = float(random.choice([0.1, 1.0, 10.0, 100.0]))
    return torch.from_numpy(u), torch.from_numpy(h).float(), eta, int(random.integers(1, total + 1))


def by_definition(u: npt.NDArray[np.float64], distance: npt.NDArray[np.float64], batch: tuple[int, ...]) -> float:
    """Eq. 17 with η in the distances, straight from the text."""
    value = sum(u[i] for i in batch)
    if len(batch) > 1:
        value += sum(min(distance[i, j] for j in batch if j != i) for i in batch)
    return float(value)


def test_objective_by_hand() -> None:
    # East, north, west, and east again: distances 1 between neighbours, 2 across, 0 between the copies.
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])
    u = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)
    assert objective(u, h, [0], 3.0) == 0.5
    assert objective(u, h, [0, 2], 3.0) == pytest.approx(0.625 + 3 * (2 + 2))
    assert objective(u, h, [0, 1, 2], 3.0) == pytest.approx(0.875 + 3 * (1 + 1 + 1))
    assert objective(u, h, [0, 1, 3], 3.0) == pytest.approx(1.75 + 3 * (0 + 1 + 0))
    assert greedy(u, h, 1, 3.0) == [3]
    assert sorted(greedy(u, h, 2, 3.0)) == [2, 3]
    assert sorted(greedy(u, h, 3, 3.0)) == [1, 2, 3]
    assert sorted(greedy(u, h, 2, 0.0)) == [0, 3], "without diversity the most uncertain, copies too"
    assert greedy(u, h, 0, 1.0) == []


def test_greedy_reaches_nine_tenths_of_brute_force() -> None:
    sizes, ratios = set(), []
    for number in range(100):
        u, h, eta, k = pool(number)
        distance = eta * (1 - h.double() @ h.double().T).clamp_min(0).numpy()
        best = max(by_definition(u.numpy(), distance, batch) for batch in itertools.combinations(range(len(u)), k))
        chosen = greedy(u, h, k, eta)
        assert len(set(chosen)) == k
        reached = by_definition(u.numpy(), distance, tuple(chosen))
        assert objective(u, h, chosen, eta) == pytest.approx(reached, rel=1e-4)
        assert reached <= best + 1e-9
        ratios.append(reached / best)
        sizes.add(k)
    assert min(ratios) >= 0.9, f"the worst of 100 pools reaches {min(ratios):.3f} of the optimum"
    assert len(sizes) >= 8


def test_growth_follows_the_true_marginal_gain() -> None:
    """From one first item, in clustered pools, where a new item takes the nearest distance from many others."""
    better = []
    for seed in range(4):
        random = torch.Generator().manual_seed(seed)
        centres = torch.randn(12, 4, generator=random)
        h = centres[torch.randint(12, (150,), generator=random)] + 0.1 * torch.randn(150, 4, generator=random)
        h = torch.nn.functional.normalize(h, dim=1)
        u = 0.1 * torch.rand(150, generator=random).double()
        chosen = greedy(u, h, 25, 1.0, begins=1)
        # The same growth by evaluating eq. 17 anew for every candidate.
        exact, near = [int(u.argmax())], [int(u.argmax())]
        for _ in range(24):
            left = [i for i in range(150) if i not in exact]
            exact.append(max(left, key=lambda i: objective(u, h, [*exact, i], 1.0)))
            gain = u + (1 - h @ h[near].T).min(1).values
            gain[near] = -math.inf
            near.append(int(gain.argmax()))
        assert objective(u, h, chosen, 1.0) == pytest.approx(objective(u, h, exact, 1.0), rel=1e-3)
        better.append(objective(u, h, chosen, 1.0) - objective(u, h, near, 1.0))
    assert sum(better) > 0, "ignoring what a new item takes from the others is worse"


def test_a_batch_of_a_large_pool_is_diverse() -> None:
    random = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(40, 16, generator=random), dim=1)
    home = torch.arange(800) % 40
    h = torch.nn.functional.normalize(centres[home] + 0.01 * torch.randn(800, 16, generator=random), dim=1)
    u = torch.rand(800, generator=random).double()
    assert len(set(home[greedy(u, h, 40, 10.0)].tolist())) == 40, "one of each cluster"
    assert sorted(greedy(u, h, 800, 1.0)) == list(range(800))


def test_k_means_plus_plus_spreads_and_takes_no_item_twice() -> None:
    random = torch.Generator().manual_seed(0)
    home = torch.arange(200) % 10
    h = torch.eye(10)[home]
    u = torch.rand(200, generator=random).double()
    chosen = k_means_plus_plus(u, h, 10, np.random.default_rng(0))
    assert len({int(home[i]) for i in chosen}) == 10, "copies of what was drawn weigh nothing"
    assert len(set(k_means_plus_plus(u, h, 200, np.random.default_rng(0)))) == 200
    assert chosen == k_means_plus_plus(u, h, 10, np.random.default_rng(0))
