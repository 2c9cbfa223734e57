"""What a report knows, whichever files it came from; collect.py fills it in, page.py shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Methods = Literal["leap", "full", "other", "broken"]
"""Whose a mark is: the agent's, the full model's, another method's; or of a bound that is broken."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the ends of its interval; both ends None where nothing is known about its spread."""

    value: float
    low: float | None = None
    high: float | None = None

    def over(self, scale: float) -> Interval:
        """The same in another unit."""
        low, high = (None if end is None else end / scale for end in (self.low, self.high))
        return Interval(self.value / scale, low, high)


@dataclass(frozen=True, slots=True)
class Score:
    """A model on a task.

    Args:
        metric: its name, e.g. "exact match".
        score: in [0, 1] (a perplexity: from 1 up), with a 95 % interval where one can be had.
        loss: nats per answer token, or None.
        items: how many were scored, or None.
        difference: score less that of the full model on the same items, or None where they were not paired.
    """

    metric: str
    score: Interval
    loss: float | None = None
    items: int | None = None
    difference: Interval | None = None

    @property
    def share(self) -> bool:
        """Whether the score is a share in [0, 1], of which more is better; a perplexity is not, and less is better."""
        return self.metric != "perplexity"


@dataclass(slots=True)
class Model:
    """A full model, or a cut of it, under the name that all files of a run agree on.

    Args:
        kind: "leap" for plans of the agent, "full", or "other".
        scores: by task.
        tpot_ms: by batch, median with its 10 % and 90 % quantiles.
        tok_s: output tokens per second, by batch.
        weights_bytes, flops_per_token: as bench and inspect count them, or None.
        counts: retained experts per MoE layer.
        fingerprint: of its plan, or None.
        group: models of one group were measured on the same workload and may share a chart.
    """

    name: str
    kind: Methods = "other"
    scores: dict[str, Score] = field(default_factory=dict)
    tpot_ms: dict[int, Interval] = field(default_factory=dict)
    tok_s: dict[int, Interval] = field(default_factory=dict)
    weights_bytes: float | None = None
    flops_per_token: float | None = None
    counts: tuple[int, ...] = ()
    fingerprint: str | None = None
    group: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of learning: points (x, y), x increasing."""

    name: str
    seed: int
    points: tuple[tuple[float, float], ...]


@dataclass(slots=True)
class Learning:
    """Lines that belong into one chart.

    Args:
        agent: "pruning" (x plans evaluated, y best loss so far) or "routing" (x labels, y validation loss).
        title: the task and the budget, or the tuned plan.
        curves: of the agent and of its controls.
        exact: of the same runs the share of validation answers that are exact, teacher-forced; none of searches.
        held_out, scores: of searches that a bench followed, the best plan's loss and task score on test items.
        notes: sentences below, e.g. whether the tuned router was kept.
    """

    agent: Literal["pruning", "routing"]
    title: str
    curves: list[Curve] = field(default_factory=list)
    exact: list[Curve] = field(default_factory=list)
    held_out: list[Curve] = field(default_factory=list)
    scores: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LayerMap:
    """One MoE layer of a plan.

    Args:
        retained: original ids.
        saliency: [E], each expert's share of the layer's sum; empty where nothing is known.
        load: share of the routed tokens after the cut (and tuning) by original id; empty where not profiled.
    """

    index: int
    retained: tuple[int, ...]
    top_k: int
    temperature: float
    saliency: tuple[float, ...] = ()
    load: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """A plan, layer by layer; ``kind`` says whose it is, ``saliency`` what its colours are, ``loaded`` whose loads."""

    name: str
    kind: Methods
    num_experts: int
    layers: tuple[LayerMap, ...]
    saliency: str
    loaded: str = ""

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same count, top_k and temperature."""
        return len({(len(layer.retained), layer.top_k, layer.temperature) for layer in self.layers}) == 1


@dataclass(frozen=True, slots=True)
class Bound:
    """One bound of the off-domain gate: what was observed (for the worse), what is allowed, whether it is kept."""

    check: str
    name: str
    observed: Interval
    bound: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Gate:
    """A pruned model at the off-domain gate; ``examples`` are (check, why, text) of degenerate answers."""

    model: str
    full: str
    passed: bool
    bounds: tuple[Bound, ...]
    examples: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table as it is shown: a title, a caption, cells as text, and notes below."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a part of the report came from: its file, the command that made it, when, and by which version."""

    path: str
    command: str
    time: str
    version: str


@dataclass(slots=True)
class Report:
    """Everything that was found, in the order of the runs."""

    runs: list[str] = field(default_factory=list)
    models: dict[str, Model] = field(default_factory=dict)
    learning: dict[str, Learning] = field(default_factory=dict)
    maps: list[ExpertMap] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
