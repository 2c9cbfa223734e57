"""Tasks put to a chat model: code found among prose and fences, run in the sandbox; plain completions stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from leap_serve.tasks.base import Detailed, Item
from leap_serve.tasks.chat import INSTRUCTION, in_chat, split_code
from leap_serve.tasks.humaneval import HumanEval, program
from leap_serve.tasks.registry import load_task

PROMPT = (
    "from typing import List\n\n\ndef half(n: int) -> int:\n    return n // 2\n\n\n"
    'def halves(xs: List[int]) -> List[int]:\n    """Return half of each."""\n'
)
TEST = "def check(candidate):\n    assert candidate([4, 7]) == [2, 3]\n"
ITEM = Item("h/0", PROMPT, "    return [half(x) for x in xs]\n", {"entry_point": "halves", "test": TEST})
BODY = "return [half(x) for x in xs]"
WHOLE = f"def halves(xs: List[int]) -> List[int]:\n    {BODY}"
RIGHT = {
    "a bare body": f"    {BODY}\n",
    "a body in a fence": f"Sure:\n```python\n    {BODY}\n```\nThat is all.",
    "a body that lost its indent": f"```\n{BODY}\n```",
    "a whole function": WHOLE,
    "the function in a fence, its signature again": f"Here is the code!\n\n```python\n{WHOLE}\n```\n\nIt halves.",
    "with all of the prompt": f"```py\n{PROMPT}    {BODY}\n```",
    "after another fence": f"First:\n```sh\npip install nothing\n```\nThen:\n```python\n{WHOLE}\n```",
    "below a point of a list": "1. So:\n   ```python\n" + "".join(f"   {line}\n" for line in WHOLE.splitlines()) + "   ```\n",
    "cut off by the limit": f"```python\n{WHOLE}\n",
    "closed on its last line": f"```python\n{WHOLE}```",
    "with a helper of its own": f"```python\ndef half(n):\n    return n >> 1\n\n{WHOLE}\n```",
}  # fmt: skip
WRONG = {
    "prose": "I would halve each of them.",
    "nothing": "",
    "a wrong body": "```python\n    return xs\n```",
    "another function": f"```python\n{WHOLE.replace('halves', 'thirds')}\n```",
}


class OneFunction(HumanEval):
    """HumanEval's metric on the item above."""

    def items(self, *_: object, **__: object) -> list[Item]:
        return [ITEM]


def test_code_is_found_where_chat_models_put_it() -> None:
    task = in_chat(OneFunction())
    (item,) = task.items("test")
    assert item.prompt == INSTRUCTION + PROMPT and task.stop == () and task.max_tokens >= 1024
    answers = [*RIGHT.values(), *WRONG.values()]
    passed = task.score([item] * len(answers), answers)
    assert dict(zip([*RIGHT, *WRONG], passed, strict=True)) == {
        **dict.fromkeys(RIGHT, 1.0),
        **dict.fromkeys(WRONG, 0.0),
    }


def test_plain_completions_are_not_touched() -> None:
    fenced = RIGHT["the function in a fence, its signature again"]
    assert program(ITEM, fenced) == f"{PROMPT}{fenced}\n{TEST}\ncheck(halves)\n", "as the authors' harness joins them"
    assert OneFunction().score([ITEM, ITEM], [fenced, ITEM.answer]) == [0.0, 1.0]


def test_a_name_that_begins_alike_is_another() -> None:
    longer = "def halves_of(xs):\n    return xs"
    assert split_code(PROMPT, "halves", longer)[0] == PROMPT
    assert split_code(PROMPT, "halves", WHOLE) == (PROMPT.partition("def halves")[0], WHOLE)


def test_other_tasks_only_lose_their_stop_strings(tmp_path: Path) -> None:
    task, plain = in_chat(load_task("gsm8k", tmp_path)), load_task("toy-gsm")
    assert (task.name, task.metric, task.stop, task.max_tokens) == ("gsm8k", "exact match", (), 320)
    chatted = in_chat(plain)
    items = plain.items("test", 3)
    assert chatted.items("test", 3) == items and isinstance(chatted, Detailed)
    texts = ["First,\n\n#### " + items[0].reference["answer"], "no", items[2].reference["answer"]]
    assert chatted.details(items, texts) == {"exact match": [1.0, 0.0, 0.0], "flexible match": [1.0, 0.0, 1.0]}
    # What has one metric has one, and a task file is what its author wrote.
    summary = load_task("passkey")
    assert set(in_chat(summary).details(summary.items("test", 1), ["1"])) == {"exact match"}
    (tmp_path / "t.yaml").write_text('prompt: "{q}"\nanswer: a\nmetric: F1\nstop: ["END"]\nsplits: {test: t.jsonl}\n')
    mine = load_task(str(tmp_path / "t.yaml"))
    assert in_chat(mine) is mine


@pytest.mark.slow
def test_canonical_solutions_in_fences_all_pass(shared_data: Path) -> None:
    task = in_chat(load_task("humaneval", shared_data))
    items = task.items("test")
    texts = [f"Of course!\n```python\n{item.prompt.removeprefix(INSTRUCTION)}{item.answer}```\nDone." for item in items]
    assert task.score(items, texts) == [1.0] * 164
    bodies = [f"```python\n{item.answer}```" for item in items]
    assert task.score(items, bodies) == [1.0] * 164
