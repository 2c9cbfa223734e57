"""What a search shows: a line for each tenth where there is no terminal, a live line on one, scalars for TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from leap_serve.cli.search_view import search_view, tensorboard_writer
from leap_serve.errors import LeapError


def test_plain_lines_come_at_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with search_view("search toy", 50) as view:
        for done in range(1, 51):
            view.show(done, 0.1, 2.0, {"heat": 1.3})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" · ")[0] for line in lines] == [f"search toy {5 * n}/50" for n in range(1, 11)]
    assert all("best reward 0.1000 · best loss 2.0000" in line and "heat 1.30" in line for line in lines)
    assert "evaluations/s" in lines[-1] and lines[-1].endswith(" 0 s left")


def test_what_was_resumed_counts_as_done_but_not_as_speed(capsys: pytest.CaptureFixture[str]) -> None:
    with search_view("search toy", 50) as view:
        view.show(40, 0.1, 2.0)
    (line,) = capsys.readouterr().err.splitlines()
    assert "40/50" in line and "evaluations/s" not in line and "left" not in line


def test_a_terminal_gets_one_live_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Rich takes the captured stream for a terminal, wide enough for everything.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with search_view("search toy", 50) as view:
        view.show(10, 0.25, 1.5, {"heat": 1.0})
        view.show(50, 0.5, 0.75, {"heat": 1.1})
    shown = capsys.readouterr().err
    assert "best reward 0.5000 · best loss 0.7500" in shown and "heat 1.10" in shown and "50/50" in shown
    assert "s left" not in shown


def test_scalars_are_written_and_numbers_that_are_none_are_not(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with search_view("search toy", 50, tmp_path) as view:
        view.show(16, 0.25, 1.5, {"heat": 1.0, "approx_kl": float("nan")})
        view.show(32, 0.5, 0.75, {"heat": 1.2, "approx_kl": 0.01})
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(one.step, one.value) for one in found.Scalars("search/best_loss")] == [(16, 1.5), (32, 0.75)]
    assert [one.step for one in found.Scalars("search/approx_kl")] == [32]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(LeapError, match="tensorboard is not installed"):
        tensorboard_writer()
