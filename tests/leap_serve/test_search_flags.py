"""``leap search`` refuses every flag that the chosen method would ignore, and knows of each flag who reads it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from leap_serve.cli import main, search
from leap_serve.search_flags import ONE_SHOT, READERS, SEARCHES, reads
from leap_training import controls
from leap_training.methods.registry import METHODS
from profiles import simulate

OF_ALL = {"source", "method", "budget", "experts", "temperature", "seed", "out", "force"}
"""Arguments that every method reads."""
NAMES = [method.name for method in METHODS]


def actions() -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    search.add_arguments(parser)
    return {action.dest: action for action in parser._actions}


def words(action: argparse.Action) -> list[str]:
    """The flag with a value that is not its default."""
    if action.nargs == 0:
        return [action.option_strings[-1]]
    values = [str(value) for value in action.choices or ("7", "0.7", "1,2,3") if value != action.default]
    return [action.option_strings[-1], values[-1] if action.dest == "workload" else values[0]]


def test_every_flag_is_in_the_table_or_of_all() -> None:
    assert actions().keys() - OF_ALL == READERS.keys()


def test_the_table_knows_the_methods_there_are() -> None:
    assert {method for methods in READERS.values() for method in methods} == set(NAMES)
    assert tuple(controls.SEARCHES) == SEARCHES
    assert {name for name in ONE_SHOT if reads(name, "model") or reads(name, "task")} == set()
    assert reads("lexi", "model") and not reads("lexi", "task") and not reads("intra", "task")
    assert all(reads(name, "seed") for name in NAMES) and not any(reads(name, "episodes") for name in ONE_SHOT)


@pytest.mark.parametrize("method", NAMES)
def test_what_a_method_ignores_is_refused(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "search",
        str(tmp_path / "none"),
        "--method",
        method,
        "--experts",
        "4",
        "-o",
        str(tmp_path / "plan.json"),
    ]
    for flag, action in actions().items():
        if flag in OF_ALL or flag == "task":  # whether a task is ignored is known once the profile is open
            continue
        status, said = (
            main([*command, *words(action)]),
            f"{action.option_strings[-1]}: means nothing to {method};",
        )
        assert status in (1, 2) and (said in capsys.readouterr().err) is not reads(method, flag), (method, flag)


@pytest.mark.parametrize("method", ["reap", "random", "lexi", "moe-pruner"])
def test_a_task_that_is_ignored_is_the_profiles_own(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate().save(tmp_path / "untold")
    replace(simulate(), made_by={"task": "toy-gsm", "model": str(tmp_path / "gone")}).save(tmp_path / "prof")
    out = tmp_path / "plan.json"

    def said(source: str, *flags: str) -> tuple[int, str]:
        command = ["search", str(tmp_path / source), "--method", method, "--budget", "0.5", *flags, "-o", str(out)]
        return main(command), capsys.readouterr().err

    status, refusal = said("prof", "--task", "toy-code")
    assert status == 2 and f"--task: means nothing to {method}, and the profile is of toy-gsm; leave it out" in refusal
    status, refusal = said("untold", "--task", "toy-code")
    assert status == 2 and f"--task: means nothing to {method}; leave it out" in refusal and not out.exists()
    assert said("prof", "--task", "toy-gsm") == said("prof", "--force")
    assert (method in ONE_SHOT) is out.exists()


def test_a_default_that_is_spelled_out_asks_for_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "search",
        str(tmp_path / "none"),
        "--method",
        "reap",
        "--experts",
        "4",
        "-o",
        str(tmp_path / "plan.json"),
    ]
    assert main([*command, "--episodes", "500", "--workload", "16,16,32"]) == 1
    assert "means nothing" not in capsys.readouterr().err
