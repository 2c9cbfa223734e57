"""HC-SMoE: experts that put out the same on average are merged, and the router's choices follow.

Paper: Chen et al. 2024, «Retraining-Free Merging of Sparse Mixture-of-Experts via Hierarchical Clustering»: each
expert is represented by its mean output over the calibration tokens (all of them, not only those routed to it);
hierarchical clustering with average linkage and Euclidean distances until r clusters are left; the weights of a
cluster are averaged by how often its experts were chosen; a token that chooses an expert gets its cluster's.

Ours: an expert set that was never chosen is averaged evenly; ties in the clustering go to the lowest ids. The router
keeps all E rows and its own top-k, lowered to r where r is less, then ids are mapped; two choices of one cluster both
count. So a token may use fewer distinct experts, and memory falls as with pruning. Where the router's weight multiplies
the expert's input (Llama-4) the mean output is that of f(σ(z)·x), not of f(x). Only leap-serve's architecture serves that.

Cost: one forward pass over the items and every expert on every token once. Memory: the model, 2²⁴ numbers of expert
outputs at a time (128 MiB in float64), and (3·E·H + E²)·8 bytes for means and their distances, while the layers' inputs
lie on disk (T·H per layer). No gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leap_serve.checkpoint import Checkpoint
from leap_serve.cut.rules import unfit_expert
from leap_serve.engine import Progress
from leap_serve.errors import UnsupportedError
from leap_serve.plan import LayerPlan, Merge, Plan
from leap_serve.provenance import made_by
from leap_serve.weights.matrices import DTYPES
from leap_training.methods.blocks import CHUNK, BlockModel, Captured, LayerResults, MoeLayer
from leap_training.methods.naee import check_temperatures
from leap_training.pruning_space import PruningSpace
from leap_training.saliency import Array


def check_merge(checkpoint: Checkpoint, method: str) -> None:
    """Raise UnsupportedError where the cut could not merge the experts; to be asked before a model is loaded."""
    if unfit := unfit_expert(checkpoint, lambda _, entry: entry.dtype in DTYPES):
        raise UnsupportedError(
            f"--method {method}", f"merges unquantised experts; {unfit} is none", "choose a --method that merges none"
        )


@torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
def mean_outputs(layer: MoeLayer, index: int, captured: Captured) -> tuple[Array, Array]:
    """Return every expert's mean output [E, H] and how often it is chosen [E], both float64."""
    experts = int(layer.block.experts.num_experts)
    every = LayerPlan(tuple(range(experts)), layer.top_k)
    total: torch.Tensor | None = None
    counts = torch.zeros(experts, dtype=torch.float64, device=captured.device)
    for item in range(len(captured.tokens)):
        x = captured.read(item, index)
        for part in x.split(max(1, CHUNK // (experts * x.shape[1]))):
            z = layer.logits(part)
            ids = torch.arange(experts, device=x.device).expand(len(part), -1)
            found = layer.contributions(part, z, ids).double().sum(0)
            total = found if total is None else total + found
            counts += (layer.weights(z, [every])[0] > 0).double().sum(0)
    assert total is not None, "no items were captured"
    return (total / sum(captured.tokens)).cpu().numpy(), counts.cpu().numpy()


def clusters(points: Array, count: int) -> list[list[int]]:
    """Cluster points [E, H] hierarchically: average linkage, Euclidean; each cluster sorted, in order of its first."""
    found = [[expert] for expert in range(len(points))]
    # A row at a time: all differences at once would be [E, E, H].
    apart = np.stack([np.linalg.norm(points - one, axis=-1) for one in points])
    np.fill_diagonal(apart, np.inf)
    while len(found) > count:
        one, other = divmod(int(apart.argmin()), len(found))
        a, b = len(found[one]), len(found[other])
        # The mean of all pairs' distances, from those of the two parts (Lance–Williams).
        row = (a * apart[one] + b * apart[other]) / (a + b)
        row[one] = np.inf
        apart[one], apart[:, one] = row, row
        apart = np.delete(np.delete(apart, other, 0), other, 1)
        found[one] = sorted(found[one] + found.pop(other))
    return found


def merged(layer: LayerPlan, found: Sequence[Sequence[int]], counts: Sequence[float]) -> LayerPlan:
    """Return the plan of a layer whose clusters are merged by frequency; a slot is named for its lowest expert."""
    experts = []
    for cluster in found:
        total = sum(counts[expert] for expert in cluster)
        experts.append(tuple((e, counts[e] / total if total else 1.0 / len(cluster)) for e in cluster))
    router = tuple(tuple((expert, 1.0) for expert in cluster) for cluster in found)
    retained = tuple(cluster[0] for cluster in found)
    return LayerPlan(retained, layer.top_k, layer.temperature, merge=Merge(tuple(experts), router, "ids"))


def hc_smoe(
    model: BlockModel,
    ids: Sequence[Sequence[int]],
    space: PruningSpace,
    folder: Path,
    results: LayerResults,
    progress: Progress | None = None,
    capturing: Progress | None = None,
    **provenance: Any,
) -> Plan:
    """Merge every layer's experts into ``space.cap`` of them; layers that ``results`` knows are not looked at again.

    Arguments as of :func:`leap_training.methods.naee.naee`.
    """
    check_temperatures(model.family, space.temperatures)
    layers: dict[int, LayerPlan] = {}
    for number, (index, k) in enumerate(zip(space.layers, space.top_k, strict=True), 1):
        if results.get(index) is None:
            captured = model.captured(ids, folder, space.layers, capturing)
            means, counts = mean_outputs(model.layers[index], index, captured)
            results.put(index, {"clusters": clusters(means, space.cap), "counts": counts.tolist()})
        known = results.get(index)
        every = tuple(range(space.routing.num_experts))
        layers[index] = merged(LayerPlan(every, k, space.temperature), known["clusters"], known["counts"])
        if progress is not None:
            progress(number, len(space.layers))
    record = made_by(
        method="hc-smoe", clusters={str(index): results.get(index)["clusters"] for index in layers},
        notices=[
            "experts are merged and the router's choices mapped: served with leap-serve's architecture only",
            *space.notices,
        ],
        **provenance,
    )  # fmt: skip
    return Plan(space.routing.base, space.routing.num_experts, layers, made_by=record)
