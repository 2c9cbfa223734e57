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

from leap_serve import plan_extras
from leap_serve.errors import LeapError, PlanError
from leap_serve.files import read_json, write_json
from leap_serve.plan_extras import Merge as Merge  # one import serves whoever makes plans
from leap_serve.plan_extras import Zeroed as Zeroed

FORMAT_VERSIONS = (1, 2)
"""Version 2 is written where a layer has extras (plan_extras.py) or weights are zeroed, version 1 otherwise."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The full model that a plan speaks of: its name, revision and the SHA-256 that identifies its weights."""

    id: str
    sha256: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One MoE layer: what it retains, how it routes, and what becomes of its experts' weights.

    Args:
        retained: original ids of the retained experts, strictly increasing. Of merged experts one of each, or, where
            two slots would have the same one (EEP's), the slots' numbers 0…r−1, which then say nothing of experts.
        top_k: experts per token.
        temperature: router temperature τ.
        skip: β of dynamic skipping (NAEE): a chosen expert whose weight is below β times the token's highest is
            left out, and the others are renormalised iff the model does; None: nothing is skipped.
        channels: of each retained expert, the intermediate channels that stay; empty: all.
        ranks: of each retained expert, the rank that its matrices are truncated to; empty: full.
        merge: what the retained slots are made of; None: each is its own expert.
    """

    retained: tuple[int, ...]
    top_k: int
    temperature: float = 1.0
    skip: float | None = None
    channels: tuple[tuple[int, ...], ...] = ()
    ranks: tuple[int, ...] = ()
    merge: Merge | None = None

    @property
    def width(self) -> int | None:
        """Intermediate channels per expert that stay; None: all."""
        return len(self.channels[0]) if self.channels else None

    @property
    def maps_router(self) -> bool:
        """Whether the router keeps all its rows, and a map leads from them to the retained slots."""
        return self.merge is not None and bool(self.merge.router)

    @property
    def is_masking(self) -> bool:
        """Whether masking the full model's router gives the same answers as the cut."""
        return self.skip is None and not self.channels and not self.ranks and self.merge is None

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
        zeroed: single weights that are set to zero, or None.
    """

    base: BaseModel
    num_experts: int
    layers: Mapping[int, LayerPlan]
    scores: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)
    zeroed: Zeroed | None = None

    def __post_init__(self) -> None:
        self.check("plan")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the answers: base weights, E, retained ids, top_k, τ, and extras where there are any."""
        return _fingerprint(self)

    @property
    def counts(self) -> list[int]:
        """Retained experts per MoE layer, in the order of the layers."""
        return [len(layer.retained) for layer in self.layers.values()]

    @property
    def is_uniform(self) -> bool:
        """Whether a stock engine can hold the cut: equal counts, top_k and widths everywhere, every τ = 1, no skipping.

        Merged experts are never held by one: what merges, and where the router maps to it, is ours alone.
        """
        return (
            len({(len(layer.retained), layer.top_k, layer.width) for layer in self.layers.values()}) == 1
            and all(layer.temperature == 1.0 for layer in self.layers.values())
            and all(layer.skip is None and layer.merge is None for layer in self.layers.values())
        )  # fmt: skip

    @property
    def is_masking(self) -> bool:
        """Whether masking the full model's routers gives the same answers as the cut."""
        return self.zeroed is None and all(layer.is_masking for layer in self.layers.values())

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
            plan_extras.check(where, index, layer, self.num_experts)
        if len({bool(layer.channels) for layer in self.layers.values()}) > 1:
            raise PlanError(
                where, "narrows the experts of some layers only", "narrow all, keeping every channel if need be"
            )
        for index, scores in self.scores.items():
            if len(scores) != self.num_experts:
                raise PlanError(
                    where, f"layer {index} has {len(scores)} scores for {self.num_experts} experts", "make it again"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; layer numbers become strings."""
        extras: dict[str, Any] = plan_extras.to_json(self.layers)
        if self.zeroed is not None:
            extras["zeroed"] = self.zeroed.to_json()
        return {
            "format_version": FORMAT_VERSIONS[bool(extras)],
            "base_model": {"id": self.base.id, "revision": self.base.revision, "sha256": self.base.sha256},
            "num_experts": self.num_experts,
            "retained": {str(index): list(layer.retained) for index, layer in self.layers.items()},
            "top_k": {str(index): layer.top_k for index, layer in self.layers.items()},
            "temperature": {str(index): layer.temperature for index, layer in self.layers.items()},
            **extras,
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
        if version not in FORMAT_VERSIONS:
            raise PlanError(
                where, f"format_version is {version!r}, this leap-serve reads {' and '.join(map(str, FORMAT_VERSIONS))}",
                "update leap-serve, or make the file again",
            )  # fmt: skip
        try:
            base = value["base_model"]
            extras = value if version > 1 else {}
            layers = {
                int(index): LayerPlan(
                    tuple(int(i) for i in ids),
                    int(value["top_k"][index]),
                    float(value["temperature"][index]),
                    **plan_extras.from_json(extras, index),
                )
                for index, ids in sorted(value["retained"].items(), key=lambda pair: int(pair[0]))
            }
            plan = cls(
                base=BaseModel(str(base["id"]), str(base["sha256"]), base.get("revision")),
                num_experts=int(value["num_experts"]),
                layers=layers,
                scores={int(i): tuple(map(float, s)) for i, s in value.get("scores", {}).items()},
                made_by=value.get("made_by", {}),
                zeroed=plan_extras.zeroed_of(extras.get("zeroed")),
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
    essence: list[Any] = [
        plan.base.sha256,
        plan.num_experts,
        [
            [index, list(layer.retained), layer.top_k, float(layer.temperature), *plan_extras.essence(layer)]
            for index, layer in plan.layers.items()
        ],
    ]
    if plan.zeroed is not None:
        essence.append(plan.zeroed.essence)
    return hashlib.sha256(json.dumps(essence, separators=(",", ":")).encode()).hexdigest()


def _short(ids: tuple[int, ...]) -> str:
    return str(list(ids)) if len(ids) <= 8 else f"[{', '.join(map(str, ids[:8]))}, …]"
