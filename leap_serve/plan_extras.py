"""What a plan may say of a layer beside its experts, top_k and τ: the second version of the plan's format.

E experts of the full model, r retained. A plan that says none of this is written as version 1, byte for byte as
before; a leap-serve that knows version 1 only refuses the others instead of misreading them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from leap_serve.errors import PlanError

if TYPE_CHECKING:
    from leap_serve.plan import LayerPlan

Row = tuple[tuple[int, float], ...]
"""A sparse row over the full model's experts: (id, coefficient), ids strictly increasing."""
KEYS = ("skip", "channels", "ranks", "merge")
"""Keys of the JSON form, each {layer: value}; absent where no layer has it."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Merged experts: the weights of slot s are Σ_e experts[s][e]·W_e.

    Args:
        experts: W_EM, one row per retained slot.
        router: the router map W_RM, one row per slot; empty where the router is cut to the retained ids as usual.
            With a map the router keeps all its E rows.
        applied: "probabilities": softmax(z)·W_RMᵀ [T, r], then top-k and renormalising (EEP); "ids": the full
            router's top-k, then each chosen expert is replaced by the slot that it is in (HC-SMoE).
    """

    experts: tuple[Row, ...]
    router: tuple[Row, ...] = ()
    applied: Literal["probabilities", "ids"] = "probabilities"

    def slots(self, num_experts: int) -> list[int]:
        """Of a map that is applied to ids: expert → its slot."""
        found = {expert: slot for slot, row in enumerate(self.router) for expert, _ in row}
        return [found[expert] for expert in range(num_experts)]

    def matrix(self, num_experts: int) -> list[list[float]]:
        """The router map W_RM as rows [r][E]."""
        dense = [[0.0] * num_experts for _ in self.router]
        for values, row in zip(dense, self.router, strict=True):
            for expert, weight in row:
                values[expert] = weight
        return dense


@dataclass(frozen=True, slots=True)
class Zeroed:
    """Single weights set to zero (MoE-Pruner's own form); shapes, memory and time in a dense kernel stay.

    Args:
        pattern: "row" (the lowest scores of every output row) or "2:4" (two of every four along the input).
        ratio: fraction of the weights that is zeroed; 0.5 for 2:4.
        profile: folder of the profile whose channel sums decide.
        profile_sha256: of its tensors.
    """

    pattern: Literal["row", "2:4"]
    ratio: float
    profile: str
    profile_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "pattern": self.pattern, "ratio": self.ratio, "profile": self.profile,
            "profile_sha256": self.profile_sha256,
        }  # fmt: skip

    @property
    def essence(self) -> list[Any]:
        """What decides the weights; where the profile lies is no part of it."""
        return [self.pattern, self.ratio, self.profile_sha256]


def check(where: object, index: int, layer: LayerPlan, num_experts: int) -> None:
    """Raise PlanError on the first thing of a layer's extras that cannot be right."""

    def refuse(what: str, remedy: str = "make the plan again with leap search") -> PlanError:
        return PlanError(where, f"layer {index} {what}", remedy)

    count = len(layer.retained)
    if layer.skip is not None and not (0.0 < layer.skip <= 1.0 and layer.top_k > 1):
        raise refuse(f"skips below {layer.skip} with top_k {layer.top_k}", "give β in (0, 1] and a top_k above 1")
    if sum(map(bool, (layer.channels, layer.ranks, layer.merge))) > 1:
        raise refuse("narrows, factors or merges its experts at once", "choose one of them")
    if layer.channels:
        widths = {len(kept) for kept in layer.channels}
        sorted_ = all(kept and kept[0] >= 0 and list(kept) == sorted(set(kept)) for kept in layer.channels)
        if len(layer.channels) != count or len(widths) != 1 or not sorted_:
            raise refuse("does not keep equally many channels of each retained expert, in increasing order")
    if layer.ranks and (len(layer.ranks) != count or min(layer.ranks) < 1):
        raise refuse(f"has {len(layer.ranks)} ranks for {count} experts, or one below 1")
    if layer.merge is not None:
        _check_merge(refuse, layer.merge, count, num_experts)


def _check_merge(refuse: Any, merge: Merge, count: int, num_experts: int) -> None:
    for name, rows in (("experts", merge.experts), ("router map", merge.router)):
        if len(rows) != count and (rows or name == "experts"):
            raise refuse(f"merges into {len(rows)} {name} where it retains {count}")
        for row in rows:
            ids = [expert for expert, _ in row]
            inside = ids == sorted(set(ids)) and ids and ids[0] >= 0 and ids[-1] < num_experts
            if not inside or not all(math.isfinite(weight) for _, weight in row):
                raise refuse(f"has a row of its {name} that names no expert, an unknown one, or a weight not finite")
    if merge.applied not in ("probabilities", "ids"):
        raise refuse(f"applies its router map to {merge.applied!r}")
    if merge.applied == "ids":
        named = sorted(expert for row in merge.router for expert, _ in row)
        if named != list(range(num_experts)) or any(weight != 1.0 for row in merge.router for _, weight in row):
            raise refuse("maps ids, but not every expert to one slot with weight 1")


def to_json(layers: Mapping[int, LayerPlan]) -> dict[str, Any]:
    """Return the extras of all layers, {} where there are none."""
    found: dict[str, dict[str, Any]] = {}
    for index, layer in layers.items():
        for key, value in _layer_json(layer).items():
            found.setdefault(key, {})[str(index)] = value
    return {key: found[key] for key in KEYS if key in found}


def _layer_json(layer: LayerPlan) -> dict[str, Any]:
    value: dict[str, Any] = {}
    if layer.skip is not None:
        value["skip"] = layer.skip
    if layer.channels:
        # One bit per channel: a list of numbers would be thirty times as long.
        value["channels"] = [f"{sum(1 << channel for channel in kept):x}" for kept in layer.channels]
    if layer.ranks:
        value["ranks"] = list(layer.ranks)
    if layer.merge is not None:
        value["merge"] = {"experts": _rows_json(layer.merge.experts)}
        if layer.merge.router:
            value["merge"] |= {"router": _rows_json(layer.merge.router), "applied": layer.merge.applied}
    return value


def from_json(value: Mapping[str, Any], index: str) -> dict[str, Any]:
    """Return LayerPlan's further arguments for one layer; KeyError, TypeError or ValueError where they are ill-formed."""
    found: dict[str, Any] = {}
    of = {key: value[key][index] for key in KEYS if index in value.get(key, {})}
    if "skip" in of:
        found["skip"] = float(of["skip"])
    if "channels" in of:
        found["channels"] = tuple(_bits(int(text, 16)) for text in of["channels"])
    if "ranks" in of:
        found["ranks"] = tuple(int(rank) for rank in of["ranks"])
    if "merge" in of:
        merge = of["merge"]
        found["merge"] = Merge(
            _rows(merge["experts"]), _rows(merge.get("router", [])), merge.get("applied", "probabilities")
        )
    return found


def zeroed_of(value: Any) -> Zeroed | None:
    """Parse the plan's ``zeroed``; ValueError where it is ill-formed."""
    if value is None:
        return None
    found = Zeroed(value["pattern"], float(value["ratio"]), str(value["profile"]), str(value["profile_sha256"]))
    known = found.pattern == "row" or (found.pattern == "2:4" and found.ratio == 0.5)
    if not known or not 0.0 < found.ratio < 1.0:
        raise ValueError(f"zeroes {found.ratio} by {found.pattern!r}")
    return found


def essence(layer: LayerPlan) -> list[Any]:
    """What the fingerprint adds for a layer: nothing where it has no extras."""
    value = _layer_json(layer)
    return [value] if value else []


def _bits(mask: int) -> tuple[int, ...]:
    if mask < 0:
        raise ValueError("a negative mask of channels")
    return tuple(place for place, bit in enumerate(reversed(f"{mask:b}")) if bit == "1")


def _rows_json(rows: Sequence[Row]) -> list[list[list[float]]]:
    return [[[expert, weight] for expert, weight in row] for row in rows]


def _rows(value: Any) -> tuple[Row, ...]:
    return tuple(tuple((int(expert), float(weight)) for expert, weight in row) for row in value)
