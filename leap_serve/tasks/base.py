"""What a task is: items with a prompt, a gold continuation, and a score for a completion."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from leap_serve.errors import UsageError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Item:
    """One example of a task.

    ``prompt + answer`` is the teacher-forced text; ``answer`` therefore begins with whatever
    separates it from the prompt. ``reference`` holds what the scorer needs (strings only); its "group"
    names the part of the items whose mean is reported apart.
    """

    id: str
    prompt: str
    answer: str
    reference: Mapping[str, str] = field(default_factory=dict)


class Task(Protocol):
    """A named source of items and the score of a completion, in [0, 1]."""

    @property
    def name(self) -> str:
        """What --task calls it."""
        ...

    @property
    def metric(self) -> str:
        """The metric that ``score`` computes."""
        ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a completion, which does not hold them."""
        ...

    @property
    def max_tokens(self) -> int:
        """Longest completion."""
        ...

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return the first ``limit`` items of a split, always the same for the same seed."""
        ...

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[float]:
        """Return one score in [0, 1] per (item, completion)."""
        ...


@runtime_checkable
class Detailed(Protocol):
    """A task with more than one metric."""

    def details(self, items: Sequence[Item], completions: Sequence[str]) -> dict[str, list[float]]:
        """Return every metric's scores in [0, 1], the main one's among them, per (item, completion)."""
        ...


def fingerprint(item: Item) -> str:
    """Identify an item by prompt and answer, whatever their case and white space: 32 hex digits of SHA-256."""
    plain = "\x00".join(" ".join(text.casefold().split()) for text in (item.prompt, item.answer))
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


def split_of(text: str) -> Split:
    """Assign a generated text to a split by its hash: 8 of 10 train, 1 validation, 1 test.

    Splits are disjoint by construction, whatever seed produced the text.
    """
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def take(stream: Iterator[Item], split: Split, limit: int) -> list[Item]:
    """Collect ``limit`` distinct items of ``split`` from an endless generator; UsageError below 1."""
    if limit < 1:
        raise UsageError("items", f"{limit} of {split} are asked for", "ask for 1 or more")
    seen: set[str] = set()
    out: list[Item] = []
    for item in stream:
        if split_of(item.prompt) == split and item.prompt not in seen:
            seen.add(item.prompt)
            out.append(item)
            if len(out) == limit:
                break
    return out
