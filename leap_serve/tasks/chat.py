"""A task as it is put to a chat model, which ends its turn by itself and wraps code into prose and fences."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from leap_serve.tasks.base import Detailed, Item, Split, Task
from leap_serve.tasks.user import UserTask

INSTRUCTION = (
    "Read the following function signature and docstring, and fully implement the function described. "
    "Your response should only contain the code for this function.\n"
)
"""What stands before a function to complete (OpenAI's simple-evals, HumanEval)."""
CODE_TOKENS = 1024
"""Longest answer to a function: the code comes with its header again, and with words around it."""
_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL | re.MULTILINE)


def in_chat(task: Task) -> Task:
    """Return a task for chat completions; one from a YAML file stays as its author wrote it."""
    return task if isinstance(task, UserTask) else InChat(task)


def split_code(prompt: str, entry_point: str, answer: str) -> tuple[str, str]:
    """Find the code in a chat answer to a function header; returns what the program begins with, and what follows.

    Of several fenced blocks the first one that defines the function counts, or else the first; an answer without any
    is code as a whole. Code that defines the function stands for it, after the imports and helpers of the prompt;
    other code is the body, which follows the prompt.
    """
    header = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    blocks: list[str] = _FENCED.findall(answer) or [answer]
    for block in map(textwrap.dedent, blocks):
        if header.search(block):
            asked = header.search(prompt)
            return prompt[: asked.start()] if asked else "", block
    body = blocks[0].lstrip("\n")
    return prompt, body if body.startswith((" ", "\t")) else textwrap.indent(body, "    ")


@dataclass(frozen=True, slots=True)
class InChat:
    """A published or generated task for a chat model: no stop strings, and code taken out of its answers."""

    task: Task

    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The task's own name."""
        return self.task.name

    @property
    def metric(self) -> str:
        """The task's own metric."""
        return self.task.metric

    @property
    def max_tokens(self) -> int:
        """Longest answer."""
        return max(CODE_TOKENS, self.task.max_tokens) if self._code else self.task.max_tokens

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return the task's items; the prompts of code begin with an instruction."""
        found = self.task.items(split, limit, seed)
        return [replace(item, prompt=INSTRUCTION + item.prompt) for item in found] if self._code else found

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[float]:
        """The task's metric."""
        return self.task.score(*self._plain(items, completions))

    def details(self, items: Sequence[Item], completions: Sequence[str]) -> dict[str, list[float]]:
        """All of the task's metrics."""
        plain = self._plain(items, completions)
        return self.task.details(*plain) if isinstance(self.task, Detailed) else {self.metric: self.task.score(*plain)}

    @property
    def _code(self) -> bool:
        return self.task.metric == "pass@1"

    def _plain(self, items: Sequence[Item], completions: Sequence[str]) -> tuple[Sequence[Item], Sequence[str]]:
        """Items and completions as the task itself knows them."""
        if not self._code:
            return items, completions
        plain, codes = [], []
        for item, text in zip(items, completions, strict=True):
            begin, code = split_code(item.prompt.removeprefix(INSTRUCTION), item.reference["entry_point"], text)
            plain.append(replace(item, prompt=begin))
            codes.append(code)
        return plain, codes
