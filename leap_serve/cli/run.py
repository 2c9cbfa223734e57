"""``leap run recipe.yaml``: the whole line, stage by stage; a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from leap_serve.cli.console import say, table
from leap_serve.errors import LeapError
from leap_serve.files import read_json, write_json
from leap_serve.provenance import made_by
from leap_serve.recipe import STATE, Recipe, Stage

RECORD = "run.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("recipe", type=Path, help="a YAML file: model, task or data, and the stages' flags")
    parser.add_argument("-o", "--out", type=Path, help="folder of the run (default: runs/<name of the recipe>)")
    parser.add_argument("--again", action="store_true", help="run every stage, also those on record")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the stages that are not on record for these very settings."""
    recipe = Recipe.load(args.recipe)
    out = args.out or Path("runs") / args.recipe.stem
    out.mkdir(parents=True, exist_ok=True)
    path = out / RECORD
    record: dict[str, Any] = read_json(path) if path.exists() and not args.again else {"stages": {}}
    known = record.get("stages", {})
    if args.again:
        shutil.rmtree(out / STATE, ignore_errors=True)
    done: dict[str, Any] = {}
    for stage in recipe.plan_of_work(out):
        before = known.get(stage.name)
        if before and before["key"] == stage.key and (stage.writes is None or (out / stage.writes).exists()):
            say(f"{stage.name}: on record, not run again")
            done[stage.name] = before
            continue
        say(f"{stage.name}: leap {' '.join(stage.argv)}")
        done[stage.name] = {"key": stage.key, "argv": list(stage.argv), "result": _run_verb(stage)}
        write_json(path, {"recipe": str(args.recipe), "stages": done, "made_by": made_by()})
    table(f"{args.recipe} → {out}", ["stage", "key"], [[name, entry["key"][:12]] for name, entry in done.items()])
    return {"out": str(out), "stages": {name: entry["result"] for name, entry in done.items()}}


def _run_verb(stage: Stage) -> dict[str, Any]:
    """Run one verb in a process of its own, which frees whatever memory it took; its progress shows on stderr."""
    command = [sys.executable, "-m", "leap_serve.cli", *stage.argv, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    for line in lines[: -1 if done.returncode == 0 else None]:
        say(line)
    if done.returncode:
        raise LeapError(f"stage {stage.name}", f"ended with status {done.returncode}", "see its message above")
    result: dict[str, Any] = json.loads(lines[-1])
    return result
