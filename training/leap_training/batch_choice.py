"""Batches that are uncertain and unlike each other: LEAP eq. 17, greedily, and k-means++ drawing.

N items with uncertainty u [N] float64 and states h [N, D], rows of length 1; d(x, y) = 1 − cos(h(x), h(y)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

WORK = 5_000_000
"""How many distances the greedy maximiser may spend on beginning anew from other first items."""


def objective(u: torch.Tensor, h: torch.Tensor, batch: Sequence[int], div_coef: float) -> float:
    """Return Σ u + η·Div of eq. 17 for a batch; Div is 0 for a single item."""
    chosen = torch.tensor(list(batch), dtype=torch.long)
    value = float(u[chosen].sum())
    if len(batch) < 2:
        return value
    distance = (1 - h[chosen] @ h[chosen].T).clamp_min(0).double().fill_diagonal_(math.inf)
    return value + div_coef * float(distance.min(1).values.sum())


def greedy(u: torch.Tensor, h: torch.Tensor, k: int, div_coef: float) -> list[int]:
    """Maximise eq. 17 greedily by its true marginal gains: u [N] and unit rows h [N, D] give k indices.

    The first item decides much in small pools, where eq. 17 itself says nothing of it but u: the greedy is
    begun from as many of the most uncertain items as WORK allows (all of a small pool) and the best result kept.
    """
    if k < 1:
        return []
    begins = max(1, min(len(u), WORK // (k * len(u)))) if k > 1 else 1
    firsts = u.argsort(descending=True, stable=True)[:begins].tolist()
    grown = (_grown(u, h, k, div_coef, first) for first in firsts)
    return max(grown, key=lambda one: one[1])[0]


def _grown(u: torch.Tensor, h: torch.Tensor, k: int, div_coef: float, first: int) -> tuple[list[int], float]:
    """Add the item of the highest gain until there are k; return them and eq. 17's value.

    Adding x brings u(x) and its distance to the batch, but also takes from every member y that x is now the
    nearest of: ``taken``[x] = Σ_y min(0, d(x, y) − m_y) with m_y the distance of y to its nearest. Only members
    whose m_y has changed are summed anew, so a step costs one row of distances, O(N·D), and little more.
    """
    total = len(u)
    rows = torch.empty(k, total)
    nearest_of_member = torch.full((k,), math.inf)
    distance_to_batch = torch.full((total,), math.inf)
    taken = torch.zeros(total)
    free = torch.ones(total, dtype=torch.bool)
    chosen: list[int] = []
    value, new = 0.0, first
    gain = u
    for size in range(k):
        value += float(gain[new])
        free[new] = False
        rows[size] = (1 - h @ h[new]).clamp_(0)
        own = float(distance_to_batch[new])
        old = nearest_of_member[:size]
        now = rows[size, chosen]
        for member in (now < old).nonzero()[:, 0].tolist():
            if size > 1:
                taken -= (rows[member] - old[member]).clamp_max_(0)
            taken += (rows[member] - now[member]).clamp_max_(0)
        nearest_of_member[:size] = torch.minimum(old, now)
        nearest_of_member[size] = own
        chosen.append(new)
        if size:
            taken += (rows[size] - own).clamp_max_(0)
        torch.minimum(distance_to_batch, rows[size], out=distance_to_batch)
        # Of a single member Div is 0, so the second item brings its distance twice.
        gain = u + div_coef * (distance_to_batch + (taken if size else distance_to_batch))
        new = int(gain.masked_fill(~free, -math.inf).argmax())
    return chosen, value


def k_means_plus_plus(u: torch.Tensor, h: torch.Tensor, k: int, random: np.random.Generator) -> list[int]:
    """Draw k items one by one with probability ∝ u·d², d the distance to those drawn so far."""
    weight = (u - u.min() + 1e-6).numpy()
    closest = torch.full((len(u),), 1.0)
    chosen: list[int] = []
    while len(chosen) < k:
        mass = weight * closest.double().numpy() ** 2
        mass[chosen] = 0.0
        if not mass.sum() > 0:
            # Copies of what was drawn are all that is left.
            mass = weight.copy()
            mass[chosen] = 0.0
        chosen.append(int(random.choice(len(u), p=mass / mass.sum())))
        closest = torch.minimum(closest, (1 - h @ h[chosen[-1]]).clamp_(0))
    return chosen
