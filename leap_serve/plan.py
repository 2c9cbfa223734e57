"""A plan: which experts every MoE layer retains, its top_k and its router temperature.

The JSON form of a plan is ``plan.json`` as well as, beside a cut checkpoint, ``leap.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leap_serve.errors import LeapError, PlanError
from leap_serve.files import read_json, write_json

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The full model that a plan speaks of: its name, revision and the SHA-256 that identifies its weights."""

    id: str
    sha256: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One MoE layer: original ids of the retained experts (strictly increasing), top_k and temperature τ."""

    retained: tuple[int, ...]
    top_k: int
    temperature: float = 1.0

    def old_to_new(self) -> dict[int, int]:
        """Map an expert's original id to its id in the cut checkpoint."""
        return {old: new for new, old in enumerate(self.retained)}


@dataclass(frozen=True, slots=True)
class Plan:
    """Retained experts for every MoE layer of a base model.

    Args:
        base: the full model.
        num_experts: routed experts per MoE layer of the full model (E).
        layers: MoE layer index → LayerPlan, in increasing order of layers.
        scores: optional saliency per layer, E floats each; not part of the fingerprint.
        made_by: provenance; not part of the fingerprint.
    """

    base: BaseModel
    num_experts: int
    layers: Mapping[int, LayerPlan]
    scores: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check("plan")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the routing: base weights, E, retained ids, top_k, τ."""
        return _fingerprint(self)

    @property
    def counts(self) -> list[int]:
        """Retained experts per MoE layer, in the order of the layers."""
        return [len(layer.retained) for layer in self.layers.values()]

    @property
    def is_uniform(self) -> bool:
        """Whether a stock engine can hold the cut: equal counts and top_k everywhere and every τ = 1."""
        return (
            len({(len(layer.retained), layer.top_k) for layer in self.layers.values()}) == 1
            and all(layer.temperature == 1.0 for layer in self.layers.values())
        )  # fmt: skip

    def check(self, where: object) -> None:
        """Raise PlanError on the first thing that cannot be right."""
        if not self.layers:
            raise PlanError(where, "no MoE layer is planned", "give at least one layer")
        if list(self.layers) != sorted(self.layers):
            raise PlanError(where, f"layers are out of order: {list(self.layers)}", "list them in increasing order")
        for index, layer in self.layers.items():
            ids = layer.retained
            if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= self.num_experts:
                raise PlanError(
                    where,
                    f"layer {index} retains {_short(ids)}, not strictly increasing ids within 0…{self.num_experts - 1}",
                    "sort the ids and remove duplicates and unknown experts",
                )
            if layer.top_k < 1 or len(ids) < layer.top_k:
                raise PlanError(
                    where,
                    f"layer {index} retains {len(ids)} experts but its top_k is {layer.top_k}",
                    f"cut again, or set top_k[{index}] to {len(ids)}",
                )
            if not (0.0 < layer.temperature < float("inf")):
                raise PlanError(
                    where, f"layer {index} has temperature {layer.temperature}", "give a positive, finite temperature"
                )
        for index, scores in self.scores.items():
            if len(scores) != self.num_experts:
                raise PlanError(
                    where, f"layer {index} has {len(scores)} scores for {self.num_experts} experts", "make it again"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; layer numbers become strings."""
        return {
            "format_version": FORMAT_VERSION,
            "base_model": {"id": self.base.id, "revision": self.base.revision, "sha256": self.base.sha256},
            "num_experts": self.num_experts,
            "retained": {str(index): list(layer.retained) for index, layer in self.layers.items()},
            "top_k": {str(index): layer.top_k for index, layer in self.layers.items()},
            "temperature": {str(index): layer.temperature for index, layer in self.layers.items()},
            "scores": {str(index): list(scores) for index, scores in self.scores.items()},
            "fingerprint": self.fingerprint,
            "made_by": dict(self.made_by),
        }

    @classmethod
    def from_json(cls, value: Any, where: object) -> Plan:
        """Parse the JSON form; ``where`` names the file in errors. Refuses unknown versions and a wrong fingerprint."""
        if not isinstance(value, dict):
            raise PlanError(where, f"holds {type(value).__name__}, not an object", "make it again with leap search")
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            raise PlanError(
                where, f"format_version is {version!r}, this leap-serve reads {FORMAT_VERSION}",
                "update leap-serve, or make the file again",
            )  # fmt: skip
        try:
            base = value["base_model"]
            layers = {
                int(index): LayerPlan(
                    tuple(int(i) for i in ids), int(value["top_k"][index]), float(value["temperature"][index])
                )
                for index, ids in sorted(value["retained"].items(), key=lambda pair: int(pair[0]))
            }
            plan = cls(
                base=BaseModel(str(base["id"]), str(base["sha256"]), base.get("revision")),
                num_experts=int(value["num_experts"]),
                layers=layers,
                scores={int(i): tuple(map(float, s)) for i, s in value.get("scores", {}).items()},
                made_by=value.get("made_by", {}),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(where, f"is incomplete or ill-formed ({error!r})", "make it again") from None
        except LeapError as error:
            raise PlanError(where, error.what, error.remedy) from None
        stated = value.get("fingerprint")
        if stated != plan.fingerprint:
            raise PlanError(
                where, f"says fingerprint {str(stated)[:12]}…, its contents give {plan.fingerprint[:12]}…",
                "the file was edited by hand; make it again",
            )  # fmt: skip
        return plan

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read plan.json or leap.json."""
        return cls.from_json(read_json(path), path)

    def save(self, path: Path) -> None:
        """Write plan.json atomically."""
        write_json(path, self.to_json())


def _fingerprint(plan: Plan) -> str:
    essence = [
        plan.base.sha256,
        plan.num_experts,
        [[index, list(layer.retained), layer.top_k, float(layer.temperature)] for index, layer in plan.layers.items()],
    ]
    return hashlib.sha256(json.dumps(essence, separators=(",", ":")).encode()).hexdigest()


def _short(ids: tuple[int, ...]) -> str:
    return str(list(ids)) if len(ids) <= 8 else f"[{', '.join(map(str, ids[:8]))}, …]"
