"""A run folder with every part that a report shows, and a page taken apart."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cut.write import cut
from leap_serve.files import write_json
from leap_serve.plan import LayerPlan, Plan
from leap_serve.provenance import made_by
from leap_training.saliency import Routing, allocate, scores
from leap_training.tune_config import TuneConfig
from profiles import simulate

ROOT = Path(__file__).parents[1]


def demo_row() -> dict[str, Any]:
    """What a demo once measured: a row that stays, whatever is appended."""
    rows = (ROOT / "bench" / "results" / "demo.jsonl").read_text().splitlines()
    return dict(json.loads(rows[1]))


def make_run(out: Path) -> Plan:
    """An uneven plan with its learning curve, cut and tuned; an even one, cut and profiled; returns the uneven one."""
    model = Checkpoint.open(resolve_model("leap-tiny"))
    profile = replace(simulate(4, 64, 4, 200, dead=0), base=model.identity(), data_sha256="d" * 64)
    profile.save(out / "profile")
    ranked = allocate(scores(profile, "gate-mass"), Routing.of(profile), experts=16, method="gate-mass")
    layers = {
        index: LayerPlan(tuple(sorted({*layer.retained[:14], 0, 1, 2, 3}))[: 14 + index], 4)
        for index, layer in ranked.layers.items()
    }
    made = made_by(
        method="leap", task="toy-gsm", seed=0, data_sha256="d" * 64, evaluations=60, search_loss=0.5, model="leap-tiny",
        improvements=[[1, 0.2, 4.0], [7, 0.4, 1.5], [40, 2 / 3, 0.5]],
    )  # fmt: skip
    plan = Plan(model.identity(), 64, layers, made_by=made)
    plan.save(out / "plan.json")
    replace(ranked, made_by={**ranked.made_by, "task": "toy-gsm"}).save(out / "ranked.json")
    cut(resolve_model("leap-tiny"), plan, out / "checkpoint")
    cut(resolve_model("leap-tiny"), ranked, out / "ranked")
    sliced = replace(simulate(4, 16, 4, 50, dead=0), base=Checkpoint.open(out / "ranked").identity())
    sliced.save(out / "profile-after")
    curve = [
        {"round": n, "labels": 100 * n, "validation_loss": 0.5 / n, "validation_exact": 0.25 + 0.25 * n} for n in (1, 2)
    ]
    router = {"kept": False, "items": 64, "tuned_loss": 0.3, "sliced_loss": 0.2, "gain": -0.1, "p_value": 0.9}
    tune = {
        "config": asdict(TuneConfig()), "labels": 200, "validation_loss_before": 1.2, "curve": curve, "router": router,
        "fingerprint": plan.fingerprint, "made_by": made_by(task="toy-gsm"), "versions": {"torch": "2"},
    }  # fmt: skip
    write_json(out / "checkpoint" / "tune.json", tune)
    write_json(out / "demo.json", demo_row())
    return plan


def gate_json(text: str = "and so on and so on") -> dict[str, Any]:
    """What leap eval --gate writes: one bound kept, one broken."""
    observed = {"mean": 0.1, "low": 0.05, "high": 0.15, "confidence": 0.95, "n": 32}
    bounds = {
        "max_loss_increase": {"observed": observed, "bound": 0.2, "kept": True},
        "max_degenerate_increase": {"observed": observed, "bound": 0.05, "kept": False},
    }
    check = {
        "name": "general.txt",
        "bounds": bounds,
        "degenerate_examples": [{"why": "loops on 'and so'", "text": text}],
    }
    return {
        "model": "checkpoint",
        "full": "leap-tiny",
        "passed": False,
        "broken": ["…"],
        "by": "mean",
        "checks": [check],
    }


class Page(HTMLParser):
    """What a page consists of: elements with their attributes, tables as rows of cells, all text outside of tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text: list[str] = []
        self.raw: dict[str, str] = {}
        self._cell, self._inside = False, ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside in ("style", "script"):
            self.raw[self._inside] = self.raw.get(self._inside, "") + data
        self.text.append(data)
        if self._cell:
            self.tables[-1][-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    def table_with(self, *header: str) -> list[list[list[str]]]:
        """The tables whose header holds these."""
        return [table for table in self.tables if set(header) <= set(table[0])]
