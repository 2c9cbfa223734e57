"""One function per kind of file: its JSON in, a part of the report out. What is ill-formed raises as Python does."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from leap_serve.errors import CheckpointError
from leap_serve.plan import Plan
from leap_serve.report.model import Bound, Curve, Gate, Interval, Learning, Score, Table
from leap_serve.statistics import wilson

METRICS = {"toy-gsm": "exact match", "toy-code": "pass@1", "toy-xsum": "ROUGE-L"}
"""Of the tasks that files name without their metric."""
ROW_NAMES = {"leap": "agent", "full": "full fine-tuning", "vanilla": "vanilla, frequency"}
"""What lines of bench_tune.py are called where the method's own name does not say it."""
BINARY = ("exact match", "pass@1", "accuracy")
"""Metrics that are 0 or 1 for each item, so that their number alone gives an interval."""


def json_of(path: Path) -> Any:
    """Parse a JSON file, or what a verb printed with --json: its last line; CheckpointError where neither is JSON."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(path, f"is not text ({error})", "make it again") from None
    try:
        return json.loads(text)
    except ValueError as error:
        try:
            return json.loads(text.strip().rpartition("\n")[2])
        except ValueError:
            raise CheckpointError(path, f"not valid JSON ({error})", "restore the file or make it again") from None


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON Lines file of results; files whose first line is no result row have none."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == 1:
                return
            raise CheckpointError(path, f"row {number} is not valid JSON ({error})", "remove the line") from None
        if not isinstance(row, dict) or "bench" not in row:
            return
        yield row


def number(value: Any) -> float | None:
    """A finite number as it is; anything else is none."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def needed(value: Any) -> float:
    """A finite number, or ValueError."""
    found = number(value)
    if found is None:
        raise ValueError(f"{value!r} is not a finite number")
    return found


def interval(value: float, found: Any) -> Interval:
    """A value with the interval that leap_serve.statistics wrote, or as a pair; without one it stands alone."""
    if isinstance(found, Mapping):
        return Interval(value, needed(found["low"]), needed(found["high"]))
    if isinstance(found, list):
        return Interval(value, needed(found[0]), needed(found[1]))
    return Interval(value)


def score(found: Mapping[str, Any], task: str, differences: Mapping[str, Any] | None = None) -> Score:
    """A task's score: with the interval that eval states, else Wilson's where the metric is 0 or 1 for each item."""
    value, items = needed(found["score"]), found.get("items")
    metric = str(found.get("metric") or METRICS.get(task, "score"))
    spread = interval(value, found.get("interval"))
    if spread.low is None and metric in BINARY and isinstance(items, int) and items > 0 and 0 <= value <= 1:
        found_by = wilson(value, items)
        spread = Interval(value, found_by.low, found_by.high)
    paired = (differences or {}).get("score")
    difference = interval(needed(paired["mean"]), paired) if paired else None
    return Score(metric, spread, number(found.get("loss")), items if isinstance(items, int) else None, difference)


def gate(value: Mapping[str, Any], name: str) -> Gate:
    """What leap eval --gate found."""
    checks = []
    for check in value["checks"]:
        for bound, found in check["bounds"].items():
            observed = interval(needed(found["observed"]["mean"]), found["observed"])
            checks.append(
                Bound(
                    str(check["name"]),
                    str(bound).replace("_", " "),
                    observed,
                    needed(found["bound"]),
                    bool(found["kept"]),
                )
            )
    examples = [
        (str(check["name"]), str(one["why"]), str(one["text"]))
        for check in value["checks"]
        for one in check.get("degenerate_examples", ())
    ]
    return Gate(name, str(value.get("full", "the full model")), bool(value["passed"]), tuple(checks), tuple(examples))


def method_name(name: str) -> str:
    """What a search's line is called."""
    return "agent" if name == "leap" else name


def search_title(task: str, retained: int, layers: int, experts: int, allocation: str) -> str:
    """What identifies a search's chart: lines of the same title compete for the same plan."""
    if allocation == "uniform":
        return f"{task}: {retained // layers} of {experts} experts in each layer"
    return f"{task}: {retained} of {experts * layers} experts, any number in a layer"


def plan_title(task: str, plan: Plan) -> str:
    """The same of a plan: what it was searched for."""
    allocation = "uniform" if len(set(plan.counts)) == 1 else "global"
    return search_title(task, sum(plan.counts), len(plan.counts), plan.num_experts, allocation)


def search_curve(plan: Plan) -> Learning | None:
    """How the search for a plan went, if it is on record: [evaluation, reward, loss] of every better plan."""
    made = plan.made_by
    if not made.get("improvements"):
        return None
    points = [(needed(at), needed(loss)) for at, _, loss in made["improvements"]]
    points.append((float(made.get("evaluations", points[-1][0])), points[-1][1]))
    title = plan_title(str(made.get("task", "")), plan)
    name = method_name(str(made.get("method"))) + (", warm" if made.get("warm_start") else "")
    return Learning("pruning", title, [Curve(name, int(made.get("seed", 0)), tuple(points))])


def search_row(row: Mapping[str, Any]) -> Learning:
    """The same of a row of bench/search_methods.py, and what its plans did on test items; one-shots are single points."""
    points = [(needed(at), needed(loss)) for at, _, loss in row["improvements"]]
    if row["evaluations"]:
        points.append((needed(row["evaluations"]), points[-1][1]))
    retained = row["retained"]
    experts = int(row.get("num_experts", 64))
    title = search_title(
        str(row["task"]), sum(map(len, retained)), len(retained), experts, str(row["allocation"])
    )  # fmt: skip
    name = method_name(str(row["method"])) + (f" from {row['warm']}" if row.get("warm") else "")
    curves = [tuple(points)]
    for what in ("held_out_loss", "score"):
        seen = {int(at): point[what] for at, point in row.get("points", {}).items() if what in point}
        if what in row:
            seen[max(int(row["evaluations"]), 1)] = row[what]
        curves.append(tuple((float(at), needed(seen[at])) for at in sorted(seen)))
    search, held_out, scores = ([Curve(name, int(row["seed"]), own)] if own else [] for own in curves)
    return Learning("pruning", title, search, held_out=held_out, scores=scores)


def search_state(folder: Path, header: Mapping[str, Any], label: str, done: list[Plan]) -> Learning | None:
    """A search that continues, or whose plan does not tell how it went; None where the plan does."""
    from safetensors.numpy import load_file

    progress, budget = header["progress"], int(header["budget"])
    if any(
        plan.made_by.get("improvements") and plan.made_by.get("search_loss") == progress["best_loss"] for plan in done
    ):
        return None
    path = folder / str(header["tensors"])
    if not path.is_file():
        raise CheckpointError(path, "the file does not exist", "start the search anew")
    tensors = load_file(path)
    searched = len(header["temperatures"])
    plans = tensors["plans"][:, :, : -searched if searched > 1 else None]
    counts = plans.sum(2)
    legal = (counts == header["cap"]).all(1) if header["uniform"] else counts.sum(1) == budget
    best, points = -math.inf, []
    for at, (reward, loss, fits) in enumerate(zip(tensors["rewards"], tensors["losses"], legal, strict=True), 1):
        if (fits or header["may_stop"]) and reward > best:
            best = float(reward)
            points.append((float(at), float(loss)))
    if not points:
        return None
    points.append((float(len(legal)), points[-1][1]))
    title = search_title(label, budget, plans.shape[1], plans.shape[2], "uniform" if header["uniform"] else "global")
    wanted = int(header["settings"]["episodes"])
    notes = [f"The agent has evaluated {len(legal)} of {wanted} plans so far."] if len(legal) < wanted else []
    return Learning("pruning", title, [Curve("agent", int(header["settings"]["seed"]), tuple(points))], notes=notes)


def tuning(value: Mapping[str, Any], name: str, plan: Plan | None) -> Learning:
    """A tuning run: validation loss by labels, from before the first step on, and exact answers from the first round."""
    config, made = value["config"], value.get("made_by") or {}
    points = [(0.0, needed(value["validation_loss_before"]))]
    points += [(needed(row["labels"]), needed(row["validation_loss"])) for row in value["curve"]]
    notes = []
    if router := value.get("router"):
        verdict = "the tuned router stays" if router["kept"] else "no gain was shown, so the sliced router stays"
        notes.append(
            f"{name}: on {router['items']} other items the loss is {router['sliced_loss']:.4f} with the sliced router and "
            f"{router['tuned_loss']:.4f} with the tuned one (p = {router['p_value']:.4f}): {verdict}."
        )
        if not router.get("adapters_kept", True):
            notes.append(
                f"{name}: without its router the adapters had a higher loss than the cut, so they were emptied."
            )
    if value.get("best_round") == 0:
        notes.append(f"{name}: no round was better than the cut itself, so what was written changes nothing.")
    task, fingerprint = (
        str(made.get("task") or made.get("data") or "tuning"),
        str(value.get("fingerprint") or "unknown"),
    )
    title = f"{plan_title(task, plan) if plan else task} (plan {fingerprint[:8]})"
    line = tuning_name(config, made), int(config.get("seed", 0))
    return Learning("routing", title, [Curve(*line, tuple(points))], exact_curves(*line, value["curve"]), notes=notes)


def exact_curves(name: str, seed: int, rounds: list[Mapping[str, Any]]) -> list[Curve]:
    """The share of exact answers by labels as a curve, where every round tells it."""
    points = tuple(
        (needed(one["labels"]), needed(one["validation_exact"])) for one in rounds if "validation_exact" in one
    )
    return [Curve(name, seed, points)] if points and len(points) == len(rounds) else []


def tuning_row(row: Mapping[str, Any]) -> Learning:
    """The same of a row of bench/bench_tune.py that tells its curve."""
    points = [(needed(one["labels"]), needed(one["validation_loss"])) for one in row["curve"]]
    name = ROW_NAMES.get(str(row["method"]), str(row["method"]).replace("-", " "))
    title = f"{row['task']}: {row['experts']} experts in each layer, {int(row['labels']):,} labels"
    line = name, int(row["seed"])
    return Learning("routing", title, [Curve(*line, tuple(points))], exact_curves(*line, row["curve"]))


def tuning_name(config: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    """The whole pipeline, a baseline, or what was left out."""
    if made.get("baseline"):
        return str(made["baseline"])
    left_out = [
        text
        for off, text in (
            (not config["rl_router"], "no RL router"),
            (config["acquisition"]["strategy"] == "random", "random batches"),
            (not config["supervised_router"], "no supervised router"),
            (config["experts"] == "none", "no LoRA"),
            (config["distill"] != "none", "with a teacher"),
        )
        if off
    ]
    chosen = config["acquisition"]
    if chosen["strategy"] != "random" and (chosen["uncertainty"], chosen["diversity"]) != ("answer", "k-means++"):
        left_out.append(f"labels by {chosen['uncertainty']} and {chosen['diversity']}")
    return ", ".join(left_out) or "agent"


def table(value: Mapping[str, Any]) -> Table:
    """A table of bench/tables.py."""
    header = tuple(map(str, value["header"]))
    body = tuple(tuple(map(str, row)) for row in value["rows"])
    if any(len(row) != len(header) for row in body):
        raise ValueError(f"{value['title']!r} has rows of other lengths than its header")
    return Table(
        str(value["title"]), header, body, str(value.get("caption", "")), tuple(map(str, value.get("notes", ())))
    )
