"""The tasks by name, and items from a user's own file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from leap_serve.errors import LeapError, UsageError
from leap_serve.tasks.base import Item, Task
from leap_serve.tasks.toy_code import ToyCode
from leap_serve.tasks.toy_gsm import ToyGsm
from leap_serve.tasks.toy_xsum import ToyXsum

TASKS: dict[str, Callable[[], Task]] = {"toy-gsm": ToyGsm, "toy-code": ToyCode, "toy-xsum": ToyXsum}


def load_task(name: str) -> Task:
    """Return a task by name, or raise UsageError with the names there are."""
    if name not in TASKS:
        raise UsageError("--task", f"there is no task {name!r}", f"choose one of {', '.join(TASKS)}")
    return TASKS[name]()


def items_from_file(path: Path, limit: int | None = None) -> list[Item]:
    """Read items from JSON Lines, plain or gzipped: {"prompt", "answer"} or {"text"} on each line.

    A "text" line becomes an item with an empty prompt. Errors name the file and the line.
    """
    items: list[Item] = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(items) == limit:
                    break
                if line.strip():
                    items.append(_item(line, f"{path}:{number}"))
    except FileNotFoundError:
        raise UsageError(path, "the file does not exist", "check --data") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise LeapError(path, f"cannot be read ({error})", "give JSON Lines in UTF-8, plain or .gz") from None
    if not items:
        raise LeapError(path, "holds no items", 'give lines like {"prompt": "…", "answer": "…"} or {"text": "…"}')
    return items


def _item(line: str, where: str) -> Item:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise LeapError(where, f"not valid JSON ({error})", "give one JSON object per line") from None
    if isinstance(row, dict):
        if isinstance(row.get("text"), str) and row["text"]:
            return Item(id=where, prompt="", answer=row["text"])
        if isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str) and row["answer"]:
            return Item(id=where, prompt=row["prompt"], answer=row["answer"])
    raise LeapError(where, 'has neither "prompt" and "answer" nor "text" as non-empty strings', "add the field")
