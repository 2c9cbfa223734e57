"""HumanEval's metric: pass@1, the share of completions whose unit tests pass (Chen et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from leap_serve.sandbox import run_python
from leap_serve.tasks.base import Item

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
