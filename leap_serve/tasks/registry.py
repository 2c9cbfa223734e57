"""The tasks by name, and items from a user's own file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from leap_serve.errors import LeapError, UsageError
from leap_serve.tasks.base import Item, Task
from leap_serve.tasks.gsm8k import Gsm8k
from leap_serve.tasks.humaneval import HumanEval
from leap_serve.tasks.mbpp import Mbpp
from leap_serve.tasks.passkey import Passkey
from leap_serve.tasks.qasper import Qasper
from leap_serve.tasks.rows import Row, read_rows
from leap_serve.tasks.scitldr import Scitldr
from leap_serve.tasks.text import Text
from leap_serve.tasks.toy_code import ToyCode
from leap_serve.tasks.toy_gsm import ToyGsm
from leap_serve.tasks.toy_xsum import ToyXsum
from leap_serve.tasks.user import SUFFIXES, UserTask
from leap_serve.tasks.xsum import Xsum

TASKS: dict[str, Callable[[], Task]] = {"toy-gsm": ToyGsm, "toy-code": ToyCode, "toy-xsum": ToyXsum}
"""Generated tasks, which leap-tiny was trained on."""
PUBLISHED: dict[str, Callable[[Path | None], Task]] = {
    "gsm8k": Gsm8k, "humaneval": HumanEval, "mbpp": Mbpp, "xsum": Xsum, "scitldr": Scitldr, "qasper": Qasper,
}  # fmt: skip
"""Published tasks, from the Hugging Face Hub or from files."""
NAMES = (*TASKS, *PUBLISHED, Passkey.name)
"""All of them; a task file (.yaml) may stand for one of one's own."""


def load_task(name: str, data: Path | None = None) -> Task:
    """Return a task by name or from its YAML file, or raise UsageError with the names there are.

    ``data`` is for published tasks and task files: a JSON Lines file, or a folder of ``{task}_{split}.jsonl``
    (plain or .gz), instead of the Hugging Face Hub or of the files that the task file names.
    """
    if name in PUBLISHED:
        return PUBLISHED[name](data)
    if Path(name).suffix in SUFFIXES:
        return UserTask.load(Path(name), data)
    if name == Text.name:
        raise UsageError("--task", f"{name} is of a running text, which has no items", "use it with leap eval")
    if name not in NAMES:
        known = f"choose one of {', '.join(NAMES)}, or give a task file (.yaml)"
        raise UsageError("--task", f"there is no task {name!r}", known)
    if data is not None:
        raise UsageError("--data", f"{name} generates its own items", f"leave it out, or leave out --task {name}")
    return Passkey() if name == Passkey.name else TASKS[name]()


def items_from_file(path: Path, limit: int | None = None) -> list[Item]:
    """Read items from JSON Lines, plain or gzipped: {"prompt", "answer"} or {"text"} on each line.

    A "text" line becomes an item with an empty prompt. Errors name the file and the line.
    """
    items: list[Item] = []
    for where, row in read_rows(path):
        if limit is not None and len(items) == limit:
            break
        items.append(_item(row, where))
    if not items:
        raise LeapError(path, "holds no items", 'give lines like {"prompt": "…", "answer": "…"} or {"text": "…"}')
    return items


def _item(row: Row, where: str) -> Item:
    if isinstance(row.get("text"), str) and row["text"]:
        return Item(id=where, prompt="", answer=row["text"])
    if isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str) and row["answer"]:
        return Item(id=where, prompt=row["prompt"], answer=row["answer"])
    raise LeapError(where, 'has neither "prompt" and "answer" nor "text" as non-empty strings', "add the field")
