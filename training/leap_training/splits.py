"""Who may see which item: test items never enter a pool, and validation has three parts that do not meet (methods: §7)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from leap_serve.errors import LeapError, UsageError
from leap_serve.tasks.base import Item, Task, fingerprint

Part = Literal["search", "stopping", "router"]
"""What a part of the validation split is for: the search's reward, early stopping, or «keep the tuned router?»."""
PARTS: tuple[Part, ...] = get_args(Part)


def refuse_test_items(items: Iterable[Item], tests: Iterable[Item]) -> None:
    """Raise LeapError naming the first of ``items`` that is a test item, by fingerprint."""
    held = {fingerprint(item): item.id for item in tests}
    if not held:
        return
    for item in items:
        found = held.get(fingerprint(item))
        if found is not None:
            raise LeapError(
                f"pool item {item.id!r}", f"is test item {found!r}: the same prompt and answer",
                "take it out of the training data; nothing may be selected from a test set",
            )  # fmt: skip


def part(items: Iterable[Item], name: Part) -> list[Item]:
    """Return those of the validation items that belong to a part, in their order; each item is in exactly one.

    The part follows from the item's fingerprint, so it is the same in every run, whatever else was drawn.
    """
    if name not in PARTS:
        raise UsageError("part", f"is {name!r}", f"choose one of {', '.join(PARTS)}")
    number = PARTS.index(name)
    return [item for item in items if int(fingerprint(item)[-8:], 16) % len(PARTS) == number]


def search_items(task: Task, limit: int, seed: int = 0) -> list[Item]:
    """Return up to ``limit`` validation items of the search's part; UsageError where there is none, as any plan is then best."""
    found = validation_part(task, "search", limit, seed)
    if not found:
        what = f"none of the validation items of {task.name} falls into the search's part"
        raise UsageError("--task", what, "give it more validation items")
    return found


def validation_part(task: Task, name: Part, limit: int, seed: int = 0) -> list[Item]:
    """Return up to ``limit`` validation items of a part; fewer only where the task's validation split ends."""
    asked = len(PARTS) * limit
    while True:
        drawn = task.items("validation", asked, seed)
        found = part(drawn, name)
        if len(found) >= limit or len(drawn) < asked:
            return found[:limit]
        asked *= 2
