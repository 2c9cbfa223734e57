"""EEP: which experts stay, then what they are merged from, by evolution on the task itself.

Paper: Liu et al. 2024, «Efficient Expert Pruning for Sparse Mixture-of-Experts Language Models: Enhancing Performance
and Reducing Inference Costs». A layer has two matrices [r, E]: the router map W_RM and the expert merge W_EM; tokens
are routed by softmax(z)·W_RMᵀ, then top-k, renormalised, to experts Σ_e W_EM[s, e]·W_e. Phase 1: rows are one-hot and
W_RM = W_EM, that is pruning; a layer mutates with probability 0.25, a row of it with 0.15. Phase 2: Gaussian noise of
0.065 on each entry with probability 0.25, crossover with 0.3. Fitness: the task's score.

Ours: the fitness is the mean teacher-forced loss of validation items, which is dense; half of the evaluations for each
phase; a population of 16 of which the better half are parents; W_RM stays ≥ 0, so that weights do. A result of phase
1 alone is an ordinary plan where the router renormalises (then masking is the same).

Such a map is no sliced linear router: the cut keeps all E rows of it, and only leap-serve's architecture serves it. It
saves the memory of E − r experts; top_k, and with it FLOPs, stay.

Cost of an evaluation, in transformers: one forward pass over the items and, to merge, r·E products of each weight of an
expert per layer. Memory: the model, r merged experts of every layer, and 2²⁴ weights at a time with their sums in
float64, up to 256 MiB. No gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from leap_serve.engine import Progress
from leap_serve.errors import CheckpointError, UsageError
from leap_serve.files import write_bytes
from leap_serve.plan import LayerPlan, Merge, Plan
from leap_serve.plan_extras import Row
from leap_serve.provenance import made_by
from leap_serve.tasks.base import Item
from leap_training.batches import collate, token_losses, use_fast_experts
from leap_training.methods.blocks import BlockModel
from leap_training.methods.merged import Maps, check_maps, merged_experts
from leap_training.methods.states import other_search
from leap_training.pruning_space import PruningSpace

Array = npt.NDArray[np.float32]
LAYER, ROW = 0.25, 0.15
"""Phase 1: probability that a layer mutates, and a row of it."""
NOISE, ENTRY, CROSSOVER = 0.065, 0.25, 0.3
"""Phase 2: standard deviation, probability per entry, and of a crossover."""
STATE = "eep.safetensors"
BATCH = 16


@dataclass(frozen=True, slots=True)
class EepConfig:
    """How much is evaluated; seed of all that is drawn."""

    evaluations: int = 500
    population: int = 16
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError where there are too few evaluations for both phases."""
        if self.evaluations < 2 * self.population:
            raise UsageError(
                "--episodes", f"is {self.evaluations}, eep needs two populations of {self.population}", "raise it"
            )


def check_space(space: PruningSpace) -> None:
    """Raise UsageError for plans that eep does not make; to be asked before a model is loaded."""
    if not space.uniform or space.temperatures != (1.0,):
        raise UsageError(
            "--allocation, --temperature", "eep keeps equally many slots and τ = 1", "leave them out"
        )  # fmt: skip


@dataclass(slots=True)
class Candidate:
    """W_EM and W_RM of all layers, [L, r, E] float32 each, and the loss."""

    experts: Array
    router: Array
    loss: float = float("nan")


class TaskLoss:
    """Mean teacher-forced loss per answer token of items under merged experts, in nats."""

    def __init__(self, model: BlockModel, items: Sequence[Item], space: PruningSpace) -> None:
        check_maps(model.family)
        self.model, self.space = model, space
        use_fast_experts(model.model)
        parts = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
        self.batches = [collate(model.tokenizer, part, prompt_weight=0.0).to(model.device) for part in parts]

    @torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
    def __call__(self, one: Candidate) -> float:
        """Evaluate one candidate."""
        experts, router = (torch.from_numpy(maps).to(self.model.device) for maps in (one.experts, one.router))
        layers = {
            index: Maps(experts[at], router[at], k)
            for at, (index, k) in enumerate(zip(self.space.layers, self.space.top_k, strict=True))
        }
        total, tokens = 0.0, 0.0
        with merged_experts(self.model, layers):
            for batch in self.batches:
                logits = self.model.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
                wanted = batch.weights[:, 1:]
                total += float((token_losses(logits, batch) * wanted).double().sum())
                tokens += float(wanted.sum())
        return total / tokens


class Eep:
    """One search; resumable after every generation.

    Args:
        evaluate: a candidate's loss, lower is better.
        space: how many slots a layer keeps; a uniform one without τ.
        config: settings.
        state: folder to save to and to continue from, or None.
        identity: what must be the same for a run to be continued (JSON values).
    """

    def __init__(
        self, evaluate: Callable[[Candidate], float], space: PruningSpace, config: EepConfig,
        state: Path | None = None, identity: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        config.check()
        check_space(space)
        self.evaluate, self.space, self.config = evaluate, space, config
        self.path, self.identity = None if state is None else state / STATE, identity or {}
        self.random = np.random.default_rng(config.seed)
        self.population: list[Candidate] = []
        self.evaluations, self.pruned_loss = 0, float("nan")

    def run(self, progress: Progress | None = None) -> Candidate:
        """Evolve to the end of the evaluations; returns the best candidate."""
        self._resume()
        half = self.config.evaluations // 2
        while self.evaluations < self.config.evaluations:
            first = self.evaluations < half
            limit = half if first else self.config.evaluations
            for child in self._children(first)[: limit - self.evaluations]:
                child.loss = self.evaluate(child)
                self.population.append(child)
                self.evaluations += 1
                if progress is not None:
                    progress(self.evaluations, self.config.evaluations)
            self.population = sorted(self.population, key=lambda one: one.loss)[: self.config.population]
            if self.evaluations == half:
                self.pruned_loss = self.population[0].loss
            self._save()
        return self.population[0]

    def _children(self, first: bool) -> list[Candidate]:
        """Return a generation: at the very beginning drawn at random, then from the better half."""
        count = self.config.population
        if not self.population:
            return [self._drawn() for _ in range(count)]
        parents = self.population[: max(2, count // 2)]
        return [(self._pruning if first else self._merging)(parents) for _ in range(count // 2)]

    def _drawn(self) -> Candidate:
        layers, experts = self.space.shape
        one_hot = np.zeros((layers, self.space.cap, experts), np.float32)
        for layer in one_hot:
            chosen = np.sort(self.random.choice(experts, self.space.cap, replace=False))
            layer[np.arange(self.space.cap), chosen] = 1.0
        return Candidate(one_hot, one_hot.copy())

    def _pruning(self, parents: Sequence[Candidate]) -> Candidate:
        """Phase 1: layers of either parent; then rows change their expert."""
        one, other = (parents[i] for i in self.random.choice(len(parents), 2, replace=False))
        mine = self.random.random(len(one.experts)) < 0.5
        child = np.where(mine[:, None, None], one.experts, other.experts)
        changed = False
        while not changed:  # a copy of a parent would waste an evaluation
            for layer in child:
                if self.random.random() < LAYER:
                    changed |= self._mutate_rows(layer)
            changed |= self.space.cap == self.space.shape[1] or not (mine.all() or not mine.any())
        return Candidate(child, child.copy())

    def _mutate_rows(self, layer: Array) -> bool:
        chosen = layer.argmax(1)
        free = list(np.setdiff1d(np.arange(layer.shape[1]), chosen))
        hit = [row for row in range(len(layer)) if self.random.random() < ROW][: len(free)]
        for row in hit:
            chosen[row] = free.pop(int(self.random.integers(len(free))))
        layer[:] = 0.0
        layer[np.arange(len(layer)), np.sort(chosen)] = 1.0
        return bool(hit)

    def _merging(self, parents: Sequence[Candidate]) -> Candidate:
        """Phase 2: a parent, or layers of two, with noise on both matrices."""
        one, other = (parents[i] for i in self.random.choice(len(parents), 2, replace=False))
        theirs = (self.random.random(len(one.experts)) < 0.5) & (self.random.random() < CROSSOVER)
        found = [
            np.where(theirs[:, None, None], b, a) for a, b in ((one.experts, other.experts), (one.router, other.router))
        ]
        noisy = [value + self._noise(value.shape) for value in found]
        return Candidate(noisy[0], np.maximum(noisy[1], 0.0))

    def _noise(self, shape: tuple[int, ...]) -> Array:
        hit = self.random.random(shape) < ENTRY
        return (self.random.normal(0.0, NOISE, shape) * hit).astype(np.float32)

    def _save(self) -> None:
        """Write the population, the counts and the generator's state in one file."""
        if self.path is None:
            return
        note = {
            "of": self.identity, "evaluations": self.evaluations, "random": self.random.bit_generator.state,
            "losses": [one.loss for one in self.population], "pruned_loss": self.pruned_loss,
        }  # fmt: skip
        tensors = {
            "experts": np.stack([one.experts for one in self.population]),
            "router": np.stack([one.router for one in self.population]),
        }
        write_bytes(self.path, save(tensors, {"eep": json.dumps(note)}))

    def _resume(self) -> None:
        if self.path is None or not self.path.exists():
            return
        try:
            with safe_open(self.path, "np") as file:
                note = json.loads(file.metadata()["eep"])
                experts, router = file.get_tensor("experts"), file.get_tensor("router")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            raise CheckpointError(self.path, "is no state of eep", "remove it, or choose another --state") from None
        for key, value in self.identity.items():
            if note["of"].get(key) != value:
                raise other_search(self.path, key, note["of"].get(key), value)
        self.evaluations, self.pruned_loss = note["evaluations"], note["pruned_loss"]
        self.random.bit_generator.state = note["random"]
        self.population = [Candidate(*pair) for pair in zip(experts, router, note["losses"], strict=True)]


def renormalises(model: BlockModel) -> bool:
    """Whether the model makes the weights of the chosen experts sum to 1."""
    return all(model.family.sums_to_one(layer.router) for layer in model.layers.values())


def plan_of(best: Candidate, space: PruningSpace, renormalises: bool, **provenance: Any) -> Plan:
    """Return the plan of a candidate: an ordinary one where it only prunes and masking says the same."""
    layers = {}
    pruned = all(map(_prunes, best.experts, best.router))
    plain = renormalises and pruned
    for index, k, experts, router in zip(space.layers, space.top_k, best.experts, best.router, strict=True):
        names, order = _names(experts)
        experts, router = experts[order], router[order]
        if plain:
            layers[index] = LayerPlan(names, k)
            continue
        merge = Merge(_rows(experts), _rows(router))
        layers[index] = LayerPlan(names, k, merge=merge)
    does = "the router is mapped" if pruned else "experts are merged and the router mapped"
    notices = [] if plain else [f"{does}: served with leap-serve's architecture only"]
    if pruned:
        notices.append("phase 2 found no merge with a lower loss: the experts are pruned, and none is merged")
    record = made_by(method="eep", notices=[*notices, *space.notices], merged=not pruned, **provenance)
    return Plan(space.routing.base, space.routing.num_experts, layers, made_by=record)


def _prunes(experts: Array, router: Array) -> bool:
    """Whether every slot of a layer is one expert, and the router's own logit of it decides."""
    one_hot = set(np.unique(experts)) <= {0.0, 1.0} and bool((experts.sum(1) == 1).all())
    return one_hot and np.array_equal(experts, router)


def _names(experts: Array) -> tuple[tuple[int, ...], npt.NDArray[np.int64]]:
    """Name the slots by their heaviest experts, and say in which order they then stand; 0…r−1 where two clash."""
    heaviest = experts.argmax(1)
    order = np.argsort(heaviest, kind="stable")
    if len(set(heaviest.tolist())) < len(heaviest):
        return tuple(range(len(experts))), np.arange(len(experts))
    return tuple(map(int, heaviest[order])), order


def _rows(matrix: Array) -> tuple[Row, ...]:
    """Return the sparse rows; one that is all zero keeps an explicit 0 at its first expert."""
    return tuple(tuple((int(e), float(row[e])) for e in np.flatnonzero(row)) or ((0, 0.0),) for row in matrix)
