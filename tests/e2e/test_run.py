"""``leap run``: the whole line from a recipe, and that a second run does nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

RECIPE = """
model: leap-tiny
task: toy-gsm
profile: {limit: 16}
search: {method: gate-mass, experts: 32}
cut: {}
verify: {}
eval: {limit: 8}
"""


def leap_run(recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "leap_serve.cli", "run", str(recipe), "-o", str(out), "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def test_run_and_resume(tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    first = leap_run(recipe, out)
    assert first.returncode == 0, first.stderr[-2000:]
    result = json.loads(first.stdout.strip().splitlines()[-1])
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
