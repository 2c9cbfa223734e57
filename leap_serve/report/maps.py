"""Plans as layers × experts: what is retained, how salient it was, and what it does after the cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_serve.report.model import ExpertMap, LayerMap, Methods


@dataclass(slots=True)
class Maps:
    """Plans and profiles as they are found; :meth:`build` joins them."""

    found: dict[str, tuple[Plan, str]] = field(default_factory=dict)
    cuts: dict[str, str] = field(default_factory=dict)
    profiles: list[Profile] = field(default_factory=list)

    def add_plan(self, plan: Plan, name: str, cut_sha256: str | None = None) -> None:
        """Remember a plan once, under the first name it is found by, and the checkpoint that was cut by it."""
        self.found.setdefault(plan.fingerprint, (plan, name))
        if cut_sha256 is not None:
            self.cuts[plan.fingerprint] = cut_sha256

    def add_profile(self, profile: Profile) -> None:
        """Remember a profile, of a full model or of a cut."""
        self.profiles.append(profile)

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
        load = self._load(self.cuts.get(fingerprint), plan)
        layers = tuple(
            LayerMap(
                index, layer.retained, layer.top_k, layer.temperature, saliency.get(index, ()), load.get(index, {})
            )
            for index, layer in plan.layers.items()
        )
        return ExpertMap(name, _kind(plan), plan.num_experts, layers, what)

    def _saliency(self, plan: Plan) -> tuple[dict[int, tuple[float, ...]], str]:
        """The scores that the plan carries, else the gate mass of the profile that it was made from."""
        if plan.scores:
            by = plan.made_by.get("prior_method") or plan.made_by.get("method") or "the plan's own"
            return {layer: _shares(np.asarray(scores)) for layer, scores in plan.scores.items()}, f"{by} scores"
        data = plan.made_by.get("data_sha256") or plan.made_by.get("profile_data_sha256")
        fitting = [p for p in self.profiles if p.base.sha256 == plan.base.sha256 and data in (None, p.data_sha256)]
        if not fitting or (data is None and len(fitting) > 1):
            return {}, ""
        return {layer: _shares(own.m) for layer, own in fitting[0].layers.items()}, "gate mass in the profile"

    def _load(self, cut_sha256: str | None, plan: Plan) -> dict[int, dict[int, float]]:
        """Where the cut itself was profiled: each retained expert's share of the routed tokens, by original id."""
        for profile in self.profiles:
            if profile.base.sha256 == cut_sha256:
                return {
                    layer: dict(zip(plan.layers[layer].retained, _shares(own.n), strict=True))
                    for layer, own in profile.layers.items()
                }
        return {}


def _kind(plan: Plan) -> Methods:
    return "leap" if plan.made_by.get("method") == "leap" else "other"


def _shares(values: np.ndarray) -> tuple[float, ...]:
    """Non-negative values over their sum; what lies below 0 counts from the lowest."""
    shifted = values - min(0.0, float(values.min()))
    total = float(shifted.sum())
    return tuple((shifted / total).tolist()) if total > 0 else tuple(0.0 for _ in shifted)
