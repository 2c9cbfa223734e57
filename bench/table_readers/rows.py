"""What tables are made of: rows of bench/results, cells, and the table itself."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.files import read_jsonl
from leap_serve.flops import parameters
from leap_serve.plan import LayerPlan, Plan
from leap_serve.statistics import mean_of_few

TINY, LLAMA4 = "leap-tiny", "bench/models/llama4-tiny"
TASKS, HARD = ("toy-code", "toy-gsm", "toy-xsum"), ("toy-gsm", 8)
EXPERTS, BATCH, FEW, MOST_LABELS = (64, 32, 16, 8, 4), 16, 1000, 10_240
EMPTY = "–"
ONE_PLAN = ("frequency", "gate-mass", "ean", "ean-mean", "ean-weighted", "reap", "magnitude")
"""Methods that draw nothing."""
QUALITY = ("HumanEval", "GSM8K", "XSum R-L")
CLAIMS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "paper_claims.json").read_text(encoding="utf-8")
)
"""What the papers print; shown only in columns named «paper's claim»."""
NAMES = {
    "full-model": "full model", "leap": "LEAP (agent)", "reap": "REAP", "frequency": "frequency", "magnitude": "magnitude",
    "answer-doubt": "LEAP, labels by doubt of the answer", "teacher": "LEAP, doubt of the answer, with a teacher",
    "vanilla": "vanilla fine-tuning (frequency)", "full": "full fine-tuning of the retained", "kd": "logit KD",
    "kd-experts": "expert-wise KD", "no-rl-router": "without RL router",
    "no-supervised-router": "router by PPO alone", "no-router": "routers as they were", "no-active-learning": "without active learning",
    "no-lora": "without LoRA", "no-agent": "without the agent (REAP's plan)", "untuned": "LEAP (agent), untuned",
    "easy-ep": "EASY-EP", "moe-pruner": "MoE-Pruner (by expert)", "naee": "NAEE", "naee-progressive": "NAEE, progressive",
    "naee-greedy": "NAEE-greedy (ours)", "naee-progressive-greedy": "NAEE-greedy (ours), progressive", "moe-i2": "MoE-I²",
    "hc-smoe": "HC-SMoE (merged)", "intra": "intra-expert (channels)", "lexi": "LExI (top-k)", "tsep": "TSEP", "eep": "EEP (merged)",
}  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells; ``notes`` say why cells are empty and what must be known to read it."""

    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [f"## {self.title}", "", self.caption, "", "| " + " | ".join(self.header) + " |"]
        lines += ["|---" * len(self.header) + "|", *("| " + " | ".join(row) + " |" for row in self.rows), ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes), ""] if self.notes else lines)


class Rows:
    """Everything in bench/results, by bench."""

    def __init__(self, folder: Path) -> None:
        self.of: dict[str, list[Row]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for row in read_jsonl(path):
                self.of.setdefault(str(row.get("bench", path.stem)), []).append(row)

    def find(self, bench: str, **where: Any) -> list[Row]:
        """Rows of a bench whose fields have these values."""
        return [row for row in self.of.get(bench, []) if all(row.get(key) == value for key, value in where.items())]

    def untuned(self, method: str, task: str, experts: int, model: str = TINY) -> list[Row]:
        """Plans as they were found, scored on test items: the very ones that were fine-tuned, where bench_lookahead did.

        Of a method that draws nothing there is one plan, and its one row has an interval over test items.
        """
        where = {"model": model, "task": task, "experts": experts, "method": method}
        own = [row for row in self.find("methods", **where, tuning="none") if "score" in row]
        if method in ONE_PLAN and own:
            return own
        if looked := self.find("lookahead", **where):
            seeds = {row["seed"] for row in looked}
            return [*(row["before"] for row in looked), *(row for row in own if row["seed"] not in seeds)]
        found = [row for row in self.find("search-methods", **where, allocation="uniform") if not row["warm"]]
        return [row for row in [*found, *own] if "score" in row]

    def short(self, method: str, task: str, experts: int, model: str = TINY) -> list[Row]:
        """After 400 steps on 1,000 items."""
        where = {"model": model, "task": task, "experts": experts, "method": method}
        found = [row["after"] for row in self.find("lookahead", **where)]
        return [row for row in [*found, *self.find("methods", **where, tuning=SHORT)] if "score" in row]

    def own(self, method: str, task: str, experts: int, model: str = TINY) -> list[Row]:
        """What a method left that tunes by itself."""
        found = self.find("methods", model=model, task=task, experts=experts, method=method, tuning="its own")
        return [row for row in found if "score" in row]

    def tuned(self, method: str, task: str, experts: int, labels: int = MOST_LABELS) -> list[Row]:
        """leap-tiny after `leap tune`, scored on test items."""
        found = self.find("tune", model=TINY, task=task, experts=experts, method=method)
        return [row for row in found if method in ("full-model", "untuned") or row["labels"] == labels]

    def full(self, task: str, model: str = TINY) -> list[Row]:
        """The full model on a task: of the tuning bench, of the methods' bench, else of leap-tiny's own."""
        found = self.tuned("full-model", task, 64) if model == TINY else []
        found = found or self.find("methods", model=model, task=task, method="full-model")
        last = [row["full"] for row in self.find("leap-tiny", task=task)][-1:]
        return found or (last if model == TINY else [])


SHORT = "400 steps, 1,000 items"
"""leap_training.finetune's tuning, as rows call it."""


def over_seeds(found: Sequence[Row]) -> str:
    """Of rows with a "score" in [0, 1], in %: see spread; of a single one the interval over items, where it has one.

    Seeds that all came to one plan say no more than one of them.
    """
    plans = {row.get("plan") if row.get("tuning") == "none" else number for number, row in enumerate(found)}
    if len(plans) == 1 and "interval" in found[0] and (len(found) == 1 or None not in plans):
        low, high = found[0]["interval"]
        seeds = "1" if len(found) == 1 else f"{len(found)}, one plan"
        return f"{100 * found[0]['score']:.1f} [{100 * low:.1f}, {100 * high:.1f}] ({seeds})"
    return spread([row["score"] for row in found])


def spread(values: Sequence[float], least: float = 0.0) -> str:
    """Of scores in [0, 1] (differences: ``least`` −1), in %: median, interval, seeds; empty where there is nothing."""
    if len(values) < 3:
        return f"{', '.join(f'{100 * value:.1f}' for value in values)} ({len(values)})" if values else EMPTY
    mean = mean_of_few(values)
    low, high = max(least, mean.low), min(1.0, mean.high)
    return f"{100 * statistics.median(values):.1f} [{100 * low:.1f}, {100 * high:.1f}] ({len(values)})"


@cache
def sizes(experts: int, model: str = TINY) -> tuple[str, str]:
    """FLOPs per token and weights of a model cut to so many experts in each layer, both over the full model's."""
    source = Checkpoint.open(resolve_model(model))
    layer = LayerPlan(tuple(range(experts)), min(source.top_k, experts))
    plan = Plan(source.identity(), source.num_experts, dict.fromkeys(source.moe_layers, layer))
    own, full = parameters(source, plan), parameters(source)
    return f"{own.matmul / full.matmul:.2f}", f"{own.total / full.total:.2f}"


def latency(rows: Rows, experts: int) -> str:
    """TPOT over the full model's at batch 16, of the random model in which experts dominate (bench_batch.py)."""
    for row in rows.find("batch"):
        counts = row["contenders"][1]["retained"]
        if row["workload"]["batch"] == BATCH and set(counts) == {experts}:
            found = row["ratio_a_over_b"]["tpot_ms"]
            return f"{1 / found['median']:.2f} [{1 / found['high']:.2f}, {1 / found['low']:.2f}]"
    return "1.00" if experts == 64 else EMPTY


def claimed(names: Iterable[str]) -> list[str]:
    """Headers of columns that hold a paper's numbers."""
    return [f"paper's claim: {name}" for name in names]


def reason(body: Sequence[Sequence[str]], ours: int, why: str) -> list[str]:
    """A note for the empty cells among the first ``ours`` columns, if there are any."""
    return [f"{EMPTY} in a column of ours: {why}."] if any(EMPTY in row[:ours] for row in body) else []
