"""Makes bench/results/TABLES.md (and tables.json, which `leap report bench/results` shows) from the rows that are there.

    python bench/tables.py

One function per table, a row of the bench that it reads per cell: INTRO says how they are to be read.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.files import write_bytes, write_json
from leap_serve.flops import parameters
from leap_serve.plan import LayerPlan, Plan
from leap_serve.provenance import made_by

RESULTS = Path(__file__).parent / "results"
INTRO = """\
# Tables

Made by `python bench/tables.py`. Our cells come from rows of bench/results/*.jsonl alone: the median over seeds, in
brackets the 95 % t-interval of their mean (of two seeds both values), then in parentheses how many seeds. A cell that no
row fills is empty, and its reason stands below the table. What a paper claims stands in columns named «paper's claim»: of
other models on other hardware, copied from the paper, not measured here.
"""
TINY, TASKS, HARD = "leap-tiny", ("toy-code", "toy-gsm", "toy-xsum"), ("toy-gsm", 8)
EXPERTS, BATCH, MOST_LABELS = (64, 32, 16, 8, 4), 16, 10_240
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Quantiles of Student's t at 97.5 % for 1, 2, … degrees of freedom."""
EMPTY = "–"
QUALITY = ("HumanEval", "GSM8K", "XSum R-L")
CLAIMS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "paper_claims.json").read_text(encoding="utf-8")
)
"""What the papers print; shown only in columns named «paper's claim»."""
NAMES = {
    "full-model": "full model", "leap": "LEAP (agent)", "reap": "REAP", "frequency": "frequency", "magnitude": "magnitude",
    "vanilla": "vanilla fine-tuning (frequency)", "full": "full fine-tuning of the retained", "kd": "logit KD",
    "kd-experts": "expert-wise KD", "no-rl-router": "without RL router", "no-active-learning": "without active learning",
    "no-lora": "without LoRA", "no-agent": "without the agent (REAP's plan)", "untuned": "LEAP (agent), untuned",
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
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.of.setdefault(str(row.get("bench", path.stem)), []).append(row)

    def find(self, bench: str, **where: Any) -> list[Row]:
        """Rows of a bench whose fields have these values."""
        return [row for row in self.of.get(bench, []) if all(row.get(key) == value for key, value in where.items())]

    def untuned(self, method: str, task: str, experts: int) -> list[float]:
        """Scores of plans as they were found, on test items."""
        found = self.find("search-methods", model=TINY, task=task, experts=experts, method=method, allocation="uniform")
        return [row["score"] for row in found if not row["warm"]]

    def tuned(self, method: str, task: str, experts: int, labels: int = MOST_LABELS) -> list[float]:
        """Scores after tuning, on test items."""
        found = self.find("tune", model=TINY, task=task, experts=experts, method=method)
        return [row["score"] for row in found if method in ("full-model", "untuned") or row["labels"] == labels]


def over_seeds(values: Sequence[float], least: float = 0.0) -> str:
    """Of scores in [0, 1] (differences: ``least`` −1), in %: median, interval, seeds; empty where there is nothing."""
    if len(values) < 3:
        return f"{', '.join(f'{100 * value:.1f}' for value in values)} ({len(values)})" if values else EMPTY
    half = T975[min(len(values) - 2, len(T975) - 1)] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    low, high = max(least, mean - half), min(1.0, mean + half)
    return f"{100 * statistics.median(values):.1f} [{100 * low:.1f}, {100 * high:.1f}] ({len(values)})"


def full_scores(rows: Rows, task: str) -> list[float]:
    """The full model on a task: of the tuning bench, else of leap-tiny's own."""
    return (
        rows.tuned("full-model", task, 64) or [row["full"]["score"] for row in rows.find("leap-tiny", task=task)][-1:]
    )


def sizes(experts: int) -> tuple[str, str]:
    """FLOPs per token and weights of leap-tiny cut to so many experts in each layer, both over the full model's."""
    source = Checkpoint.open(resolve_model(TINY))
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


def _claimed(names: Sequence[str]) -> list[str]:
    return [f"paper's claim: {name}" for name in names]


def scaling(rows: Rows) -> Table:
    """LEAP's table 1: quality and cost against the number of retained experts."""
    body = []
    for experts in EXPERTS:
        scores = [full_scores(rows, t) if experts == 64 else rows.tuned("leap", t, experts) for t in TASKS]
        flops, weights = sizes(experts)
        body.append([f"{experts}{' (full)' if experts == 64 else ''}", *map(over_seeds, scores), flops,
                     latency(rows, experts), weights, *CLAIMS["leap_1"][str(experts)]])  # fmt: skip
    return Table(
        "LEAP, table 1: quality and cost against the number of experts",
        "leap-tiny (64 experts, top-4), plans of the agent, tuned with 10,240 labels and 400 steps; scores in % on test items. "
        "The paper has Qwen3-235B-A22B with 128 experts; rows stand together by the share that is retained.",
        ["experts of 64", *TASKS, "FLOPs, share", f"TPOT, share, batch {BATCH}", "weights, share",
         *_claimed([*QUALITY, "FLOPs", "ms/token", "GB"])],
        body,
        ["FLOPs and weights are computed from the checkpoint's headers. top_k stays 4, so FLOPs fall by router rows only.",
         "TPOT is of the random model of bench_batch.py, in which experts dominate; on leap-tiny they do not.",
         *_reason(body, 7, "a budget without rows was not tuned or not timed: bench_tune.py, bench_batch.py")],
    )  # fmt: skip


def comparison(rows: Rows) -> Table:
    """LEAP's table 2: all methods at an eighth of the experts; each row says which tuning it got."""
    before = dict.fromkeys(
        row["method"]
        for row in rows.find("search-methods", model=TINY, experts=8, warm="")
        if row["allocation"] == "uniform"
    )
    after = dict.fromkeys(row["method"] for row in rows.find("tune", model=TINY, experts=8) if row["labels"])
    body = [
        [
            "full model",
            "none needed",
            *(over_seeds(full_scores(rows, t)) for t in TASKS),
            *CLAIMS["leap_2"]["full-model"],
        ]
    ]
    wanted = [name for name in CLAIMS["leap_2"] if name != "full-model"]
    for method in dict.fromkeys([*before, *after, *wanted]):
        found = [rows.untuned(method, t, 8) for t in TASKS]
        tuned = [rows.tuned(method, t, 8) for t in TASKS]
        claim = list(CLAIMS["leap_2"].get(method, [EMPTY] * 6))
        if any(found):
            body.append([NAMES.get(method, method), "none", *map(over_seeds, found), *([EMPTY] * 6)])
        if any(tuned) or not any(found):
            body.append([NAMES.get(method, method), "10,240 labels, 400 steps" if any(tuned) else "not measured",
                         *map(over_seeds, tuned), *claim])  # fmt: skip
        else:
            body[-1][5:] = claim
    flops, weights = sizes(8)
    return Table(
        "LEAP, table 2: methods at an eighth of the experts",
        f"leap-tiny, 8 of 64 experts in each layer. Scores in % on test items. At equal counts and top_k all methods have "
        f"the same FLOPs ({flops} of the full model's), weights ({weights}) and TPOT ({latency(rows, 8)} at batch {BATCH}, "
        "random model): there is nothing to compare in them, whatever the paper's columns say.",
        ["method", "tuning", *TASKS, *_claimed([*QUALITY, "FLOPs", "ms/token", "GB"])],
        body,
        _reason(body, 5, "no row in search_methods.jsonl or tune.jsonl"),
    )


def agent_effect(rows: Rows) -> Table:
    """LEAP's table 5: the agent against heuristics, before and after the same plain fine-tuning."""
    body = []
    for experts in (16, 8):
        for method in ("leap", "evolution", "gate-mass", "reap", "frequency", "magnitude"):
            looked = rows.find("lookahead", task="toy-gsm", experts=experts, method=method)
            scores = [rows.untuned(method, task, experts) for task in TASKS]
            place = TASKS.index("toy-gsm")
            scores[place] = scores[place] or [row["before"]["score"] for row in looked]
            claim = CLAIMS["leap_5"].get(method, (EMPTY,) * 4) if experts == 8 else (EMPTY,) * 4
            body.append([str(experts), NAMES.get(method, method), *map(over_seeds, scores),
                         over_seeds([row["after"]["score"] for row in looked]), *claim])  # fmt: skip
    return Table(
        "LEAP, table 5: what the pruning agent adds",
        "leap-tiny, equal counts in all layers; scores in % on test items of the plans as they were found, and of toy-gsm after "
        "the same 400 steps of fine-tuning on 1,000 items. The paper's 16 of 128 stand beside our 8 of 64.",
        ["experts of 64", "method", *TASKS, "toy-gsm, fine-tuned", *_claimed([*QUALITY, "ms/token"])],
        body,
        _reason(body, 6, "no row in search_methods.jsonl or lookahead.jsonl"),
    )


def labels_needed(rows: Rows) -> Table:
    """LEAP's table 6: labels until a share of the full model's score is reached, random against active learning."""
    full = statistics.median(full_scores(rows, HARD[0]) or [math.nan])
    body = []
    for text, claim in CLAIMS["leap_6"].items():
        share = float(text)
        needed = [_labels(rows, method, share * full) for method in ("no-active-learning", "leap")]
        body.append([f"{100 * share:.1f} % ({100 * share * full:.1f})", *needed, *claim])
    return Table(
        "LEAP, table 6: labels needed for a share of the full model's score",
        f"leap-tiny, {HARD[0]}, {HARD[1]} of 64 experts, 400 steps however many labels; a level "
        "counts as reached by the mean score over seeds, at the numbers of labels that were measured.",
        ["share of the full score (score in %)", "random batches", "active learning",
         *_claimed(["random", "active learning"])],
        body,
        _reason(body, 3, "no rows of bench_tune.py --what labels"),
    )  # fmt: skip


def _labels(rows: Rows, method: str, level: float) -> str:
    """The fewest labels whose mean score reaches a level; otherwise the best score there is."""
    found: dict[int, list[float]] = {}
    for row in rows.find("tune", task=HARD[0], experts=HARD[1], method=method):
        found.setdefault(row["labels"], []).append(row["score"])
    means = {labels: statistics.fmean(scores) for labels, scores in sorted(found.items())}
    if not means:
        return EMPTY
    reached = [labels for labels, mean in means.items() if mean >= level]
    least = min(map(len, found.values()))
    seeds = f"{least} seed{'s' if least > 1 else ''}"
    if reached:
        at_most = "≤ " if reached[0] == min(means) else ""
        return f"{at_most}{reached[0]:,} ({seeds})"
    return f"not reached with {max(means):,}: {100 * max(means.values()):.1f} % ({seeds})"


def parts(rows: Rows) -> Table:
    """LEAP's table 7: each part removed; differences are paired by seed."""
    task, experts = HARD
    own = {row["seed"]: row["score"] for row in rows.find("tune", task=task, experts=experts, method="leap")
           if row["labels"] == MOST_LABELS}  # fmt: skip
    body = []
    for method in ("leap", "no-rl-router", "no-active-learning", "no-lora", "no-agent"):
        found = {row["seed"]: row["score"] for row in rows.find("tune", task=task, experts=experts, method=method)
                 if row["labels"] == MOST_LABELS}  # fmt: skip
        less = [found[seed] - own[seed] for seed in found if seed in own and method != "leap"]
        body.append([NAMES[method] if method != "leap" else "all parts", over_seeds(list(found.values())),
                     "reference" if method == "leap" else over_seeds(less, -1.0), *CLAIMS["leap_7"].get(method, (EMPTY,) * 3)])  # fmt: skip
    return Table(
        "LEAP, table 7: each part removed",
        f"leap-tiny, {task}, {experts} of 64 experts, 10,240 labels, 400 steps; score in % on test items.",
        ["configuration", f"{task} %", "less all parts, points", *_claimed(QUALITY)],
        body,
        _reason(body, 3, "no rows of bench_tune.py --what parts"),
    )


def rivals(rows: Rows) -> Table:
    """Ours: baselines under the same labels and steps, on the hard task."""
    task, experts = HARD
    body = [
        [NAMES[method], over_seeds(rows.tuned(method, task, experts))]
        for method in ("leap", "no-active-learning", "vanilla", "full", "kd", "kd-experts", "untuned")
    ]
    return Table(
        "Baselines under the same labels and steps",
        f"leap-tiny, {task}, {experts} of 64 experts, 10,240 labels, 400 steps; score in % on test items. Not in a paper.",
        ["method", f"{task} %"], body, _reason(body, 2, "no rows of bench_tune.py --what baselines"),
    )  # fmt: skip


def lexi_quality(rows: Rows) -> Table:
    """LExI's figures 2 and 4: throughput and quality of inter- and intra-pruning and of LExI.

    Rows: {"bench": "lexi", "model", "method": "base"|"inter"|"intra"|"lexi", "setting": "25 %", "task", "score",
    "total_tok_s": {"median", "p10", "p90"}, "seed"}.
    """
    body = []
    for row in rows.find("lexi"):
        speed = row["total_tok_s"]
        body.append([row["model"], row["method"], row["setting"], row["task"], f"{100 * row['score']:.1f}",
                     f"{speed['median']:.0f} ({speed['p10']:.0f} – {speed['p90']:.0f})", EMPTY])  # fmt: skip
    body += [[model, "lexi", EMPTY, EMPTY, EMPTY, EMPTY, claim] for model, claim in CLAIMS["lexi_4"].items()]
    return Table(
        "LExI, figures 2 and 4: quality against throughput",
        f"Batch {BATCH}; throughput is (input + output tokens) / E2EL, median (10 % – 90 %).",
        ["model", "method", "setting", "task", "score %", "tok/s", "paper's claim"],
        body,
        ["The paper's models have not been loaded here, so their cells are empty."]
        + ([] if rows.find("lexi") else ["Ours are empty: no row of bench lexi."]),
    )


def lexi_sensitivity(rows: Rows) -> Table:
    """LExI's figure 3: D_l(k) by layer and top_k.

    Rows: {"bench": "lexi-sensitivity", "model", "layer", "top_k", "deviation", "std_error", "draws"}.
    """
    found = rows.find("lexi-sensitivity")
    ks = sorted({row["top_k"] for row in found})
    body = []
    for model, layer in dict.fromkeys((row["model"], row["layer"]) for row in found):
        cells = {row["top_k"]: f"{row['deviation']:.3g} ± {row['std_error']:.2g}" for row in found
                 if (row["model"], row["layer"]) == (model, layer)}  # fmt: skip
        body.append([model, str(layer), *(cells.get(k, EMPTY) for k in ks)])
    return Table(
        "LExI, figure 3: deviation D_l(k) by layer",
        "Mean over the draws of Gaussian inputs ± its standard error. The paper prints a picture, no numbers to set beside.",
        ["model", "layer", *(f"k = {k}" for k in ks)], body,
        [] if found else ["Empty: no row of bench lexi-sensitivity."],
    )  # fmt: skip


def llama4(title: str, claimed: Mapping[str, Sequence[str]]) -> Callable[[Rows], Table]:
    """LEAP's tables 3 and 4, on a small model of Llama 4's form; empty until there is one."""

    def make(rows: Rows) -> Table:
        body = [[NAMES.get(name, name), EMPTY, EMPTY, EMPTY, *claim] for name, claim in claimed.items()]
        return Table(
            title, "A small trained model of Llama 4's form (sigmoid, top-1, shared expert, every other layer dense).",
            ["experts or method", *TASKS, *_claimed([*QUALITY, "FLOPs", "ms/token", "GB"])], body,
            ["Our cells are empty: that model is not trained yet."],
        )  # fmt: skip

    return make


def _reason(body: Sequence[Sequence[str]], ours: int, why: str) -> list[str]:
    """A note for the empty cells among the first ``ours`` columns, if there are any."""
    return [f"{EMPTY} in a column of ours: {why}."] if any(EMPTY in row[:ours] for row in body) else []


TABLES: tuple[Callable[[Rows], Table], ...] = (
    scaling, comparison, llama4("LEAP, table 3: Llama 4 Maverick, number of experts", CLAIMS["leap_3"]),
    llama4("LEAP, table 4: Llama 4 Maverick, methods", CLAIMS["leap_4"]), agent_effect, labels_needed, parts, rivals,
    lexi_quality, lexi_sensitivity,
)  # fmt: skip


def main() -> None:
    """Read all rows, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows, and of what is written")
    args = parser.parse_args()
    rows = Rows(args.results)
    made = [table(rows) for table in TABLES]
    write_bytes(args.results / "TABLES.md", "\n".join([INTRO, *(table.markdown() for table in made)]).encode())
    write_json(args.results / "tables.json", {"tables": [asdict(table) for table in made], "made_by": made_by()})
    print(f"{len(made)} tables of {sum(map(len, rows.of.values()))} rows → {args.results / 'TABLES.md'}")


if __name__ == "__main__":
    main()
