"""What every verb shows people: tables on standard output, progress on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from leap_serve.engine import Progress

LINE_S = 10.0
"""Where standard error is no terminal: seconds between plain lines at least; what ends sooner prints none."""


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """Yield a (done, total) callback that drives a bar with an ETA; where stderr is no terminal, plain lines."""
    with noted_bar(label) as noted:
        yield lambda done, total: noted(done, total, "")


@contextlib.contextmanager
def noted_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a (done, total, note) callback like :func:`progress_bar`'s; the note stands behind the label."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        lines = _Lines(label)
        yield lines.show
        lines.end()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total, note: bar.update(
            task, completed=done, total=total, description=f"{label} {note}".rstrip()
        )


class _Lines:
    """A bar in plain lines: a few while it lasts, with what is left, and one at its end."""

    def __init__(self, label: str) -> None:
        self._label, self._last = label, ""
        self._began = self._said = time.monotonic()
        self._total, self._first, self._since = -1, 0, 0.0

    def show(self, done: int, total: int, note: str) -> None:
        """Say how much is done, if the last line is old enough."""
        now = time.monotonic()
        if total != self._total or done < self._first:
            # Another pass. Its speed counts from its first call, before which a resumed run may take over a lot.
            self._total, self._first, self._since = total, done, now
        self._last = f"{self._label} {note}".rstrip() + f" {done}/{total}"
        if done < total and now - self._said >= LINE_S:
            left = ""
            if done > self._first:
                left = f" · {(now - self._since) / (done - self._first) * (total - done):.0f} s left"
            print(self._last + left, file=sys.stderr, flush=True)
            self._said = now

    def end(self) -> None:
        """Say what was done, if it took long enough to have been asked about."""
        took = time.monotonic() - self._began
        if self._last and took >= LINE_S:
            print(f"{self._last} · {took:.0f} s", file=sys.stderr, flush=True)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; the first column is left-aligned, and nothing is cut off when piped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        shown.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(str, row))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(shown)


def say(text: str) -> None:
    """Print one line for people on standard output."""
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text, markup=False)
