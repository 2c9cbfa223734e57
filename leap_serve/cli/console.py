"""What every verb shows people: tables on standard output, progress bars on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from leap_serve.engine import Progress


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """Yield a (done, total) callback that drives a bar with an ETA; silent where stderr is no terminal."""
    with noted_bar(label) as noted:
        yield lambda done, total: noted(done, total, "")


@contextlib.contextmanager
def noted_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a (done, total, note) callback like :func:`progress_bar`'s; the note stands behind the label."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total, note: bar.update(
            task, completed=done, total=total, description=f"{label} {note}".rstrip()
        )


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
