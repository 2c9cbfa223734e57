"""The off-domain gate: what pruning for one task may cost elsewhere, in bounds that a pruned model keeps or breaks.

    by: mean                       # or interval: the interval's worse end must keep the bound, too
    checks:
      - text: general.txt          # or Salesforce/wikitext, allenai/c4: loss of running text
        windows: 32                # of 512 tokens, half of them context
        max_loss_increase: 0.2     # nats per token, pruned less full
        continue: 64               # tokens that both models go on by, from 32 words at as many places
        max_degenerate_increase: 0.05
      - task: toy-code             # any task of leap eval, or a task file
        limit: 100
        max_score_drop: 0.05       # full less pruned, of a score in [0, 1]
        max_loss_increase: 0.5
        max_degenerate_increase: 0.02

A share of degenerate answers is that of answers that leap_serve.grading.degeneration flags: loops, and repetition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from leap_serve.engine import Completion, Model, Progress
from leap_serve.errors import LeapError, UsageError
from leap_serve.evaluation.evaluate import Evaluation, compare, evaluate, evaluate_text
from leap_serve.files import read_yaml
from leap_serve.grading.degeneration import degenerate
from leap_serve.statistics import Interval, paired_bootstrap
from leap_serve.tasks.base import SPLITS, Split, Task
from leap_serve.tasks.chat import in_chat
from leap_serve.tasks.registry import load_task
from leap_serve.tasks.text import Text

BOUNDS = ("max_score_drop", "max_loss_increase", "max_degenerate_increase")
TEXT_KEYS = ("text", "split", "windows", "window", "continue", *BOUNDS[1:])
TASK_KEYS = ("task", "data", "split", "limit", "seed", *BOUNDS)
EXAMPLES = 3
Opened = Callable[[], Model]


class GateError(LeapError):
    """A gate whose bounds are broken; ``result`` is what ``run_gate`` returned."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison outside the task.

    Args:
        name: for tables and messages.
        source: a running text, or a task.
        limit: windows or items.
        goes_on: tokens to continue a text by; 0 for none, and for tasks, which generate anyway.
        bounds: name as in BOUNDS → largest value that passes.
    """

    name: str
    source: Text | Task
    split: Split
    limit: int
    seed: int
    goes_on: int
    bounds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Observed:
    """What one model did in a check: its evaluation, and its answers or continuations."""

    evaluation: Evaluation
    answers: tuple[Completion, ...]

    @property
    def flags(self) -> list[str]:
        """Of every answer why it is degenerate, or ""."""
        return [degenerate(answer.text) for answer in self.answers]


@dataclass(frozen=True, slots=True)
class Gate:
    """Checks with their bounds. ``by`` says what must keep a bound: the mean, or the worse end of its interval too."""

    where: str
    checks: tuple[Check, ...]
    by: Literal["mean", "interval"] = "mean"

    @classmethod
    def load(cls, path: Path, chat: bool = False) -> Gate:
        """Read and check a gate's YAML; paths in it are relative to it. Raises LeapError that lists all that is wrong.

        ``chat``: the models are asked through chat completions.
        """
        try:
            raw = read_yaml(path)
        except FileNotFoundError:
            raise UsageError("--gate", f"{path} does not exist", "check the path") from None
        problems = list(_problems(raw))
        if problems:
            raise LeapError(path, "; ".join(problems), "see the example in leap_serve/evaluation/gate.py or the README")
        return cls(str(path), tuple(_check(entry, path.parent, chat) for entry in raw["checks"]), raw.get("by", "mean"))


def run_gate(
    gate: Gate, full: Opened, pruned: Opened, progress: Callable[[str], Progress] | None = None
) -> dict[str, Any]:
    """Compare a pruned with the full model in every check, and return the JSON of it.

    Args:
        full, pruned: open a model; the first is closed before the second is opened.
        progress: gives a label's Progress.

    Returns {"passed", "broken": [sentences], "by", "checks": [{"name", "bounds", "full", "pruned", …}]}. Each bound
    holds "observed" (the difference for the worse, an interval), "bound" and "kept". Raises LeapError, of a model too.
    """
    seen = [_observe(gate.checks, opened, label, progress) for label, opened in (("full", full), ("pruned", pruned))]
    rows = [_row(gate, check, *both) for check, *both in zip(gate.checks, *seen, strict=True)]
    broken = [
        f"{row['name']}: {bound} is {found['observed']['mean']:.4g}, the bound is {found['bound']:.4g}"
        for row in rows for bound, found in row["bounds"].items() if not found["kept"]
    ]  # fmt: skip
    return {"gate": gate.where, "passed": not broken, "broken": broken, "by": gate.by, "checks": rows}


def _observe(
    checks: Sequence[Check], opened: Opened, label: str, progress: Callable[[str], Progress] | None
) -> list[Observed]:
    """Put one model through all checks."""
    model = opened()
    try:
        return [_observed(model, check, progress(f"{label}: {check.name}") if progress else None) for check in checks]
    finally:
        model.close()


def _observed(model: Model, check: Check, progress: Progress | None) -> Observed:
    if isinstance(check.source, Text):
        text = check.source
        found = evaluate_text(model, text, check.split, check.limit, progress)
        answers: Sequence[Completion] = ()
        if check.goes_on:
            answers = model.generate(_beginnings(text, check.split, check.limit), check.goes_on, progress=progress)
        return Observed(found, tuple(answers))
    items = check.source.items(check.split, check.limit, check.seed)
    found = evaluate(model, check.source, items, progress)
    return Observed(found, found.completions)


def _beginnings(text: Text, split: Split, count: int) -> list[str]:
    """Cut ``count`` prompts of 32 words out of a text, at equal distances: alike for models with other tokenizers."""
    words = text.read(split).split(" ")
    step = max(1, len(words) // count)
    return [" ".join(words[start : start + 32]) for start in range(0, len(words), step)][:count]


def _row(gate: Gate, check: Check, full: Observed, pruned: Observed) -> dict[str, Any]:
    differences = compare(pruned.evaluation, full.evaluation)
    flags = pruned.flags, full.flags
    worse: dict[str, Interval] = {}
    if "score" in differences:
        worse["max_score_drop"] = _negated(differences["score"])
    if "loss" in differences:
        worse["max_loss_increase"] = differences["loss"]
    if pruned.answers:
        ours, theirs = ([float(bool(flag)) for flag in one] for one in flags)
        worse["max_degenerate_increase"] = paired_bootstrap(ours, theirs)
    bounds = {}
    for name, bound in check.bounds.items():
        if name not in worse:
            why = pruned.evaluation.no_loss or full.evaluation.no_loss or "the models' tokens differ"
            raise LeapError(gate.where, f"{check.name}: {name} cannot be measured ({why})", "remove the bound")
        observed = worse[name]
        edge = observed.mean if gate.by == "mean" else max(observed.mean, observed.high)
        bounds[name] = {"observed": observed.to_json(), "bound": bound, "kept": edge <= bound}
    return {
        "name": check.name, "split": check.split, "bounds": bounds,
        "full": _side(full), "pruned": _side(pruned),
        "degenerate_examples": [
            {"why": why, "text": answer.text[-300:]}
            for answer, why in zip(pruned.answers, flags[0], strict=True) if why
        ][:EXAMPLES],
    }  # fmt: skip


def _side(observed: Observed) -> dict[str, Any]:
    out = observed.evaluation.to_json()
    if observed.answers:
        out["degenerate_share"] = sum(map(bool, observed.flags)) / len(observed.answers)
    return out


def _negated(found: Interval) -> Interval:
    return Interval(-found.mean, -found.high, -found.low, found.confidence, found.n)


def _check(entry: Mapping[str, Any], folder: Path, chat: bool) -> Check:
    bounds = {name: float(entry[name]) for name in BOUNDS if name in entry}
    split = entry.get("split", "test")
    if "text" in entry:
        window = entry.get("window", 512)
        name = str(entry["text"])
        source = name if not (folder / name).is_file() else str(folder / name)
        text = Text(source, window, max(1, window // 2))
        return Check(name, text, split, entry.get("windows", 32), 0, entry.get("continue", 0), bounds)
    name = str(entry["task"])
    task = str(folder / name) if (folder / name).is_file() else name
    data = folder / entry["data"] if "data" in entry else None
    asked = load_task(task, data)
    asked = in_chat(asked) if chat else asked
    return Check(name, asked, split, entry.get("limit", 100), entry.get("seed", 0), 0, bounds)


def _problems(raw: object) -> Iterator[str]:
    if not isinstance(raw, dict) or not isinstance(raw.get("checks"), list) or not raw["checks"]:
        yield "holds no list of checks"
        return
    yield from (f"unknown key {key!r}" for key in raw if key not in ("by", "checks"))
    if raw.get("by", "mean") not in ("mean", "interval"):
        yield f"by is {raw['by']!r}, not mean or interval"
    for number, entry in enumerate(raw["checks"], 1):
        if not isinstance(entry, dict) or ("text" in entry) == ("task" in entry):
            yield f"check {number} names neither one text nor one task"
        else:
            yield from (f"check {number}: {problem}" for problem in _entry_problems(entry))


def _entry_problems(entry: Mapping[Any, Any]) -> Iterator[str]:
    known = TEXT_KEYS if "text" in entry else TASK_KEYS
    yield from (f"unknown key {key!r}, known are {', '.join(known)}" for key in entry if key not in known)
    if not any(name in entry for name in BOUNDS):
        yield f"has no bound: {', '.join(BOUNDS)}"
    for name in BOUNDS:
        value = entry.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            yield f"{name} is {value!r}, not a number"
    for name in ("windows", "window", "continue", "limit", "seed"):
        least = 0 if name in ("seed", "continue") else 1
        if type(entry.get(name, 1)) is not int or entry.get(name, 1) < least:
            yield f"{name} is {entry[name]!r}, not a count"
    for name in ("text", "task", "data"):
        if not isinstance(entry.get(name, ""), str):
            yield f"{name} is {entry[name]!r}, not a text"
    if entry.get("split", "test") not in SPLITS:
        yield f"split is {entry['split']!r}, not one of {', '.join(SPLITS)}"
    if "text" in entry and "max_degenerate_increase" in entry and not entry.get("continue"):
        yield "max_degenerate_increase needs continue: tokens to generate"
