"""``leap search`` refuses every flag that the chosen method would ignore, and knows of each flag who reads it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from leap_serve.cli import main, search
from leap_serve.search_flags import ONE_SHOT, READERS, SEARCHES, reads
from leap_training import controls
from leap_training.methods.registry import METHODS

OF_ALL = {"source", "method", "budget", "experts", "temperature", "seed", "task", "model", "out", "force"}
"""Arguments that every method reads, or may be given for comparison's sake."""
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
        if flag in OF_ALL:
            continue
        status, said = (
            main([*command, *words(action)]),
            f"{action.option_strings[-1]}: means nothing to {method};",
        )
        assert status in (1, 2) and (said in capsys.readouterr().err) is not reads(method, flag), (method, flag)


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
