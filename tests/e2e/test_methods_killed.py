"""Long searches that are killed outright (SIGKILL) go on from their state and end with the same plan."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leap_serve.files import read_json, write_json
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
MARK = "a key that no search writes"


def mark(layers: Path) -> dict[str, Any]:
    """Change each layer's result in a state by what alters no plan; a search that computed one anew would overwrite it."""
    state = read_json(layers)
    for name, known in state["layers"].items():
        if isinstance(known, dict):
            known[MARK] = True
        else:  # LExI's deviations of each draw from the layer's own top_k, of which the first is of one expert
            assert known[0][0] > 0.0, name
            known[0][0] *= 1.0 + 1e-9
    write_json(layers, state)
    return dict(state["layers"])


def same(now: Any, marked: Any) -> bool:
    """Whether a layer's result is the marked one, with what a later stage of the search may have added."""
    return {**now, **marked} == now if isinstance(marked, dict) else bool(now == marked)


def first_step(log: Path) -> int:
    """The first step that a command shows."""
    return int(re.findall(r" (\d+)/\d+", log.read_text())[0])


@pytest.mark.parametrize("method", LONG)
def test_a_killed_search_ends_with_the_same_plan(
    method: str, family_checkpoint: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = talking_copy(family_checkpoint("qwen3_moe"), tmp_path / "m")
    running: list[subprocess.Popen[bytes]] = []
    request.addfinalizer(lambda: [one.kill() for one in running])

    def start(name: str) -> subprocess.Popen[bytes]:
        flags = ["--state", str(tmp_path / name), "-o", str(tmp_path / f"{name}.json")]
        code = (
            "import sys; from leap_serve.cli import console, main; console.LINE_S = 0.0; sys.exit(main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", code, "search", str(model), "--method", method, *LONG[method], *flags]
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        with (tmp_path / f"{name}.log").open("w") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log))
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
    marked = mark(state / "layers.json") if (state / "layers.json").exists() else None
    assert start("killed").wait(timeout=WAIT_S) == 0
    # A search from the start would end with the same plan, too: it is what the killed run left that must have been used.
    if marked is not None:
        now = read_json(state / "layers.json")["layers"]
        assert marked and all(same(now[layer], known) for layer, known in marked.items())
    else:
        assert first_step(tmp_path / "whole.log") == 1 < first_step(tmp_path / "killed.log")
    assert Plan.load(tmp_path / "killed.json").fingerprint == Plan.load(tmp_path / "whole.json").fingerprint
