"""The demo command, whole: what it leaves on disk is valid, and its last line is the result."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from leap_serve.checkpoint import Checkpoint, check_cut
from leap_serve.tasks.registry import TASKS

pytestmark = pytest.mark.e2e


def test_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [
        sys.executable,
        "-m",
        "leap_serve.cli",
        "demo",
        "--json",
        "-o",
        str(out),
        "--limit",
        "20",
        "--rounds",
        "2",
        "--episodes",
        "64",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(result["models"]) == {"full", "reap-16", "leap-16"}
    for name, model in result["models"].items():
        kept = 64 if name == "full" else int(name.rpartition("-")[2])
        assert model["retained"] == [kept] * 4
        assert set(model["scores"]) == set(TASKS)
        assert all(0 <= score <= 1 for score in model["scores"].values())
        assert all(math.isfinite(loss) and loss >= 0 for loss in model["losses"].values())
        assert all(value > 0 for value in model["tpot_ms"].values())
        assert model["tok_s"] > 0
        for task in TASKS if name != "full" else ():
            checkpoint = Checkpoint.open(out / task / name)
            check_cut(checkpoint)
            assert checkpoint.weight_bytes == model["weights_bytes"]
    # The trained model solves what it was trained for; dropping three quarters of it costs less when the agent chose.
    assert min(result["models"]["full"]["scores"].values()) >= 0.9
    for task in TASKS:
        losses = {name: model["losses"][task] for name, model in result["models"].items()}
        assert losses["full"] < losses["leap-16"] < losses["reap-16"]
    assert result["answer"].strip()
    assert "Serve it yourself" in done.stdout
    assert json.loads((out / "demo.json").read_text()) == result

    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert "exists and is not empty" in again.stderr
    assert "Traceback" not in again.stderr
