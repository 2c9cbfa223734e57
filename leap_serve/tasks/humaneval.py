"""HumanEval (Chen et al. 2021): pass@1, the share of completions whose unit tests pass."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from leap_serve.grading.sandbox import run_python
from leap_serve.tasks.base import Item, Split
from leap_serve.tasks.rows import Row, Source, text_of

SOURCE = Source("humaneval", "openai/openai_humaneval", "openai_humaneval", splits=("test",), only="test")
STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")


def program(item: Item, completion: str) -> str:
    """Return the program that HumanEval runs: prompt, completion, tests, and the call of check()."""
    reference = item.reference
    return f"{item.prompt}{completion}\n{reference['test']}\ncheck({reference['entry_point']})\n"


def pass_at_1(items: Sequence[Item], completions: Sequence[str]) -> list[float]:
    """Score 1.0 where the program exits cleanly inside the sandbox."""
    programs = [program(item, text) for item, text in zip(items, completions, strict=True)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return [float(outcome.passed) for outcome in pool.map(run_python, programs)]


class Functions:
    """What all tasks of functions to complete have in common."""

    metric = "pass@1"
    stop: tuple[str, ...] = STOP
    max_tokens = 512

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[float]:
        """HumanEval's pass@1, run in the sandbox."""
        return pass_at_1(items, completions)


class HumanEval(Functions):
    """HumanEval has only a test set: its train and validation splits are MBPP's, never its own (methods: §7)."""

    name = "humaneval"

    def __init__(self, data: Path | None = None) -> None:
        self._data = data

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return HumanEval's functions for "test", MBPP's, which have the same form, for "train" and "validation"."""
        if split == "test":
            return SOURCE.items(split, _item, self._data, limit, seed)
        # mbpp.py builds on this module.
        from leap_serve.tasks.mbpp import Mbpp

        return Mbpp(self._data).items(split, limit, seed)


def _item(row: Row, where: str) -> Item:
    task_id, prompt, solution, test, entry = (
        text_of(row, field, where) for field in ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    )
    return Item(task_id, prompt, solution, {"entry_point": entry, "test": test})
