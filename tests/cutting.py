"""What the tests of the cut share: uneven plans, and what a cut must hold by plain slicing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import Checkpoint
from leap_serve.plan import LayerPlan, Plan

ROUTERS = ("gate.weight", "gate.e_score_correction_bias", "router.weight", "router.bias")
FOUR_LAYERS: Sequence[tuple[int, ...]] = ((0, 2, 5), (1, 3, 4, 7), (0, 1, 2, 3, 4, 5, 6, 7), (6, 7))
UNEVEN: Mapping[int, LayerPlan] = {0: LayerPlan((0, 2, 5), 2), 1: LayerPlan((1, 3, 4, 7), 2, 2.0)}
EVEN: Mapping[int, LayerPlan] = {0: LayerPlan((0, 2, 5), 2), 1: LayerPlan((1, 3, 7), 2)}
"""Of the synthetic model of two layers, eight experts each."""


def plan_of(model: Path, layers: Mapping[int, LayerPlan] = UNEVEN) -> Plan:
    """A plan for the synthetic model of two layers, or one that does not fit it."""
    return Plan(Checkpoint.open(model).identity(), 8, layers)


def plan_for(folder: Path, ids: Callable[[int], Sequence[int]], top_k: int | None = None, tau: float = 1.0) -> Plan:
    """A plan for every MoE layer of a model: ids(layer) and one τ."""
    model = Checkpoint.open(folder)
    layers = {
        layer: LayerPlan(tuple(ids(layer)), min(top_k or model.top_k, len(ids(layer))), tau)
        for layer in model.moe_layers
    }
    return Plan(model.identity(), model.num_experts, layers)


def uneven(layer: int) -> Sequence[int]:
    return FOUR_LAYERS[layer % 4]


def expected_of(
    tensors: Mapping[str, Any], ids: Callable[[int], Sequence[int]], take: Callable[..., Any]
) -> dict[str, Any]:
    """What the cut must hold, from the names alone and by plain slicing."""
    out = {}
    for name, value in tensors.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if expert and layer:
            retained = list(ids(int(layer[1])))
            if int(expert[1]) in retained:
                out[name.replace(expert[0], f".experts.{retained.index(int(expert[1]))}.")] = value
        elif layer and (".experts." in name or (name.endswith(ROUTERS) and "shared" not in name)):
            out[name] = take(value, list(ids(int(layer[1]))))
        else:
            out[name] = value
    return out


def take_rows(value: tuple[str, tuple[int, ...], bytes], ids: list[int]) -> tuple[str, tuple[int, ...], bytes]:
    """Slice dimension 0 of raw bytes."""
    dtype, shape, blob = value
    size = len(blob) // shape[0]
    return dtype, (len(ids), *shape[1:]), b"".join(blob[i * size : (i + 1) * size] for i in ids)
