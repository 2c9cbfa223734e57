"""What a search shows while it runs: a live line on a terminal, plain lines elsewhere, scalars for TensorBoard."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from leap_serve.errors import LeapError

LINES = 10
"""Plain lines that a whole search prints where standard error is no terminal."""


class SearchView:
    """One search's progress; see :func:`search_view`."""

    def __init__(self, label: str, total: int, bar: Any, writer: Any) -> None:
        self.label, self.total, self._bar, self._writer = label, total, bar, writer
        self._task = None if bar is None else bar.add_task(label, total=total, note="")
        self._began, self._first, self._said = time.monotonic(), -1, 0

    def show(self, evaluations: int, reward: float, loss: float, metrics: Mapping[str, float] | None = None) -> None:
        """Show where the search stands.

        Args:
            evaluations: spent so far, of ``total``.
            reward, loss: of the best plan so far.
            metrics: what the agent's update reports (heat, entropy, …); all of it goes to TensorBoard.
        """
        if self._first < 0:
            # What an earlier process evaluated took this one no time.
            self._first = evaluations
        rate = (evaluations - self._first) / max(1e-9, time.monotonic() - self._began)
        note = f"best reward {reward:.4f} · best loss {loss:.4f}"
        if rate > 0:
            note += f" · {rate:.1f} evaluations/s"
        if metrics and "heat" in metrics:
            note += f" · heat {metrics['heat']:.2f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=evaluations, note=note)
        elif evaluations * LINES // self.total > self._said:
            self._said = evaluations * LINES // self.total
            left = f" · {(self.total - evaluations) / rate:.0f} s left" if rate > 0 else ""
            print(f"{self.label} {evaluations}/{self.total} · {note}{left}", file=sys.stderr, flush=True)
        if self._writer is not None:
            scalars = {"best_reward": reward, "best_loss": loss, "evaluations_per_s": rate, **(metrics or {})}
            for name, value in scalars.items():
                if math.isfinite(value):
                    self._writer.add_scalar(f"search/{name}", value, evaluations)


@contextlib.contextmanager
def search_view(label: str, total: int, tensorboard: Path | None = None) -> Iterator[SearchView]:
    """Yield the view of a search of ``total`` evaluations; with a folder, scalars ``search/…`` go there too.

    TensorBoard's steps are evaluations spent. Raises LeapError where the package tensorboard is missing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with contextlib.ExitStack() as stack:
        writer = None
        if tensorboard is not None:
            writer = tensorboard_writer()(str(tensorboard))
            stack.callback(writer.close)
        console, bar = Console(stderr=True), None
        if console.is_terminal:
            text = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
            bar = Progress(*text, TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=console)
            stack.enter_context(bar)
        yield SearchView(label, total, bar, writer)


def tensorboard_writer() -> Any:
    """TensorBoard's writer class; LeapError where its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise LeapError(
            "--tensorboard",
            "the package tensorboard is not installed",
            'pip install "leap-serve[train]", or leave it out',
        ) from None
    return SummaryWriter
