"""Passkey retrieval (Mohtashami and Jaggi 2023): a number hidden in filler, at several depths and lengths, generated."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from leap_serve.errors import UsageError
from leap_serve.tasks.base import Item, Split

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
WORDS = (128, 512, 1024)
DEPTHS = (0, 25, 50, 75, 100)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Passkey:
    """Find the key again: 1.0 where the first number of the completion is it.

    Args:
        words: lengths of the filler in words (a token is about three quarters of one in large models).
        depths: where the key stands, in percent of the filler before it.
    """

    words: tuple[int, ...] = WORDS
    depths: tuple[int, ...] = DEPTHS

    name = "passkey"
    metric = "exact match"
    stop: tuple[str, ...] = ("\n",)
    max_tokens = 16

    def __post_init__(self) -> None:
        if not self.words or min(self.words) < 1 or not self.depths or not all(0 <= d <= 100 for d in self.depths):
            raise UsageError(
                "--words, --depths", "name no place for a key", "give lengths from 1, depths of 0 to 100 %"
            )

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return ``limit`` (default 10 for each length and depth) items, every length and depth in turn.

        A key belongs to one split, by its hash, whatever the seed.
        """
        cells = list(itertools.product(self.words, self.depths))
        draw = random.Random(f"{self.name}/{split}/{seed}")
        turns = itertools.islice(itertools.cycle(cells), 10 * len(cells) if limit is None else limit)
        return [_item(number, *cell, _key(draw, split)) for number, cell in enumerate(turns)]

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[float]:
        """Compare the first number of each completion with the key."""
        found = [_NUMBER.search(text) for text in completions]
        return [
            float(number is not None and number[0] == item.reference["answer"])
            for item, number in zip(items, found, strict=True)
        ]


def _key(draw: random.Random, split: Split) -> str:
    """Draw a key of five digits that belongs to a split: 8 of 10 to train, 1 to validation, 1 to test."""
    while True:
        key = str(draw.randint(10_000, 99_999))
        bucket = hashlib.sha256(key.encode()).digest()[0] % 10
        if split == ("test" if bucket == 0 else "validation" if bucket == 1 else "train"):
            return key


def _item(number: int, words: int, depth: int, key: str) -> Item:
    filler = list(itertools.islice(itertools.cycle(FILLER.split()), words))
    before = words * depth // 100
    # The key's sentence begins after a whole one of the filler.
    while before and not filler[before - 1].endswith("."):
        before -= 1
    parts = [TASK, *filler[:before], KEY.format(key=key), *filler[before:], QUESTION]
    group = f"{words} words, depth {depth} %"
    reference = {"answer": key, "group": group}
    return Item(f"passkey/{words}/{depth}/{number}", " ".join(parts), f" {key}.", reference)
