"""One-shot criteria: a score per routed expert, and the plan that keeps the highest (methods: §1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from leap_serve.checkpoint import Checkpoint
from leap_serve.engine import Progress
from leap_serve.errors import CheckpointError, UnsupportedError, UsageError
from leap_serve.plan import BaseModel, LayerPlan, Plan
from leap_serve.profile import LayerProfile, Profile, groups_of
from leap_serve.provenance import made_by
from leap_serve.weights.tensorfile import TensorEntry

Array = npt.NDArray[np.float64]
Scores = Mapping[int, Array]
"""MoE layer → saliency of its experts, [E] float64; higher is kept."""


def _per_hit(total: Array, hits: Array) -> Array:
    """Return the mean per routed token; an expert that was never hit scores 0."""
    return np.divide(total, hits, out=np.zeros_like(total), where=hits > 0)


OBSERVED: Mapping[str, Callable[[LayerProfile], Array]] = {
    "frequency": lambda layer: layer.n,
    "gate-mass": lambda layer: layer.m,
    "ean": lambda layer: layer.a,
    "ean-mean": lambda layer: _per_hit(layer.a, layer.n),
    "ean-weighted": lambda layer: layer.w,
    # REAP (Lasby et al. 2025): mean of g‖f‖ over the tokens that were routed to the expert.
    "reap": lambda layer: _per_hit(layer.w, layer.n),
}
DATA_FREE = ("magnitude", "random")
METHODS = (*OBSERVED, *DATA_FREE)


@dataclass(frozen=True, slots=True)
class Routing:
    """What an allocation must know of the model.

    Args:
        base: the model.
        num_experts: routed experts per MoE layer (E).
        top_k: MoE layer → experts per token.
        groups: groups of group-limited routing, 1 without.
        chosen_groups: groups a token may choose from, 1 without.
    """

    base: BaseModel
    num_experts: int
    top_k: Mapping[int, int]
    groups: int = 1
    chosen_groups: int = 1

    @classmethod
    def of(cls, source: Profile | Checkpoint) -> Routing:
        """Read it off a profile, or a full model's checkpoint."""
        if isinstance(source, Profile):
            return cls(source.base, source.num_experts, source.top_k, source.groups, source.chosen_groups)
        if source.plan is not None:
            raise UnsupportedError(source.folder, "is a cut checkpoint", "search on the full model, then cut it once")
        top_k = dict.fromkeys(source.moe_layers, source.top_k)
        return cls(source.identity(), source.num_experts, top_k, *groups_of(source))


def scores(
    source: Profile | Checkpoint, method: str, seed: int = 0, progress: Progress | None = None
) -> dict[int, Array]:
    """Score every expert: {layer: [E] float64}.

    ``magnitude`` reads the weights of a Checkpoint (``progress``: matrices done, in all), ``random`` takes either, all
    others a Profile.
    Raises UsageError where method and source do not fit.
    """
    if method == "random":
        layers, experts = Routing.of(source).top_k, source.num_experts
        return {layer: np.random.default_rng([seed, layer]).random(experts) for layer in layers}
    if method == "magnitude":
        if not isinstance(source, Checkpoint):
            raise UsageError("--method magnitude", "reads weights, not a profile", "give the model instead")
        return magnitude(source, progress)
    if method not in OBSERVED:
        raise UsageError("--method", f"there is no method {method!r}", f"choose one of {', '.join(METHODS)}")
    if not isinstance(source, Profile):
        raise UsageError(f"--method {method}", "needs a profile, not a model", "make one with leap profile")
    return {index: OBSERVED[method](layer).copy() for index, layer in source.layers.items()}


def magnitude(checkpoint: Checkpoint, progress: Progress | None = None) -> dict[int, Array]:
    """Frobenius norm of an expert's gate, up and down weights together (LEAP §4.1), read expert by expert.

    Biases do not count. ``progress`` is called with matrices done and matrices in all. Raises UnsupportedError for
    quantised weights.
    """
    squares = {layer: np.zeros(checkpoint.num_experts) for layer in checkpoint.moe_layers}
    parts: list[tuple[TensorEntry, int, int, int | None]] = []
    for name, entry in checkpoint.tensors.items():
        role = checkpoint.role(name)
        if role.layer not in squares or role.kind not in ("expert", "fused"):
            continue
        if len(entry.shape) == (3 if role.kind == "fused" else 2):
            ids = range(entry.shape[0]) if role.kind == "fused" else (role.expert,)
            parts += [(entry, role.layer, expert, expert if role.kind == "fused" else None) for expert in ids]
        elif entry.dtype not in _READ:
            raise UnsupportedError(name, f"holds {entry.dtype}: the experts are quantised", "choose another --method")
    for done, (entry, layer, expert, row) in enumerate(parts, 1):
        squares[layer][expert] += _sum_of_squares(entry, row)
        if progress is not None:
            progress(done, len(parts))
    return {layer: np.sqrt(total) for layer, total in squares.items()}


_READ: Mapping[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def _sum_of_squares(entry: TensorEntry, row: int | None) -> float:
    """Σ x² of a tensor, or of one index of its dimension 0, in float64."""
    if entry.dtype not in _READ:
        raise UnsupportedError(entry.name, f"holds {entry.dtype}, not floats", "choose another --method than magnitude")
    count = math.prod(entry.shape[1:] if row is not None else entry.shape)
    dtype = np.dtype(_READ[entry.dtype])
    raw = np.memmap(entry.file, dtype, "r", entry.begin + (row or 0) * count * dtype.itemsize, (count,))
    # bfloat16 is the upper half of a float32.
    values = (raw.astype("<u4") << 16).view("<f4") if entry.dtype == "BF16" else raw
    total = float(np.square(values, dtype=np.float64).sum())
    if not math.isfinite(total):
        raise CheckpointError(entry.file, f"tensor {entry.name} holds non-finite values", "restore the weights")
    return total


def super_experts(profile: Profile) -> dict[int, frozenset[int]]:
    """Return experts whose loss would wreck the model, by layer (Su et al. 2025, «super experts»).

    Their largest |f| exceeds the 99.5 % quantile over all experts and a tenth of the overall maximum;
    only the first three quarters of the MoE layers are considered.
    """
    peaks = np.concatenate([layer.max for layer in profile.layers.values()])
    bar = max(float(np.quantile(peaks, 0.995)), float(peaks.max()) / 10)
    early = list(profile.layers)[: math.ceil(0.75 * len(profile.layers))]
    found = {index: frozenset(np.flatnonzero(profile.layers[index].max > bar).tolist()) for index in early}
    return {index: experts for index, experts in found.items() if experts}


def allocate(
    found: Scores,
    routing: Routing,
    *,
    experts: int | None = None,
    budget: float | None = None,
    allocation: str = "uniform",
    top_k: int | None = None,
    temperature: float = 1.0,
    protect: Mapping[int, frozenset[int]] | None = None,
    **provenance: Any,
) -> Plan:
    """Keep the highest scores; exactly one of ``experts`` (per layer) and ``budget`` (fraction of all) is given.

    uniform: the same number in every layer, round(budget·E). global: one ranking over all layers,
    round(budget·L·E) experts in all, and never fewer than a layer's top_k. Since norms grow with
    depth, the global ranking compares each expert's share of its layer's total score; this changes
    nothing for frequency and gate mass, whose totals are equal in all layers. Ties go to the lower
    layer, then the lower id. Under group-limited routing every group keeps equally many.

    Args:
        found: scores by layer, [E] each.
        routing: of the same model.
        top_k: experts per token of the plan; None keeps the model's.
        temperature: router temperature τ for all layers.
        protect: experts ranked above all others (see :func:`super_experts`).
        provenance: what else ``made_by`` shall record.

    A layer that keeps fewer than top_k experts gets a smaller top_k; ``made_by["notices"]`` says so.
    Raises UsageError for a budget that cannot be met.
    """
    check_top_k(top_k, routing)
    if routing.num_experts % routing.groups:
        raise UnsupportedError(
            "routing", f"{routing.num_experts} experts in {routing.groups} groups", "restore config.json"
        )
    wanted = {layer: top_k or own for layer, own in routing.top_k.items()}
    ranked = {layer: _rank(found[layer], routing.groups, (protect or {}).get(layer, frozenset())) for layer in wanted}
    notices: list[str] = []
    if allocation == "uniform":
        rounds = _uniform(ranked, routing, experts, budget, notices)
    elif allocation == "global":
        rounds = _global(ranked, routing, wanted, experts, budget)
    else:
        raise UsageError("--allocation", f"there is no {allocation!r}", "choose uniform or global")
    layers = {}
    for layer, take in rounds.items():
        reach = min(routing.groups, routing.chosen_groups) * take
        retained = sorted(int(e) for e in ranked[layer].experts[:take].ravel())
        layers[layer] = LayerPlan(tuple(retained), min(wanted[layer], reach), temperature)
    lowered = [layer for layer in layers if layers[layer].top_k < wanted[layer]]
    if lowered:
        notices.append(lowered_notice(lowered))
    record = made_by(allocation=allocation, budget=budget, experts=experts, notices=notices, **provenance)
    kept = {layer: tuple(map(float, found[layer])) for layer in layers}
    return Plan(routing.base, routing.num_experts, layers, kept, record)


def check_top_k(top_k: int | None, routing: Routing) -> None:
    """Raise UsageError for a top_k that the cut would refuse: every layer must have it."""
    most = min(routing.top_k.values())
    if top_k is not None and not 1 <= top_k <= most:
        raise UsageError("--top-k", f"is {top_k}, the model's is {most}", f"give 1 to {most}")


def lowered_notice(layers: Sequence[int]) -> str:
    """What a plan says of layers that retain fewer experts than a token would be routed to."""
    return f"top_k is lowered to the number of experts that can be chosen, in layers {list(layers)}"


@dataclass(frozen=True, slots=True)
class _Ranking:
    """A layer's experts in rounds of one per group, best first: ids [rounds, groups], what each round is worth."""

    experts: npt.NDArray[np.int64]
    guarded: npt.NDArray[np.bool_]
    share: Array


def _rank(score: Array, groups: int, protected: frozenset[int]) -> _Ranking:
    guard = np.isin(np.arange(score.size), list(protected))
    order = np.lexsort((np.arange(score.size), -score, ~guard))
    per_group = score.size // groups
    experts = np.stack([order[order // per_group == group] for group in range(groups)], axis=1)
    total = float(score.sum())
    share = score[experts].sum(1) / (total if total > 0 else 1.0)
    return _Ranking(experts, guard[experts].any(1), share)


def _uniform(
    ranked: Mapping[int, _Ranking], routing: Routing, experts: int | None, budget: float | None, notices: list[str]
) -> dict[int, int]:
    """Return rounds per layer, the same everywhere."""
    count = _count(routing.num_experts, experts, budget, "per layer")
    take = max(1, _round(count / routing.groups))
    if take * routing.groups != count:
        notices.append(f"{take * routing.groups} experts per layer instead of {count}: {routing.groups} groups alike")
    return dict.fromkeys(ranked, take)


def _global(
    ranked: Mapping[int, _Ranking],
    routing: Routing,
    wanted: Mapping[int, int],
    experts: int | None,
    budget: float | None,
) -> dict[int, int]:
    """Return rounds per layer: the floors, then the best of what is left in any layer."""
    count = _count(routing.num_experts * len(ranked), experts and experts * len(ranked), budget, "in all")
    total = _round(count / routing.groups)
    floors = {layer: -(-k // min(routing.groups, routing.chosen_groups)) for layer, k in wanted.items()}
    if total < sum(floors.values()):
        raise UsageError(
            "--budget" if experts is None else "--experts",
            f"keeps {count} experts in all, but {len(ranked)} layers with their top_k need "
            f"{sum(floors.values()) * routing.groups}",
            "keep more, lower --top-k, or choose --allocation uniform",
        )  # fmt: skip
    left = [
        (not ranking.guarded[place], -ranking.share[place], layer, place)
        for layer, ranking in ranked.items()
        for place in range(floors[layer], len(ranking.share))
    ]
    rounds = dict(floors)
    for _, _, layer, _ in sorted(left)[: total - sum(floors.values())]:
        rounds[layer] += 1
    return rounds


def _count(whole: int, experts: int | None, budget: float | None, what: str) -> int:
    if (experts is None) == (budget is None):
        raise UsageError("--budget, --experts", "exactly one is needed", "give one of them")
    if budget is not None:
        if not 0.0 < budget <= 1.0:
            raise UsageError(
                "--budget", f"is {budget}, not a fraction in (0, 1]", "give the fraction of experts to keep"
            )
        return max(1, _round(budget * whole))
    assert experts is not None
    if not 1 <= experts <= whole:
        raise UsageError("--experts", f"asks for {experts} {what}, there are {whole}", "choose a number within")
    return experts


def _round(value: float) -> int:
    """Round half up: the same budget never rounds down in one place and up in another."""
    return math.floor(value + 0.5)
