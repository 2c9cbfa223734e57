"""``leap run``: the whole line from a recipe, and that a second run does nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

RECIPE = """
model: leap-tiny
task: toy-gsm
profile: {limit: 16}
search: {method: leap, experts: 32, episodes: 60, items: 4, engine: torch}
cut: {}
verify: {}
eval: {limit: 8}
"""


def command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "leap_serve.cli", "run", str(recipe), "-o", str(out), "--json"]


def leap_run(recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(recipe, out), capture_output=True, text=True, timeout=400)


def kill_in_search(recipe: Path, out: Path) -> int:
    """Start a run and kill it and its stage when the agent has saved a state; returns the plans evaluated by then."""
    process = subprocess.Popen(command(recipe, out), start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while not (states := list(out.glob("search/*/search.json"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    evaluations: int = json.loads(states[0].read_text())["progress"]["evaluations"]
    return evaluations


def test_run_and_resume(tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    assert 0 < kill_in_search(recipe, out) < 60
    assert not (out / "plan.json").exists()
    first = leap_run(recipe, out)
    assert first.returncode == 0, first.stderr[-2000:]
    assert first.stdout.count("on record, not run again") == 1
    result = json.loads(first.stdout.strip().splitlines()[-1])
    assert result["stages"]["search"]["evaluations"] == 60
    assert json.loads((out / "plan.json").read_text())["made_by"]["method"] == "leap"
    assert result["stages"]["cut"]["retained"] == [32] * 4
    assert 0 <= result["stages"]["eval"]["tasks"]["toy-gsm"]["score"] <= 1

    # As if it had been killed during the cut: what is missing runs again, what is there does not.
    record = json.loads((out / "run.json").read_text())
    for name in ("cut", "verify", "eval"):
        del record["stages"][name]
    (out / "run.json").write_text(json.dumps(record))
    recipe.write_text(RECIPE.replace("eval: {limit: 8}\n", ""))
    second = leap_run(recipe, out)
    assert second.returncode == 0, second.stderr[-2000:]
    assert second.stdout.count("on record, not run again") == 2
    assert json.loads(second.stdout.strip().splitlines()[-1])["stages"]["cut"] | {"seconds": 0} == result["stages"][
        "cut"
    ] | {"seconds": 0}

    recipe.write_text(RECIPE.replace("experts: 32", "experts: 1000"))
    failed = leap_run(recipe, out)
    assert failed.returncode == 1
    assert "stage search: ended with status" in failed.stderr
    assert "Traceback" not in failed.stderr
