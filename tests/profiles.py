"""Small profiles from simulated routing, with every statistic summed by brute force."""

from __future__ import annotations

import numpy as np

from leap_serve.plan import BaseModel
from leap_serve.profile import LayerProfile, Profile


def simulate(
    layers: int = 3, experts: int = 8, top_k: int = 2, tokens: int = 50, seed: int = 0, dead: int = 2, first: int = 0
) -> Profile:
    """Route random tokens; the last ``dead`` experts of every layer are never chosen."""
    random = np.random.default_rng(seed)
    made = {}
    for layer in range(first, first + layers):
        sums = {key: np.zeros(experts) for key in ("n", "m", "a", "w", "w2", "max", "easy")}
        coact = np.zeros((experts, experts))
        popularity = random.permutation(np.arange(1, experts - dead + 1)).astype(float)
        for _ in range(tokens):
            chosen = random.choice(experts - dead, top_k, replace=False, p=popularity / popularity.sum())
            gates = random.dirichlet(np.ones(top_k))
            for expert, g in zip(chosen, gates, strict=True):
                output = random.normal(size=4) * (1 + layer) * (1 + expert % 3)
                norm = float(np.linalg.norm(output))
                sums["n"][expert] += 1
                sums["m"][expert] += g
                sums["a"][expert] += norm
                sums["w"][expert] += g * norm
                sums["w2"][expert] += (g * norm) ** 2
                sums["max"][expert] = max(sums["max"][expert], float(np.abs(output).max()))
                sums["easy"][expert] += 0.1 * g * norm
                for other in chosen:
                    coact[expert, other] += 1
        made[layer] = LayerProfile(**sums, coact=coact)
    return Profile(
        base=BaseModel("tiny", "0" * 64), num_experts=experts, top_k=dict.fromkeys(made, top_k), groups=1,
        chosen_groups=1, layers=made, tokens=tokens, items=5, data_sha256="1" * 64, engine="simulated", dtype="float64",
    )  # fmt: skip
