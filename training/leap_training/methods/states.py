"""What a search says whose state is of another search: which flags to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leap_serve.errors import UsageError

FLAGS: Mapping[str, str] = {
    "method": "--method", "model": "the model", "data": "--task, --items or --seed", "experts": "--experts or --budget",
    "budget": "--experts or --budget", "top_k": "--top-k", "τ": "--temperature", "seed": "--seed", "dtype": "--dtype",
    "base": "--on, --temperature or --top-k", "draws": "--draws", "steps": "--steps", "evaluations": "--episodes",
}  # fmt: skip
"""What a state says of its search → what decides it on the command line."""
SHOWN = 40
"""Characters that a value may have to be shown: longer ones are hashes."""


def other_search(path: Path, key: str, there: Any, now: Any) -> UsageError:
    """Return the error of a state in which ``key`` is another than it is now."""
    short = max(len(str(there)), len(str(now))) <= SHOWN
    what = f"{key} is {there} there and {now} now" if short else f"is of another search: its {key} differs"
    same = f"give the same {FLAGS[key]}" if key in FLAGS else "repeat the same command"
    return UsageError(path, what, f"{same} to resume, or choose another --state")
