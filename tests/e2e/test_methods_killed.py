"""Long searches that are killed outright (SIGKILL) go on from their state and end with the same plan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from leap_serve.plan import Plan
from tiny_tokenizer import talking_copy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 1200)]
WAIT_S = 1200
"""Longer than a process takes to start on a machine that is busy with twenty others."""
ITEMS = ["--task", "toy-gsm", "--items", "4"]
LONG = {
    "naee": ["--experts", "4", *ITEMS], "naee-progressive": ["--experts", "4", *ITEMS],
    "moe-i2": ["--experts", "4", *ITEMS], "hc-smoe": ["--experts", "4", *ITEMS],
    "lexi": ["--budget", "0.75", "--draws", "40"], "eep": ["--experts", "4", *ITEMS, "--episodes", "120"],
    "tsep": ["--experts", "4", "--task", "toy-gsm", "--train-items", "4", "--steps", "12"],
}  # fmt: skip


@pytest.mark.parametrize("method", LONG)
def test_a_killed_search_ends_with_the_same_plan(
    method: str, family_checkpoint: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = talking_copy(family_checkpoint("qwen3_moe"), tmp_path / "m")
    running: list[subprocess.Popen[bytes]] = []
    request.addfinalizer(lambda: [one.kill() for one in running])

    def start(name: str) -> subprocess.Popen[bytes]:
        flags = ["--state", str(tmp_path / name), "-o", str(tmp_path / f"{name}.json")]
        code = "import sys; from leap_serve.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "search", str(model), "--method", method, *LONG[method], *flags]
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return running[-1]

    assert start("whole").wait(timeout=WAIT_S) == 0
    killed, state = start("killed"), tmp_path / "killed"
    deadline = time.monotonic() + WAIT_S
    while not list(state.rglob("layers.json")) + list(state.rglob("*ep.safetensors")):
        assert killed.poll() is None and time.monotonic() < deadline, "it ended before it had a state"
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / "killed.json").exists()
    assert start("killed").wait(timeout=WAIT_S) == 0
    assert Plan.load(tmp_path / "killed.json").fingerprint == Plan.load(tmp_path / "whole.json").fingerprint
