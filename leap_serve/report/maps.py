"""Plans as layers × experts: what is retained, how salient it was, and what it does after the cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_serve.report.model import ExpertMap, LayerMap, Methods


@dataclass(frozen=True, slots=True)
class Cut:
    """A checkpoint that was cut by a plan: its folder's name, the identity of its weights, whether it was tuned."""

    folder: str
    sha256: str
    tuned: bool


@dataclass(slots=True)
class Maps:
    """Plans and profiles as they are found; :meth:`build` joins them."""

    found: dict[str, tuple[Plan, str]] = field(default_factory=dict)
    cuts: dict[str, list[Cut]] = field(default_factory=dict)
    profiles: list[Profile] = field(default_factory=list)

    def add_plan(self, plan: Plan, name: str, cut: Cut | None = None) -> None:
        """Remember a plan once, under the first name it is found by, and every checkpoint that was cut by it."""
        self.found.setdefault(plan.fingerprint, (plan, name))
        if cut is not None:
            self.cuts.setdefault(plan.fingerprint, []).append(cut)

    def add_profile(self, profile: Profile) -> None:
        """Remember a profile, of a full model or of a cut."""
        self.profiles.append(profile)

    def plan(self, fingerprint: str) -> Plan | None:
        """A plan that was found."""
        return self.found[fingerprint][0] if fingerprint in self.found else None

    def plans(self) -> list[Plan]:
        """The distinct plans."""
        return [plan for plan, _ in self.found.values()]

    def methods(self) -> Mapping[str, Methods]:
        """Fingerprint → whose plan it is."""
        return {fingerprint: _kind(plan) for fingerprint, (plan, _) in self.found.items()}

    def build(self) -> list[ExpertMap]:
        """One map per plan, the agent's first."""
        made = [self._map(fingerprint, plan, name) for fingerprint, (plan, name) in self.found.items()]
        return sorted(made, key=lambda one: one.kind != "leap")

    def _map(self, fingerprint: str, plan: Plan, name: str) -> ExpertMap:
        saliency, what = self._saliency(plan)
        load, loaded = self._load(self.cuts.get(fingerprint, ()), plan)
        layers = tuple(
            LayerMap(
                index, layer.retained, layer.top_k, layer.temperature, saliency.get(index, ()), load.get(index, {})
            )
            for index, layer in plan.layers.items()
        )
        return ExpertMap(name, _kind(plan), plan.num_experts, layers, what, loaded)

    def _saliency(self, plan: Plan) -> tuple[dict[int, tuple[float, ...]], str]:
        """The scores that the plan carries, else the gate mass of the profile that it was made from."""
        if plan.scores:
            # An agent's plan carries the ranking that it began with, and may not name it.
            by = plan.made_by.get("prior_method") or plan.made_by.get("method")
            what = "the ranking that the search began with" if by in ("leap", None) else f"{by} scores"
            return {layer: _shares(np.asarray(scores)) for layer, scores in plan.scores.items()}, what
        data = plan.made_by.get("data_sha256") or plan.made_by.get("profile_data_sha256")
        fitting = [p for p in self.profiles if p.base.sha256 == plan.base.sha256 and data in (None, p.data_sha256)]
        if not fitting or (data is None and len(fitting) > 1):
            return {}, ""
        return {layer: _shares(own.m) for layer, own in fitting[0].layers.items()}, "gate mass in the profile"

    def _load(self, cuts: Sequence[Cut], plan: Plan) -> tuple[dict[int, dict[int, float]], str]:
        """Where a cut itself was profiled: each retained expert's share of the routed tokens, by original id.

        What was tuned goes before what was not. Weights that lie beside a cut's do not change its identity, so the
        profile's own word on which folder it is of decides.
        """
        fitting = [
            (cut.tuned and cut.folder == Path(str(profile.made_by.get("model"))).name, number)
            for number, profile in enumerate(self.profiles)
            for cut in cuts if cut.sha256 == profile.base.sha256
        ]  # fmt: skip
        if not fitting:
            return {}, ""
        tuned, number = max(fitting)
        layers = self.profiles[number].layers.items()
        shares = {
            layer: dict(zip(plan.layers[layer].retained, _shares(own.n), strict=True)) for layer, own in layers
        }  # fmt: skip
        return shares, "after tuning" if tuned else "after the cut"


def _kind(plan: Plan) -> Methods:
    return "leap" if plan.made_by.get("method") == "leap" else "other"


def _shares(values: np.ndarray) -> tuple[float, ...]:
    """Non-negative values over their sum; what lies below 0 counts from the lowest."""
    shifted = values - min(0.0, float(values.min()))
    total = float(shifted.sum())
    return tuple((shifted / total).tolist()) if total > 0 else tuple(0.0 for _ in shifted)
