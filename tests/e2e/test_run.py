"""``leap run``: the whole line from a recipe; killed in a search and while tuning, it goes on where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leap_serve.checkpoint import Checkpoint, check_cut
from processes import assert_all_gone, children_of

pytestmark = pytest.mark.e2e

RECIPE = """
model: leap-tiny
task: toy-gsm
profile: {limit: 16, engine: torch}
search: {method: leap, experts: 32, episodes: 60, items: 4, engine: torch}
cut: {}
verify: {}
tune: {rounds: 2, labels: 8, pool: 24, held-out: 8, steps: 40, batch: 4, rank: 2, router-warmup: 1, save-every: 1}
export: {}
eval: {limit: 8, engine: torch}
gate: {file: gate.yaml, engine: torch}
load: {limit: 4, engine: torch}
"""
GATE = "checks: [{task: toy-code, limit: 2, max_loss_increase: 0.0001}]"
LINE = ["profile", "search", "cut", "verify", "tune", "export", "eval", "gate", "load"]


def command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "leap_serve.cli", "run", str(recipe), "-o", str(out), "--json"]


def leap_run(recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(recipe, out), capture_output=True, text=True, timeout=400)


def kill_when_there_is(pattern: str, recipe: Path, out: Path) -> Path:
    """Start a run and kill it, and it alone, once a stage has saved a state; returns the state's file."""
    process = subprocess.Popen(command(recipe, out), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while not (states := list(out.glob(pattern))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    children = children_of(process.pid)
    assert children
    process.kill()
    process.wait(timeout=60)
    assert_all_gone(children)  # a stage that lived on would write beside the next run's
    return states[0]


def test_run_and_resume(tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    (tmp_path / "gate.yaml").write_text(GATE)
    state = kill_when_there_is("search/*/search.json", recipe, out)
    assert 0 < json.loads(state.read_text())["progress"]["evaluations"] < 60
    assert not (out / "plan.json").exists()
    kill_when_there_is("tune/*/state.safetensors", recipe, out)
    assert (out / "plan.json").exists() and not (out / "tuned").exists()

    first = leap_run(recipe, out)
    assert first.stdout.count("on record, not run again") == 4
    # Half of the experts, chosen for another task, cost something there: the gate says so, and all else is done.
    assert first.returncode == 1 and "gate.json: bounds broken: toy-code: max_loss_increase" in first.stderr
    record = json.loads((out / "run.json").read_text())
    result = {name: entry["result"] for name, entry in record["stages"].items()}
    assert list(result) == LINE
    assert result["search"]["evaluations"] == 60
    assert json.loads((out / "plan.json").read_text())["made_by"]["method"] == "leap"
    assert result["cut"]["retained"] == [32] * 4
    assert [row["tick"] for row in result["tune"]["curve"]] == [21, 41]
    assert result["export"]["plugin"] is False and "adapter/adapter_model.safetensors" in result["export"]["merged"]
    check_cut(Checkpoint.open(out / "plain"))
    assert result["eval"]["model"] == str(out / "plain") and result["eval"]["vs"]["model"] == "leap-tiny"
    assert 0 <= result["eval"]["tasks"]["toy-gsm"]["score"] <= 1
    assert result["gate"]["passed"] is False
    page = (out / "report.html").read_text()
    assert "routed there after tuning" in page and "exact answers, teacher-forced" in page
    assert "toy-gsm: 32 of 64 experts in each layer (plan " in page

    # As if it had been killed during the cut: what is missing runs again, what is there does not.
    for name in LINE[2:]:
        del record["stages"][name]
    (out / "run.json").write_text(json.dumps(record))
    recipe.write_text(RECIPE.partition("tune:")[0])
    second = leap_run(recipe, out)
    assert second.returncode == 0, second.stderr[-2000:]
    assert second.stdout.count("on record, not run again") == 2
    assert json.loads(second.stdout.strip().splitlines()[-1])["stages"]["cut"] | {"seconds": 0} == result["cut"] | {
        "seconds": 0
    }

    recipe.write_text(RECIPE.replace("experts: 32", "experts: 1000"))
    failed = leap_run(recipe, out)
    assert failed.returncode == 1
    assert "stage search: ended with status" in failed.stderr
    assert "Traceback" not in failed.stderr
