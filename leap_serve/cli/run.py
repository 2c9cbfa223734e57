"""``leap run recipe.yaml``: the whole line, stage by stage; a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import argparse
import importlib
import importlib.resources
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from leap_serve.cli.console import say, table
from leap_serve.errors import LeapError, UsageError
from leap_serve.files import read_json, write_json
from leap_serve.provenance import made_by
from leap_serve.recipe import GATE, SEARCH, TUNE, Recipe, Stage
from leap_serve.report import write_report
from leap_serve.server.launch import dying_with_parent

RECORD = "run.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument(
        "recipe", type=Path,
        help=f"a YAML file: model, task or data, and the stages' flags; or one that is bundled: {', '.join(bundled())}",
    )  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, help="folder of the run (default: runs/<name of the recipe>)")
    parser.add_argument("--again", action="store_true", help="run every stage, also those on record")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the stages that are not on record for these very settings."""
    path = bundled().get(str(args.recipe), args.recipe)
    return run_recipe(path, args.out or Path("runs") / path.stem, again=args.again)


def bundled() -> dict[str, Path]:
    """The recipes that leap-serve brings, by name."""
    folder = Path(str(importlib.resources.files("leap_training") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def run_recipe(path: Path, out: Path, again: bool = False) -> dict[str, Any]:
    """Run a recipe in a folder; returns {"out", "stages": {name: its verb's result}}.

    Raises LeapError where a stage fails; what was done until then is on record.
    """
    recipe = Recipe.load(path)
    recipe.check_model()
    if out.exists() and not out.is_dir():
        raise UsageError(out, "is a file", "give a folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    record = out / RECORD
    known: dict[str, Any] = read_json(record).get("stages", {}) if record.exists() and not again else {}
    for state in (SEARCH, TUNE) if again else ():
        shutil.rmtree(out / state, ignore_errors=True)
    done: dict[str, Any] = {}
    work = recipe.plan_of_work(out)
    check_flags(work)
    for stage in work:
        before = known.get(stage.name)
        if before and before["key"] == stage.key and (stage.writes is None or (out / stage.writes).exists()):
            say(f"{stage.name}: on record, not run again")
            done[stage.name] = before
            continue
        say(f"{stage.name}: leap {' '.join(stage.argv)}")
        done[stage.name] = {"key": stage.key, "argv": list(stage.argv), "result": _run_stage(stage, out)}
        write_json(record, {"recipe": str(path), "model": recipe.model, "stages": done, "made_by": made_by()})
    table(f"{path} → {out}", ["stage", "key"], [[name, entry["key"][:12]] for name, entry in done.items()])
    report = write_report([out], out / "report.html")
    say(f"report: {report['out']}")
    _refuse_broken(out / GATE, done)
    return {
        "out": str(out), "report": report["out"], "stages": {name: entry["result"] for name, entry in done.items()},
    }  # fmt: skip


def check_flags(work: Sequence[Stage]) -> None:
    """Raise UsageError where a stage's verb does not take its flags: before the first stage, not hours into the run."""
    for stage in work:
        verb, *flags = stage.argv
        parser = _Parser(stage.name)
        command = importlib.import_module(f"leap_serve.cli.{verb.replace('-', '_')}")
        command.add_arguments(parser)
        given = parser.parse_args(flags)
        if verb == "search":
            try:
                command.check_read(given)
            except UsageError as error:
                raise UsageError(f"stage {stage.name}", f"{error.where} {error.what}", error.remedy) from None


class _Parser(argparse.ArgumentParser):
    """One whose complaint is ours to report."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"stage {self.prog}", message, "correct the recipe; leap VERB --help lists a stage's flags")


def _run_stage(stage: Stage, out: Path) -> dict[str, Any]:
    """Run a stage's verb. A gate with broken bounds has a result all the same: the run goes on, and fails at its end."""
    if stage.name != "gate":
        return run_verb(stage.argv, f"stage {stage.name}")
    (out / GATE).unlink(missing_ok=True)
    try:
        return run_verb(stage.argv, "stage gate")
    except LeapError:
        if not (out / GATE).exists():
            raise
        found: dict[str, Any] = read_json(out / GATE)
        return found


def _refuse_broken(gate: Path, done: Mapping[str, Any]) -> None:
    broken = done["gate"]["result"]["broken"] if "gate" in done else []
    if broken:
        what = f"bounds broken: {'; '.join(broken)}"
        raise LeapError(gate, what, "retain more experts, tune, or loosen the bounds; all else is done")


def run_verb(argv: Sequence[str], where: str) -> dict[str, Any]:
    """Run ``leap ARGV`` and return its result; LeapError where it fails.

    It has a process of its own, which frees whatever memory it took and ends with this one, however this one ends.
    Its progress shows on standard error.
    """
    command = [sys.executable, "-m", "leap_serve.cli", *argv, "--json"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=dying_with_parent(signal.SIGKILL)
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    for line in lines[: -1 if done.returncode == 0 else None]:
        say(line)
    if done.returncode:
        raise LeapError(where, f"ended with status {done.returncode}", "see its message above")
    result: dict[str, Any] = json.loads(lines[-1])
    return result
