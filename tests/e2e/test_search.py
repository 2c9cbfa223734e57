"""`leap search` on leap-tiny with real engines: one budget, several, latency, look-ahead, and a real kill."""

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
from safetensors import safe_open

from leap_serve.cli import main
from leap_serve.engine import mean_loss
from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_serve.tasks.registry import load_task
from leap_training.splits import validation_part

pytestmark = pytest.mark.e2e
TASK = ["--task", "toy-gsm", "--items", "4"]
SIZE = ["--experts", "8", *TASK]


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search") / "prof"
    assert (
        main(["profile", "leap-tiny", "--task", "toy-gsm", "--limit", "24", "--engine", "torch", "-o", str(out)]) == 0
    )
    return out


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_several_budgets_in_vllm_with_latency_in_the_reward(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from leap_serve.engines.torch_engine import TorchEngine

    out, events = tmp_path / "plans", tmp_path / "events"
    command = [
        "search", str(profile), "--method", "leap", "--experts", "16", "8", *TASK, "--episodes", "24", "--batch", "8",
        "--lambda", "0.1", "--beta", "0.05", "--workload", "4,8,4", "--tensorboard", str(events),
        "--save-policy", str(tmp_path / "policy.safetensors"), "-o", str(out), "--json",
    ]  # fmt: skip
    assert main(command) == 0
    found = last_line(capsys)
    front = json.loads((out / "pareto.json").read_text())
    assert front["plans"] == found["plans"] and front["made_by"]["argv"]
    assert sorted(path.name for path in out.iterdir()) == ["pareto.json", "plan-16.json", "plan-8.json"]
    assert (tmp_path / "policy.safetensors").stat().st_size > 0
    items = validation_part(load_task("toy-gsm"), "search", 4)
    engine = TorchEngine("leap-tiny", dtype="float32", device="cpu")
    for row, kept in zip(front["plans"], (16, 8), strict=True):
        plan = Plan.load(out / row["plan"])
        assert plan.counts == row["counts"] == [kept] * 4 and row["fingerprint"] == plan.fingerprint
        assert row["evaluations"] == 24 and row["loss"] <= row["prior_loss"]
        # The engine searches in float32 on a CPU without being told, so that another engine agrees.
        (scores,) = engine.score_plans([plan], items)
        assert mean_loss(scores) == pytest.approx(row["loss"], abs=1e-3)
        made = plan.made_by
        assert made["method"] == "leap" and made["reward"]["latency_coef"] == 0.1 and made["settings"]["batch"] == 8
        assert row["tpot_ms"] > 0 and row["full_tpot_ms"] > 0 and row["tpot_over_full"]["pairs"] == 12
        scalars = EventAccumulator(str(events / row["budget"])).Reload()
        curve = [(one.step, one.value) for one in scalars.Scalars("search/best_reward")]
        assert curve[-1][0] == 24 and curve[-1][1] == pytest.approx(made["search_reward"], abs=1e-6)
        assert {"search/best_loss", "search/heat", "search/approx_kl"} <= set(scalars.Tags()["scalars"])
    engine.close()
    assert front["plans"][0]["loss"] < front["plans"][1]["loss"]


def test_look_ahead_chooses_by_the_loss_after_tuning(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    command = [
        "search", str(profile), "--method", "leap", *SIZE, "--episodes", "40", "--prior", "gate-mass", "--batch", "8",
        "--engine", "torch", "--lookahead", "3", "--finalists", "3", "--lookahead-episodes", "6", "-o", str(out),
        "--json",
    ]  # fmt: skip
    assert main(command) == 0
    captured = capsys.readouterr()
    ahead = json.loads(captured.out.splitlines()[-1])["lookahead"]
    assert ahead["finalists"] == 3 and ahead["evaluations"] == 9 and ahead["loss_tuned"] < ahead["loss_untuned"]
    assert "search toy-gsm 8 40/40" in captured.err and "evaluations/s" in captured.err
    plan = Plan.load(out)
    assert plan.made_by["lookahead"] == ahead and plan.made_by["method"] == "leap" and plan.counts == [8] * 4


COUNTING = """
import sys
from leap_serve.cli import main
from leap_training.rco import Student

divergence = Student.divergence

def counted(*given):
    with open(sys.argv[1], "a") as file:
        file.write("step\\n")
    return divergence(*given)

Student.divergence = counted
sys.exit(main(sys.argv[2:]))
"""
"""The command, with a line in a file for every training step of rco."""


@pytest.mark.parametrize("method", ["evolution", "rco"])
def test_a_killed_control_does_nothing_twice(profile: Path, tmp_path: Path, method: str) -> None:
    def start(name: str, state: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-c", COUNTING, str(tmp_path / f"{name}.steps"), "search", str(profile), "--method", method,
            *SIZE, "--episodes", "80", "--engine", "torch", "-o", str(tmp_path / f"{name}.json"),
            "--state", str(tmp_path / state),
        ]  # fmt: skip
        with (tmp_path / f"{name}.err").open("wb") as said:
            return subprocess.Popen(command, stderr=said, env={**os.environ, "PYTHONSAFEPATH": "1"})

    def steps(name: str) -> int:
        path = tmp_path / f"{name}.steps"
        return path.read_text().count("step") if path.exists() else 0

    def shown(name: str) -> list[str]:
        lines = (tmp_path / f"{name}.err").read_text().splitlines()
        return [line.split(" · ")[0] for line in lines if line.startswith("search toy-gsm 8 ")]

    assert start("whole", "one").wait(timeout=300) == 0
    process = start("killed", "two")
    journal, trained = tmp_path / "two" / "evaluations.jsonl", tmp_path / "two" / "rco.safetensors"
    deadline = time.monotonic() + 300
    while not (trained.exists() if method == "rco" else journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not (tmp_path / "killed.json").exists()
    known = journal.read_bytes()
    known = known[: known.rfind(b"\n") + 1]
    done = steps_of(trained) if method == "rco" else 0
    assert start("again", "two").wait(timeout=300) == 0
    whole, again = (Plan.load(tmp_path / f"{name}.json") for name in ("whole", "again"))
    assert again.fingerprint == whole.fingerprint
    assert again.made_by["improvements"] == whole.made_by["improvements"]
    # What was known stayed as it was, and every plan stands there once.
    assert journal.read_bytes().startswith(known)
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    assert len(set(keys)) == len(keys) == again.made_by["evaluations"]
    # The rest of the training was done, no step of it twice; and what is shown is what is spent.
    assert shown("whole")[-1] == shown("again")[-1] == "search toy-gsm 8 80/80"
    assert steps("again") == steps("whole") - done
    if method == "rco":
        assert 0 < done <= steps("killed") < steps("whole") and len(shown("whole")) >= 8
        assert again.made_by["cost"] == whole.made_by["cost"]
        assert trained.read_bytes() == (tmp_path / "one" / "rco.safetensors").read_bytes()
        assert start("finished", "two").wait(timeout=300) == 0 and steps("finished") == 0
        assert Plan.load(tmp_path / "finished.json").fingerprint == whole.fingerprint


def steps_of(state: Path) -> int:
    """Training steps that a state of rco holds, of four items each."""
    with safe_open(state, "pt") as file:
        return int(json.loads(file.metadata()["rco"])["backward"]) // 4


@pytest.mark.parametrize("prior", ["gate-mass", "best"])
def test_a_killed_search_continues_to_the_same_plan(profile: Path, tmp_path: Path, prior: str) -> None:
    def start(name: str, state: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "leap_serve.cli", "search", str(profile), "--method", "leap", *SIZE,
            "--episodes", "80", "--prior", prior, "--engine", "torch",
            "-o", str(tmp_path / name), "--state", str(tmp_path / state),
        ]  # fmt: skip
        return subprocess.Popen(command, env={**os.environ, "PYTHONSAFEPATH": "1"})

    assert start("whole.json", "one").wait(timeout=300) == 0
    process = start("killed.json", "two")
    # With the best of the rankings: killed between finding it and the first update.
    sign = tmp_path / "two" / ("prior.json" if prior == "best" else "search.json")
    deadline = time.monotonic() + 300
    while not sign.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not (tmp_path / "killed.json").exists()
    if prior != "best":
        spent = json.loads((tmp_path / "two" / "search.json").read_text())["progress"]["evaluations"]
        assert 0 < spent < 80
    assert start("again.json", "two").wait(timeout=300) == 0
    whole, again = (Plan.load(tmp_path / name) for name in ("whole.json", "again.json"))
    assert again.fingerprint == whole.fingerprint and whole.made_by["evaluations"] == 80
    assert again.made_by["search_loss"] == whole.made_by["search_loss"]


def test_refusals_before_any_model_is_loaded(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*flags: str, source: str = str(profile), method: str = "leap") -> str:
        assert main(["search", source, "--method", method, "-o", str(tmp_path / "plan.json"), *flags]) in (1, 2)
        return capsys.readouterr().err

    assert "needs --task" in refused("--experts", "8")
    assert "--episodes" in refused(*SIZE, "--episodes", "0")
    assert "tries 6 rankings" in refused(*SIZE, "--episodes", "5")
    assert "--guard-super-experts" in refused(*SIZE, "--guard-super-experts")
    assert "needs a profile" in refused(*SIZE, source="leap-tiny")
    assert "means nothing to greedy" in refused(*SIZE, "--warm", str(tmp_path / "policy"), method="greedy")
    assert "name a size twice" in refused("--experts", "8", "8", *TASK)
    assert "needs --lookahead" in refused(*SIZE, "--lookahead-episodes", "4")
    assert "uniform" in refused(*SIZE, method="evo-counts")
    grouped = tmp_path / "grouped"
    Profile.load(profile).save(grouped)
    content = json.loads((grouped / "profile.json").read_text())
    (grouped / "profile.json").write_text(json.dumps({**content, "groups": 4, "chosen_groups": 2}))
    assert "routing groups" in refused(*SIZE, source=str(grouped))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grouped"]


def test_one_shot_methods_take_several_budgets(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plans"
    command = ["search", str(profile), "--method", "reap", "--budget", "0.25", "0.125", "-o", str(out), "--json"]
    assert main(command) == 0
    rows = last_line(capsys)["plans"]
    assert [(row["budget"], row["retained"]) for row in rows] == [("0.25", 64), ("0.125", 32)]
    assert Plan.load(out / "plan-0.125.json").counts == [8] * 4
    assert main(command) == 2 and "exists" in capsys.readouterr().err
