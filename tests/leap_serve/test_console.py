"""Progress on standard error: a bar on a terminal, elsewhere a plain line now and then, and nothing where it is quick."""

from __future__ import annotations

import re
import time

import pytest

from leap_serve.cli import console
from leap_serve.cli.console import noted_bar, progress_bar


def test_what_is_over_soon_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("cut, MiB") as bar:
        for done in range(1, 101):
            bar(done, 100)
    assert console.LINE_S == 10.0 and capsys.readouterr() == ("", "")


def test_plain_lines_are_few_and_the_last_one_says_how_long_it_took(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_S", 0.1)
    began = time.monotonic()
    with progress_bar("cut, MiB") as bar:
        for done in range(1, 31):
            time.sleep(0.02)
            bar(done, 30)
    took = time.monotonic() - began
    out, err = capsys.readouterr()
    *lines, last = err.splitlines()
    assert out == "" and 1 <= len(lines) <= took / 0.1, "one per LINE_S at most"
    assert all(re.fullmatch(r"cut, MiB \d+/30 · \d+ s left", line) for line in lines)
    assert re.fullmatch(r"cut, MiB 30/30 · \d+ s", last)


def test_what_is_left_counts_from_this_run_and_this_pass(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_S", 0.0)
    many = 1_000_000
    with noted_bar("search") as bar:
        bar(many, 2 * many, "")  # an earlier process did those
        time.sleep(0.02)
        bar(many + 1, 2 * many, "")
        bar(1, 3, "second pass")
    first, then, other, last = capsys.readouterr().err.splitlines()
    assert (first, other) == ("search 1000000/2000000", "search second pass 1/3"), "no speed is known yet"
    assert int(re.fullmatch(r"search 1000001/2000000 · (\d+) s left", then)[1]) > 10_000  # type: ignore[index]
    assert re.fullmatch(r"search second pass 1/3 · \d+ s", last)


def test_what_failed_does_not_say_that_it_ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_S", 0.0)
    with pytest.raises(KeyboardInterrupt), progress_bar("cut, MiB") as bar:
        bar(1, 2)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "cut, MiB 1/2\n"


def test_a_terminal_gets_a_bar_and_no_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rich takes the captured stream for a terminal, wide enough for everything.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(console, "LINE_S", 0.0)
    with progress_bar("cut, MiB") as bar:
        bar(15, 30)
        time.sleep(0.3)  # the bar is drawn ten times a second
    shown = capsys.readouterr().err
    assert "━" in shown and "15/30" in shown and "cut, MiB 15/30" not in shown
