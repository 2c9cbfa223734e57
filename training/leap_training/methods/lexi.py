"""LExI: fewer experts per token, layer by layer, without data.

Paper: «LExI: Layer-Adaptive Active Experts for Efficient MoE Model Inference». Algorithm 1, :func:`sensitivity`:
D_l(k) = mean over N_iter draws X ~ N(0, 1) of ‖MoE_k(X) − MoE_base(X)‖_F, for every k up to the model's own.
Algorithm 2: minimise Σ_l D_l(k_l) with Σ_l k_l = B and k_min ≤ k_l ≤ k_max.

Ours: the objective is a sum over layers, so :func:`exact` solves it by dynamic programming, which is the default; the
paper's :func:`evolution` is there for fidelity and can at best find the same. A draw has 256 tokens and there are 16
(the paper gives neither number); the draws' standard errors are recorded. What a layer computes for its own top_k is
reused for every smaller k, which is exact: it chooses a prefix of the same experts.  With a plan to start from, only
its experts are there to choose from, and its top_k is the base.

Cost: the MoE layers alone, once per draw; no data, no forward pass of the model, no gradients. Memory: the model and
one layer's draw, T·K·H. It saves FLOPs and expert reads per token, and no memory: all experts of the plan stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from leap_serve.engine import Progress
from leap_serve.errors import UnsupportedError, UsageError
from leap_serve.plan import LayerPlan, Plan
from leap_serve.provenance import made_by
from leap_training.methods.blocks import BlockModel, LayerResults, MoeLayer
from leap_training.methods.naee import check_temperatures

Array = npt.NDArray[np.float64]
Deviations = Mapping[int, Array]
"""MoE layer → D_l(k) for k = 1 … k_base, [k_base] float64; the last is 0."""
SOLVERS = ("exact", "evolution")


@dataclass(frozen=True, slots=True)
class LexiConfig:
    """How LExI measures and solves.

    Args:
        draws: N_iter.
        tokens: of a draw (T = B·L in the paper).
        solver: "exact" or "evolution".
        k_min: the fewest experts per token of a layer.
        population, generations: of the evolution.
        seed: of draws and evolution.
    """

    draws: int = 16
    tokens: int = 256
    solver: str = "exact"
    k_min: int = 1
    population: int = 64
    generations: int = 200
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError on the first setting that cannot be carried out."""
        for name in ("draws", "tokens", "k_min", "population", "generations"):
            if getattr(self, name) < 1:
                raise UsageError(f"lexi {name}", f"is {getattr(self, name)}", "give 1 or more")
        if self.solver not in SOLVERS:
            raise UsageError("lexi solver", f"is {self.solver!r}", f"choose one of {', '.join(SOLVERS)}")


def check_top_k(base: Plan) -> None:
    """Raise UnsupportedError where every token uses one expert already; to be asked before a model is loaded."""
    if all(layer.top_k == 1 for layer in base.layers.values()):
        raise UnsupportedError(
            "--method lexi", "every token uses one expert already (top_k 1), so there is nothing to do",
            "choose another --method",
        )  # fmt: skip


def active_budget(base: Plan, k_min: int, experts: int | None = None, budget: float | None = None) -> int:
    """Return B, the active experts over all layers, from a fraction of the base's or an average per layer."""
    if budget is not None and not 0.0 < budget <= 1.0:
        raise UsageError(
            "--budget", f"is {budget}, not a fraction in (0, 1]", "give the share of active experts to keep"
        )
    own = [layer.top_k for layer in base.layers.values()]
    total = int(np.floor((budget or 0.0) * sum(own) + 0.5)) if experts is None else experts * len(own)
    fewest = sum(min(k_min, k) for k in own)
    if experts is not None and not fewest <= total <= sum(own):
        limits = f"{-(-fewest // len(own))} to {sum(own) // len(own)}"
        raise UsageError("--experts", f"is {experts} active experts per layer", f"lexi takes {limits}")
    if not fewest <= total <= sum(own):
        raise UsageError(
            "--budget", f"{budget} is {total} active experts over all layers", f"lexi takes {fewest} to {sum(own)}"
        )
    return total


def comes_even(base: Plan, total: int, k_min: int) -> bool:
    """Whether all layers get the same top_k whatever is measured: one layer, everything kept, or the fewest of all."""
    own = [layer.top_k for layer in base.layers.values()]
    fewest = [min(k_min, k) for k in own]
    return len(own) == 1 or any(len(set(ks)) == 1 and total == sum(ks) for ks in (own, fewest))


@torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
def sensitivity(layer: MoeLayer, base: LayerPlan, config: LexiConfig, index: int) -> Array:
    """Return ‖MoE_k(X_i) − MoE_base(X_i)‖_F of every draw i and k = 1 … base.top_k: [draws, base.top_k] float64.

    Args:
        layer: the MoE layer.
        base: experts and τ to choose with, and the top_k to start from.
        config: draws, tokens and seed.
        index: of the layer; part of the seed, so that layers see different draws.
    """
    weight = layer.router.weight
    plans = [replace(base, top_k=k) for k in range(1, base.top_k + 1)]
    random = torch.Generator().manual_seed(int(np.random.SeedSequence([config.seed, index]).generate_state(1)[0]))
    found = np.zeros((config.draws, base.top_k))
    for draw in range(config.draws):
        x = torch.randn(config.tokens, weight.shape[1], generator=random).to(weight)
        z = layer.logits(x)
        weights = layer.weights(z, plans)  # [k, T, E]
        ids = weights[-1].topk(base.top_k, -1).indices
        change = (weights - weights[-1]).gather(2, ids.expand(len(plans), -1, -1))
        f = layer.contributions(x, z, ids).double()
        found[draw] = torch.einsum("ktj,tjh->kth", change, f).flatten(1).norm(dim=1).cpu().numpy()
    return found


def exact(deviations: Sequence[Array], total: int, k_min: int = 1) -> tuple[int, ...]:
    """Return the k_l with the least Σ D_l(k_l) and Σ k_l = total, by dynamic programming over layers.

    ``deviations``: D_l(k) of every layer, [k_l's most]. Costs O(L·B·K). Of equals the earlier layers get fewer.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for of in deviations:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (loss, chosen) in best.items():
            for k in range(min(k_min, len(of)), len(of) + 1):
                one = (loss + float(of[k - 1]), (*chosen, k))
                if spent + k <= total and (spent + k not in longer or one < longer[spent + k]):
                    longer[spent + k] = one
        best = longer
    if total not in best:
        raise UsageError("--budget, --experts", f"no choice has {total} active experts", "choose another")
    return best[total][1]


def evolution(deviations: Sequence[Array], total: int, config: LexiConfig) -> tuple[int, ...]:
    """Return the best k_l that Algorithm 2 finds: tournaments, uniform crossover, ±1 mutation of sum zero, projection.

    One child per generation and tournaments of four are ours; the paper leaves both open.
    """
    random = np.random.default_rng(config.seed)
    most = np.array([len(of) for of in deviations])
    fewest = np.minimum(config.k_min, most)

    def fitness(chosen: npt.NDArray[np.int64]) -> float:
        return sum(float(of[k - 1]) for of, k in zip(deviations, chosen, strict=True))

    population = [_project(random.integers(fewest, most + 1), total, fewest, most, random)
                  for _ in range(config.population)]  # fmt: skip
    found = [fitness(one) for one in population]
    for _ in range(config.generations):
        one, other = (population[min(random.integers(len(found), size=4), key=found.__getitem__)] for _ in range(2))
        child = np.where(random.random(len(most)) < 0.5, one, other)
        if len(most) > 1:
            up, down = random.choice(len(most), 2, replace=False)
            child[up], child[down] = child[up] + 1, child[down] - 1
        population.append(_project(child, total, fewest, most, random))
        found.append(fitness(population[-1]))
    return tuple(map(int, population[int(np.argmin(found))]))


def _project(
    chosen: npt.NDArray[np.int64],
    total: int,
    fewest: npt.NDArray[np.int64],
    most: npt.NDArray[np.int64],
    random: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """Clip to the layers' limits, then change random layers by one until the sum is right."""
    chosen = np.clip(chosen, fewest, most)
    while (gap := total - int(chosen.sum())) != 0:
        free = np.flatnonzero(chosen < most if gap > 0 else chosen > fewest)
        chosen[random.choice(free)] += 1 if gap > 0 else -1
    return chosen


def lexi(
    model: BlockModel,
    base: Plan,
    total: int,
    config: LexiConfig,
    results: LayerResults,
    progress: Progress | None = None,
    **provenance: Any,
) -> Plan:
    """Choose every layer's top_k; layers that ``results`` knows are not measured again.

    Args:
        model: the full one.
        base: experts, τ and the top_k to start from, of every layer.
        total: active experts over all layers (:func:`active_budget`).
        config: settings.
        results: the draws of each layer, so far; they serve every ``total``.
        progress: called with layers measured and layers in all.
        provenance: what else ``made_by`` shall record.
    """
    config.check()
    check_top_k(base)
    check_temperatures(model.family, [layer.temperature for layer in base.layers.values()])
    drawn: dict[int, Array] = {}
    for number, (index, layer) in enumerate(base.layers.items(), 1):
        if results.get(index) is None:
            results.put(index, sensitivity(model.layers[index], layer, config, index).tolist())
        drawn[index] = np.array(results.get(index), np.float64)
        if progress is not None:
            progress(number, len(base.layers))
    means = [values.mean(0) for values in drawn.values()]
    solved = config.solver == "exact"
    chosen = exact(means, total, config.k_min) if solved else evolution(means, total, config)
    layers = {
        index: replace(layer, top_k=k) for (index, layer), k in zip(base.layers.items(), chosen, strict=True)
    }  # fmt: skip
    loss = sum(float(of[k - 1]) for of, k in zip(means, chosen, strict=True))
    record = made_by(
        method="lexi", solver=config.solver, active_experts=total, deviation=loss, draws=config.draws,
        tokens=config.tokens, seed=config.seed, notices=[],
        deviations={str(index): of.tolist() for index, of in zip(drawn, means, strict=True)},
        standard_errors={str(index): _standard_error(values) for index, values in drawn.items()}, **provenance,
    )  # fmt: skip
    return Plan(base.base, base.num_experts, layers, base.scores, record)


def _standard_error(values: Array) -> list[float] | None:
    """Standard error of the mean of each column; None of a single draw."""
    return (values.std(0, ddof=1) / np.sqrt(len(values))).tolist() if len(values) > 1 else None
