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
    small = ["--limit", "12", "--rounds", "1", "--episodes", "32", "--steps", "8"]
    command = [sys.executable, "-m", "leap_serve.cli", "demo", "--json", "-o", str(out), *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    models = result["models"]
    assert list(models) == ["full", "reap-16", "leap-16", "leap-8", "leap-16-tuned", "leap-8-tuned"]
    for name, model in models.items():
        kept = 64 if name == "full" else int(name.split("-")[1])
        assert model["retained"] == [kept] * 4
        assert set(model["scores"]) == set(TASKS)
        assert all(0 <= score <= 1 for score in model["scores"].values())
        assert all(math.isfinite(loss) and loss >= 0 for loss in model["losses"].values())
        # Cuts of one size take equally long, so one of each is timed.
        assert len(model["tpot_ms"]) == (2 if name in ("full", "leap-16-tuned", "leap-8-tuned") else 0)
        assert all(value > 0 for value in model["tpot_ms"].values())
        for task in TASKS if name != "full" else ():
            checkpoint = Checkpoint.open(out / task / name)
            check_cut(checkpoint)
            assert checkpoint.weight_bytes == model["weights_bytes"]
            assert bool(checkpoint.overlays) == name.endswith("tuned")
    # The trained model solves what it was trained for; dropping three quarters of it costs less when the agent chose,
    # and even a little tuning repairs some of it.
    assert min(models["full"]["scores"].values()) >= 0.9
    for task in TASKS:
        losses = {name: model["losses"][task] for name, model in models.items()}
        assert losses["full"] < losses["leap-16"] < losses["reap-16"]
        assert losses["leap-16-tuned"] < losses["leap-16"] and losses["leap-8-tuned"] < losses["leap-8"]
    assert result["answer"].strip() and result["served"].endswith("tuned")
    assert "Serve it yourself" in done.stdout
    assert json.loads((out / "demo.json").read_text()) == result
    assert "leap-8-tuned" in (out / "report.html").read_text()

    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert "exists and is not empty" in again.stderr
    assert "Traceback" not in again.stderr
