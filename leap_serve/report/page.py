"""The page: sections of figures, put into one HTML file that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from leap_serve.files import write_bytes
from leap_serve.provenance import made_by
from leap_serve.report.collect import collect
from leap_serve.report.experts import counts, heat_maps
from leap_serve.report.figures import (
    Figure,
    bytes_unit,
    compared,
    gates,
    latencies,
    learning,
    score_ranges,
    spread,
    tasks,
    trade_offs,
    written,
)
from leap_serve.report.model import Model, Report, Table
from leap_serve.report.scale import figure, percent

SHOWN = 6
"""Figures of a section that are open at once; the rest are folded up."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page; ``absent`` stands where there is no figure and says what would make one."""

    id: str
    title: str
    lead: str
    figures: Sequence[Figure]
    absent: str


def write_report(runs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write one HTML page about these runs, atomically; returns what it shows and what it leaves out.

    Args:
        runs: folders or files of leap run, demo, search, cut, tune, eval, bench and bench/tables.py.
        out: the page; an existing one is replaced.

    Raises LeapError where a run holds nothing to show, CheckpointError where a part of it is damaged.
    """
    report = collect(runs)
    shown = sections(report)
    write_bytes(out, render(report, shown).encode())
    return {
        "out": str(out), "runs": report.runs, "models": list(report.models),
        "figures": {section.id: len(section.figures) for section in shown},
        "left_out": [section.absent for section in shown if not section.figures],
    }  # fmt: skip


def sections(report: Report) -> list[Section]:
    """The page's parts that hold figures, in order."""
    return [
        Section(
            "trade-offs", "What pruning saves, and what it costs",
            "Up is better, left is cheaper. The steps join what nothing else beats in both; hollow marks are beaten. "
            "With top_k = min(k, |I|) pruning alone hardly changes the FLOPs per token: they fall with top_k.",
            trade_offs(report), "Quality against cost: needs a score and a cost of at least two models (leap eval, leap bench).",
        ),
        Section(
            "tasks", "Scores by task",
            "Dots are scores on unseen items, bars their 95 % intervals over items.",
            score_ranges(report), "Scores by task: needs leap eval.",
        ),
        Section(
            "gate", "Off its domain",
            "What the cut costs on data that it was not made for, as a share of what the gate allows: the dashed line.",
            gates(report), "Off-domain gate: needs leap eval --gate.",
        ),
        Section(
            "latency", "Latency by batch",
            "A decode step reads each distinct expert that its batch activates once, so fewer experts are faster in "
            "batches rather than alone.",
            latencies(report), "Latency by batch: needs leap bench at several batches.",
        ),
        Section(
            "search", "How the plans were found",
            "Every evaluation scores one plan in the engine. Lines are medians over seeds, bands their range. «from tasks», "
            "«from budget», «warm»: the agent began with the policy of other tasks, of another budget, of an earlier search.",
            learning(report, "pruning"), "Learning curves of the pruning agent: needs leap search with an engine.",
        ),
        Section(
            "tuning", "How the cut was repaired",
            "Loss and exact answers on items held out for early stopping, against the labels used; at 0 the cut as it was.",
            learning(report, "routing"), "Learning curves of the routing agent: needs leap tune.",
        ),
        Section(
            "experts", "Which experts stay",
            "Each row is a layer, its experts from the most salient on the left to the least (by number, where no saliency "
            "is known). Marks below are the retained ones; the line is where the ranking alone would have cut.",
            heat_maps(report), "Experts by layer: needs a plan.",
        ),
        Section("counts", "How many stay in each layer", "", counts(report), "Counts by layer: needs a plan."),
    ]  # fmt: skip


def overview(report: Report) -> Table | None:
    """One row per model that was scored or timed: all that there is to compare."""
    rows, names, batches = (
        [],
        tasks(report),
        sorted({b for m in report.models.values() if compared(m) for b in m.tpot_ms}),
    )
    unit, size = bytes_unit(report)
    for model in report.models.values():
        if not compared(model):
            continue
        kept = sorted(set(model.counts))
        rows.append((
            model.name,
            "–" if not kept else str(kept[0]) if len(kept) == 1 else f"{kept[0]} – {kept[-1]}",
            *(written(model.scores[task]) if task in model.scores else "–" for task in names),
            *(spread(model.tpot_ms[batch]) if batch in model.tpot_ms else "–" for batch in batches),
            figure(model.weights_bytes / size) if model.weights_bytes else "–",
            figure(model.flops_per_token / 1e6) if model.flops_per_token else "–",
        ))  # fmt: skip
    header = ("model", "experts per layer", *names, *(f"TPOT ms, batch {batch}" for batch in batches),
              f"weights, {unit}", "MFLOPs per token")  # fmt: skip
    return Table("", header, tuple(rows)) if rows else None


def headline(report: Report) -> str:
    """One sentence about the agent's best-scored cut beside the full model, or nothing."""
    full = next((m for m in report.models.values() if m.kind == "full" and m.scores), None)
    own = [m for m in report.models.values() if m.kind == "leap" and m.scores]
    if full is None or not own:
        return ""
    best = max(own, key=lambda m: (len(m.scores), sum(s.score.value for s in m.scores.values())))
    return f"{best.name}: {_kept(best, full)}{_saved(best, full)}{_scored(best, full)}."


def _kept(best: Model, full: Model) -> str:
    kept, before = sorted(set(best.counts)), sorted(set(full.counts))
    if len(kept) != 1 or len(before) != 1:
        return ""
    return f"{kept[0]} of {before[0]} experts in each layer, "


def _saved(best: Model, full: Model) -> str:
    parts = []
    if best.weights_bytes and full.weights_bytes:
        parts.append(f"{percent(best.weights_bytes / full.weights_bytes, 0)} of the weights, ")
    shared = set(best.tpot_ms) & set(full.tpot_ms)
    if shared:
        batch = max(shared)
        parts.append(f"TPOT {figure(best.tpot_ms[batch].value)} ms instead of {figure(full.tpot_ms[batch].value)} "
                     f"at batch {batch}, ")  # fmt: skip
    return "".join(parts)


def _scored(best: Model, full: Model) -> str:
    pairs = [
        f"{task} {written(found)} instead of {written(full.scores[task])}"
        for task, found in best.scores.items() if task in full.scores
    ]  # fmt: skip
    return ", ".join(pairs)


def render(report: Report, shown: Sequence[Section]) -> str:
    """The HTML; whatever a model or a file says is escaped."""
    here = files("leap_serve.report")
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("style.css", "hover.js"))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string((here / "page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        report=report, sections=shown, overview=overview(report), headline=headline(report), open_figures=SHOWN,
        style=Markup(style), script=Markup(script), style_hash=_hash(style), script_hash=_hash(script),
        made=made_by(),
    )  # fmt: skip


def _hash(text: str) -> str:
    """A source of the page's own Content-Security-Policy: this text and nothing else."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
