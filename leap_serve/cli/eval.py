"""``leap eval MODEL|URL --task T``: tasks, perplexity, full against pruned, and the off-domain gate."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import Checkpoint
from leap_serve.cli.console import progress_bar, say, table
from leap_serve.cli.evaluating import Side, Work, add_engine_arguments, sides, work_of
from leap_serve.errors import LeapError, UsageError
from leap_serve.evaluation.endpoint import is_url
from leap_serve.evaluation.evaluate import Evaluation, compare
from leap_serve.evaluation.gate import Gate, GateError, run_gate
from leap_serve.evaluation.journal import Journal
from leap_serve.files import read_json, write_json
from leap_serve.grading.sandbox import UNSAFE
from leap_serve.hub import resolve_model
from leap_serve.provenance import hardware, made_by, versions
from leap_serve.statistics import Interval
from leap_serve.tasks.passkey import DEPTHS, WORDS
from leap_serve.tasks.registry import NAMES
from leap_serve.tasks.text import STRIDE, WINDOW

UNFINISHED = Path("runs") / "eval"
EPILOG = """\
Answers are kept as they come, in FILE.answers.jsonl beside --out FILE.json (without --out in runs/eval, until the
command ends): the same command goes on where it was killed. The key for an endpoint is read from OPENAI_API_KEY.
Loss is the mean negative log-likelihood per answer token in nats, the end of text included (of a server other than
leap serve, which does not tell its token, not: then a note says so). Intervals are at 95 %: of a difference by paired
bootstrap over items; of a score Wilson's where items are right or wrong, by bootstrap otherwise.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", metavar="MODEL|URL", help="a checkpoint folder, leap-tiny, a model id, or http://…")
    parser.add_argument(
        "--task", action="append", default=[],
        help=f"one of {', '.join(NAMES)}, perplexity, or a task file (.yaml); may be repeated",
    )  # fmt: skip
    parser.add_argument("--vs", metavar="MODEL|URL", help="compare with this one, item by item: usually the full model")
    parser.add_argument(
        "--gate", type=Path, help="a YAML file of bounds off the task; exit status 1 when one is broken"
    )
    parser.add_argument("-o", "--out", type=Path, help="write the result here, as JSON, with every item's answer")
    items = parser.add_argument_group("items")
    items.add_argument("--data", help="rows of a published task (file or folder) or text of perplexity, not the hub")
    items.add_argument("--limit", type=int, default=500, help="items per task, windows of a text (default 500)")
    items.add_argument("--split", default="test", choices=("train", "validation", "test"))
    items.add_argument("--seed", type=int, default=0, help="seed of the generated items, and of sampling")
    items.add_argument("--window", type=int, default=WINDOW, help=f"perplexity: tokens at a time (default {WINDOW})")
    items.add_argument(
        "--stride", type=int, default=STRIDE, help=f"perplexity: from window to window (default {STRIDE})"
    )
    items.add_argument("--words", type=int, nargs="+", default=list(WORDS), help="passkey: lengths of the filler")
    items.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS), help="passkey: where the key is, in %%")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--samples", type=int, default=1, help="code: completions per problem, for pass@k")
    answers.add_argument("--k", type=int, nargs="+", default=[1], help="code: the k of pass@k; the first is the score")
    answers.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    answers.add_argument(
        "--allow-unsafe-execution", action="store_true",
        help="run generated code even where the kernel allows no sandbox, at your own risk",
    )  # fmt: skip
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score the model, and the other one with --vs, on every task; or put both through the gate."""
    if args.limit < 1:
        raise UsageError("--limit", f"must be at least 1, got {args.limit}", "give a positive number of items")
    if bool(args.task) == (args.gate is not None):
        raise UsageError("--task, --gate", "give either tasks or a gate", "see leap eval --help")
    if args.allow_unsafe_execution:
        os.environ[UNSAFE] = "1"
    _check_out(args.out)
    return _gate(args) if args.gate is not None else _tasks(args)


def _tasks(args: argparse.Namespace) -> dict[str, Any]:
    work = work_of(args)
    found: list[dict[str, Evaluation]] = []
    notes: list[str] = []
    with _journal(args) as journal:
        for side in sides(args, args.vs, journal):
            try:
                found.append({one.name: _evaluated(side, one) for one in work})
            finally:
                side.model.close()
            if side.note and any(one.scores and not one.of_text for one in found[-1].values()):
                notes.append(side.note)
    ours, other = found[0], found[1] if args.vs else None
    engine = args.engine if not is_url(args.target) else "chat endpoint" if args.chat else "endpoint"
    result = {"model": args.target, "split": args.split, "engine": engine, "tasks": _json(ours)}
    if notes:
        result["notes"] = notes
    if other is not None:
        differences = {name: compare(one, other[name]) for name, one in ours.items()}
        result["vs"] = {"model": args.vs, "tasks": _json(other)}
        result["differences"] = {n: {k: v.to_json() for k, v in one.items()} for n, one in differences.items()}
        _show_both(args, ours, other, differences)
    else:
        _show(f"{args.target} on {args.split}", ours)
    for note in notes:
        say(f"Note: {note}.")
    if args.out is not None:
        whole = {**result, "tasks": _json(ours, True)}
        if other is not None:
            whole["vs"] = {"model": args.vs, "tasks": _json(other, True)}
        _write(args.out, whole)
    journal.done(keep=args.out is not None)
    return result


def _gate(args: argparse.Namespace) -> dict[str, Any]:
    gate = Gate.load(args.gate, args.chat)
    full = args.vs or _base_of(args.target)
    out = args.out or UNFINISHED / f"{args.gate.stem}.json"
    _check_out(out)
    with _journal(args) as journal:
        pruned, base = sides(args, full, journal)
        bars = _Bars()
        try:
            result = run_gate(gate, lambda: base.model, lambda: pruned.model, bars.begin)
        finally:
            bars.end()
            base.model.close()
            pruned.model.close()
    result = {"model": args.target, "full": full, **result}
    _write(out, result)
    journal.done(keep=args.out is not None)
    _show_gate(result)
    say(f"written to {out}")
    if not result["passed"]:
        what = f"bounds broken: {'; '.join(result['broken'])}"
        error = GateError(args.gate, what, "retain more experts, tune, or loosen the bounds")
        error.result = result
        raise error
    return result


def _evaluated(side: Side, work: Work) -> Evaluation:
    side.model.label = f"{side.name}: {work.name}"
    with progress_bar(f"eval {side.name} on {work.name}") as progress:
        return work.evaluate(side.model, progress)


def _journal(args: argparse.Namespace) -> Journal:
    """Where answers are kept: beside --out, or where the same command finds them after a kill."""
    if args.out is not None:
        return Journal(args.out.with_suffix(".answers.jsonl"))
    named = [args.target, args.vs, args.task, str(args.gate), args.data]
    return Journal(UNFINISHED / f"{hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]}.answers.jsonl")


def _check_out(out: Path | None) -> None:
    """Refuse to overwrite what leap eval has not written."""
    if out is not None and out.exists():
        found = read_json(out) if out.is_file() else None
        if not isinstance(found, dict) or not {"tasks", "checks"} & set(found):
            raise UsageError(out, "exists and is no result of leap eval", "choose another --out")


def _write(out: Path, result: Mapping[str, Any]) -> None:
    write_json(out, {**result, "versions": versions(), "hardware": hardware(), "made_by": made_by()})


def _base_of(target: str) -> str:
    """The full model that a cut came from, where its manifest says so and it can be had."""
    remedy = "give the full model with --vs"
    try:
        plan = Checkpoint.open(resolve_model(target)).plan
        if plan is None:
            raise UsageError(target, "is no cut, so it names no full model", remedy)
        folder = resolve_model(plan.base.id, plan.base.revision)
        if Checkpoint.open(folder).identity().sha256 == plan.base.sha256:
            return str(folder)
    except UsageError:
        raise
    except LeapError as error:
        raise UsageError("--gate", f"the full model is not at hand ({error.what})", remedy) from None
    raise UsageError("--gate", f"{plan.base.id} is not the model that {target} was cut from", remedy)


def _json(found: Mapping[str, Evaluation], with_items: bool = False) -> dict[str, Any]:
    return {name: one.to_json(with_items) for name, one in found.items()}


def _number(value: float, metric: str) -> str:
    return f"{value:.4f}" if metric in ("perplexity", "loss") else f"{100 * value:.1f} %"


def _span(found: Interval, metric: str) -> str:
    return f"{_number(found.low, metric)} – {_number(found.high, metric)}"


def _show(title: str, found: Mapping[str, Evaluation]) -> None:
    rows: list[Sequence[object]] = []
    for name, one in found.items():
        loss = "–" if one.no_loss else f"{one.loss:.4f}"
        score = _number(one.score, one.metric)
        rows.append([name, one.metric, score, _span(one.interval, one.metric), loss, len(one.per_item)])
        rows += [["", k, _number(sum(v) / len(v), k), "", "", ""] for k, v in one.details.items()]
        rows += [["", group, _number(mean, one.metric), "", "", ""] for group, mean in one.groups.items()]
    table(title, ["task", "metric", "score", "95 % interval", "loss", "items"], rows)
    for reason in dict.fromkeys(one.no_loss for one in found.values() if one.no_loss):
        say(f"No loss: {reason}.")


def _show_both(
    args: argparse.Namespace, ours: Mapping[str, Evaluation], other: Mapping[str, Evaluation],
    differences: Mapping[str, Mapping[str, Interval]],
) -> None:  # fmt: skip
    rows: list[Sequence[object]] = []
    for name, found in differences.items():
        for what, interval in found.items():
            metric = ours[name].metric if what == "score" else what
            pair = [_mean(one[name], what) for one in (ours, other)]
            rows.append([name, metric, *(_number(value, metric) for value in pair), _number(interval.mean, metric),
                         _span(interval, metric), interval.n])  # fmt: skip
    header = ["task", "metric", Path(args.target).name, Path(args.vs).name, "difference", "95 % interval", "items"]
    table(f"{args.target} against {args.vs} on {args.split}, paired", header, rows)


def _mean(one: Evaluation, what: str) -> float:
    if what in ("score", "loss"):
        return one.score if what == "score" else one.loss
    return sum(one.details[what]) / len(one.details[what])


def _show_gate(result: Mapping[str, Any]) -> None:
    rows = [
        [check["name"], bound.removeprefix("max_").replace("_", " "), f"{found['observed']['mean']:.4f}",
         f"{found['observed']['low']:.4f} – {found['observed']['high']:.4f}", f"{found['bound']:g}",
         "kept" if found["kept"] else "BROKEN"]
        for check in result["checks"] for bound, found in check["bounds"].items()
    ]  # fmt: skip
    table(f"{result['model']} against {result['full']}, off the task", ["check", "what", "observed", "95 % interval",
          "bound", ""], rows)  # fmt: skip
    for check in result["checks"]:
        for example in check["degenerate_examples"]:
            say(f"{check['name']}: {example['why']}: …{' '.join(example['text'].split())[-120:]}")


class _Bars:
    """One progress bar after the other."""

    def __init__(self) -> None:
        self._open: Any = None

    def begin(self, label: str) -> Callable[[int, int], None]:
        """End the bar before, and show a new one."""
        self.end()
        self._open = progress_bar(f"gate {label}")
        started: Callable[[int, int], None] = self._open.__enter__()
        return started

    def end(self) -> None:
        """Take the bar away."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
