"""LEAP's tables 1, 6 and 7: numbers of experts, labels, parts; and rivals under the same labels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from table_readers.rows import (
    BATCH,
    CLAIMS,
    EMPTY,
    EXPERTS,
    FEW,
    HARD,
    MOST_LABELS,
    NAMES,
    QUALITY,
    TASKS,
    Rows,
    Table,
    claimed,
    latency,
    over_seeds,
    reason,
    sizes,
    spread,
)


def scaling(rows: Rows) -> Table:
    """LEAP's table 1: quality and cost against the number of retained experts."""
    body = []
    for experts in EXPERTS:
        scores = [rows.full(t) if experts == 64 else rows.tuned("leap", t, experts) for t in TASKS]
        flops, weights = sizes(experts)
        body.append([f"{experts}{' (full)' if experts == 64 else ''}", *map(over_seeds, scores), flops,
                     latency(rows, experts), weights, *CLAIMS["leap_1"][str(experts)]])  # fmt: skip
    return Table(
        "LEAP, table 1: quality and cost against the number of experts",
        "leap-tiny (64 experts, top-4), plans of the agent, tuned with 10,240 labels and 400 steps; scores in % on test items. "
        "The paper has Qwen3-235B-A22B with 128 experts; rows stand together by the share that is retained.",
        ["experts of 64", *TASKS, "FLOPs, share", f"TPOT, share, batch {BATCH}", "weights, share",
         *claimed([*QUALITY, "FLOPs", "ms/token", "GB"])],
        body,
        ["FLOPs and weights are computed from the checkpoint's headers. top_k stays 4, so FLOPs fall by router rows only.",
         "TPOT is of the random model of bench_batch.py, in which experts dominate; on leap-tiny they do not.",
         *reason(body, 7, "a budget without rows was not tuned or not timed: bench_tune.py, bench_batch.py")],
    )  # fmt: skip


CHOICES = ("no-active-learning", "leap", "answer-doubt")
"""Ways to choose what is labelled: at random, by the paper's eq. 15-17, and by our default."""


def labels_needed(rows: Rows) -> Table:
    """LEAP's table 6: labels until a share of the full model's score is reached, random against active learning."""
    full = statistics.median([row["score"] for row in rows.full(HARD[0])] or [math.nan])
    body = []
    # The last level is ours.
    for text, claim in {**CLAIMS["leap_6"], "0.99": [EMPTY] * 2}.items():
        share = float(text)
        needed = [_labels(rows, method, share * full) for method in CHOICES]
        body.append([f"{100 * share:.1f} % ({100 * share * full:.1f})", *needed, *claim])
    return Table(
        "LEAP, table 6: labels needed for a share of the full model's score",
        f"leap-tiny, {HARD[0]}, {HARD[1]} of 64 experts, 400 steps however many labels; interpolated in the logarithm of the "
        "labels between the mean scores of the same seeds.",
        ["share of the full score (score in %)", "random batches", "active, eq. 15-17", "active, doubt of the answer",
         *claimed(["random", "active learning"])],
        body,
        reason(body, 4, "no rows of bench_tune.py --what labels"),
    )  # fmt: skip


def curve(rows: Rows) -> Table:
    """Ours: the score against the number of labels, for each way to choose them."""
    task, experts = HARD
    levels = sorted({row["labels"] for row in rows.find("tune", task=task, experts=experts) if row["labels"]})
    body = [
        [f"{level:,}", *(over_seeds(rows.tuned(method, task, experts, level)) for method in CHOICES)]
        for level in levels
    ]
    return Table(
        "Score against the number of labels",
        f"leap-tiny, {task}, {experts} of 64 experts, 400 steps however many labels; score in % on test items. Not in a paper.",
        ["labels", "random batches", "active, eq. 15-17", "active, doubt of the answer"],
        body,
        reason(body, 4, "not measured: bench_tune.py --what labels"),
    )  # fmt: skip


def _labels(rows: Rows, method: str, level: float) -> str:
    """The labels at which the mean score reaches a level; otherwise the best score there is.

    All means are of the same seeds: while the bench is not finished, those (and the numbers of labels) with which most
    runs are counted.
    """
    found: dict[int, dict[int, float]] = {}
    for row in rows.find("tune", task=HARD[0], experts=HARD[1], method=method):
        found.setdefault(row["labels"], {})[row["seed"]] = row["score"]
    choices = [
        {labels: scores for labels, scores in found.items() if len(scores) >= least}
        for least in range(1, 1 + max(map(len, found.values()), default=0))
    ]
    found = max(choices, key=lambda some: len(some) * len(_common(some)), default={})
    common = sorted(_common(found))
    seeds = f"{len(common)} seed{'s' if len(common) > 1 else ''}"
    means = [
        (labels, statistics.fmean(scores[seed] for seed in common))
        for labels, scores in sorted(found.items())
        if common
    ]
    before: tuple[int, float] | None = None
    for labels, mean in means:
        if mean >= level:
            if before is None:
                return f"≤ {labels:,} ({seeds})"
            part = (level - before[1]) / (mean - before[1])
            return f"{before[0] * (labels / before[0]) ** part:,.0f} ({seeds})"
        before = labels, mean
    return (
        f"not reached with {before[0]:,}: {100 * max(mean for _, mean in means):.1f} % ({seeds})" if before else EMPTY
    )


def _common(found: Mapping[int, Mapping[int, float]]) -> set[int]:
    """The seeds that every number of labels has."""
    return set.intersection(*map(set, found.values())) if found else set()


def _less(rows: Rows, method: str, reference: str, labels: int, experts: int = HARD[1]) -> str:
    """How many points a method has more than a reference on the hard task, paired by seed."""
    scores = [
        {
            row["seed"]: row["score"]
            for row in rows.find("tune", task=HARD[0], experts=experts, method=one, labels=labels)
        }
        for one in (method, reference)
    ]
    if method == reference:
        return "reference" if scores[0] else EMPTY
    return spread([scores[0][seed] - scores[1][seed] for seed in scores[0].keys() & scores[1].keys()], -1.0)


def parts(rows: Rows) -> Table:
    """LEAP's table 7: each part removed; differences are paired by seed."""
    task, experts = HARD
    body = [
        [NAMES[method] if method != "leap" else "all parts", over_seeds(rows.tuned(method, task, experts)),
         _less(rows, method, "leap", MOST_LABELS), *CLAIMS["leap_7"].get(method, (EMPTY,) * 3)]
        for method in ("leap", "no-rl-router", "no-supervised-router", "no-router", "no-active-learning", "no-lora", "no-agent")
    ]  # fmt: skip
    return Table(
        "LEAP, table 7: each part removed",
        f"leap-tiny, {task}, {experts} of 64 experts, 10,240 labels, 400 steps; score in % on test items.",
        ["configuration", f"{task} %", "less all parts, points", *claimed(QUALITY)],
        body,
        reason(body, 3, "no rows of bench_tune.py --what parts router"),
    )


TIGHT = 4
"""Experts of 64 at which rivals have more to repair."""


def rivals(rows: Rows) -> Table:
    """Ours: baselines under the same labels and steps, on the hard task."""
    task, experts = HARD
    methods = ("answer-doubt", "teacher", "leap", "no-active-learning", "vanilla", "full", "kd", "kd-experts")
    names = NAMES | {"leap": "LEAP, labels by eq. 15-17"}
    # What the others are compared with: our default, once it has as many seeds as the paper's way.
    by_default = {
        kept: len(rows.tuned("answer-doubt", task, kept)) >= len(rows.tuned("leap", task, kept))
        for kept in (experts, TIGHT)
    }
    beside = {kept: "answer-doubt" if whole else "leap" for kept, whole in by_default.items()}
    body = [
        [names[method], over_seeds(rows.tuned(method, task, experts, FEW)), _less(rows, method, "answer-doubt", FEW),
         *(cell for kept in (experts, TIGHT)
           for cell in (over_seeds(rows.tuned(method, task, kept)), _less(rows, method, beside[kept], MOST_LABELS, kept)))]
        for method in methods
    ]  # fmt: skip
    return Table(
        "Baselines under the same labels and steps",
        f"leap-tiny, {task}, {experts} and {TIGHT} of 64 experts, 400 steps; score in % on test items, differences paired by "
        "seed. Not in a paper.",
        ["method", f"{experts} of 64, {FEW:,} labels", "less the reference, points",
         *(cell for kept in (experts, TIGHT)
           for cell in (f"{kept} of 64, {MOST_LABELS:,} labels", "less the reference, points"))], body,
        reason(body, 7, "not measured: bench_tune.py --what few baselines tight"),
    )  # fmt: skip
