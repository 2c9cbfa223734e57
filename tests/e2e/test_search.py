"""`leap search --method leap` and its controls on leap-tiny, with real engines, and a real kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from leap_serve.cli import main
from leap_serve.plan import Plan
from leap_serve.tasks.registry import load_task

pytestmark = pytest.mark.e2e
SIZE = ["--experts", "8", "--task", "toy-gsm", "--items", "4"]


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search") / "prof"
    assert (
        main(["profile", "leap-tiny", "--task", "toy-gsm", "--limit", "24", "--engine", "torch", "-o", str(out)]) == 0
    )
    return out


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_agent_searches_in_vllm_and_its_plan_holds_what_it_promised(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from leap_serve.torch_engine import TorchEngine

    out = tmp_path / "plan.json"
    command = ["search", str(profile), "--method", "leap", *SIZE, "--episodes", "24", "-o", str(out), "--json"]
    assert main([*command, "--dtype", "float32"]) == 0
    found = last_line(capsys)
    assert found["evaluations"] == 24 and found["loss"] <= found["prior_loss"]
    plan = Plan.load(out)
    assert plan.counts == [8] * 4 and plan.made_by["method"] == "leap" and plan.made_by["task"] == "toy-gsm"
    engine = TorchEngine("leap-tiny", dtype="float32", device="cpu")
    try:
        (scores,) = engine.score_plans([plan], load_task("toy-gsm").items("validation", 4))
    finally:
        engine.close()
    assert -sum(s.logprob for s in scores) / sum(s.tokens for s in scores) == pytest.approx(found["loss"], abs=1e-3)


def test_a_killed_search_continues_to_the_same_plan(profile: Path, tmp_path: Path) -> None:
    def start(name: str, state: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "leap_serve.cli", "search", str(profile), "--method", "leap", *SIZE,
            "--episodes", "80", "--prior", "gate-mass", "--engine", "torch", "--dtype", "float32",
            "-o", str(tmp_path / name), "--state", str(tmp_path / state),
        ]  # fmt: skip
        return subprocess.Popen(command, env={**os.environ, "PYTHONSAFEPATH": "1"})

    assert start("whole.json", "one").wait(timeout=300) == 0
    process = start("killed.json", "two")
    deadline = time.monotonic() + 300
    while not (tmp_path / "two" / "search.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not (tmp_path / "killed.json").exists()
    spent = json.loads((tmp_path / "two" / "search.json").read_text())["progress"]["evaluations"]
    assert 0 < spent < 80
    assert start("again.json", "two").wait(timeout=300) == 0
    whole, again = (Plan.load(tmp_path / name) for name in ("whole.json", "again.json"))
    assert again.fingerprint == whole.fingerprint
    assert again.made_by["search_loss"] == whole.made_by["search_loss"]


def test_refusals_before_any_model_is_loaded(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path / "plan.json"), "--experts", "8"]
    leap = ["search", str(profile), "--method", "leap", *out]
    assert main(leap) == 2 and "needs --task" in capsys.readouterr().err
    assert main([*leap, "--task", "toy-gsm", "--episodes", "0"]) == 2
    assert main([*leap, "--task", "toy-gsm", "--guard-super-experts"]) == 2
    assert main(["search", "leap-tiny", "--method", "leap", "--task", "toy-gsm", *out]) == 2
    greedy = ["search", str(profile), "--method", "greedy", "--task", "toy-gsm", *out]
    assert main([*greedy, "--state", str(tmp_path / "state")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
