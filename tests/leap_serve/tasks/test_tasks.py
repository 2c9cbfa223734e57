"""Toy tasks: disjoint splits, right answers score 1, wrong ones 0, and the metrics are the real tasks' own."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from leap_serve.errors import LeapError, UsageError
from leap_serve.tasks.base import SPLITS, Item
from leap_serve.tasks.gsm8k import exact_match, extract_answer
from leap_serve.tasks.registry import TASKS, items_from_file, load_task
from leap_serve.tasks.xsum import all_rouge


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint_and_repeatable(name: str) -> None:
    task = load_task(name)
    prompts = {split: [item.prompt for item in task.items(split, 300)] for split in SPLITS}
    assert all(len(set(texts)) == 300 for texts in prompts.values())
    assert not set(prompts["train"]) & set(prompts["test"])
    assert not set(prompts["train"]) & set(prompts["validation"])
    assert not set(prompts["validation"]) & set(prompts["test"])
    assert [item.prompt for item in task.items("test", 300)] == prompts["test"]
    assert [item.prompt for item in task.items("test", 300, seed=1)] != prompts["test"]


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_score_one_and_wrong_ones_do_not(name: str) -> None:
    task = load_task(name)
    items = task.items("test", 24)
    assert task.score(items, [item.answer for item in items]) == [1.0] * 24
    rotated = [items[(i + 1) % 24].answer for i in range(24)]
    assert sum(task.score(items, rotated)) < 24 * 0.6
    assert sum(task.score(items, [""] * 24)) == 0.0


def test_toy_gsm_arithmetic_is_right() -> None:
    for item in load_task("toy-gsm").items("train", 400):
        steps = re.findall(r"(\d+)([-+*])(\d+)=(\d+)", item.answer)
        assert steps
        for left, operator, right, result in steps:
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b}[operator] == int(result) >= 0
        assert item.reference["answer"] == steps[-1][3] == extract_answer(item.answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("#### 42", "42"), ("so\n#### -1,234", "-1234"), ("#### 3.5 apples", "3.5"), ("42", None), ("####42", None)],
)
def test_gsm8k_extraction_follows_the_official_rule(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def _rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def test_gsm8k_gold_answers_score_one(shared_data: Path) -> None:
    rows = _rows(shared_data / "gsm8k_test.jsonl.gz")
    golds = [row["answer"].split("####")[1].strip().replace(",", "") for row in rows]
    items = [
        Item(str(i), row["question"], row["answer"], {"answer": g})
        for i, (row, g) in enumerate(zip(rows, golds, strict=True))
    ]
    assert exact_match(items, [row["answer"] for row in rows]) == [1.0] * len(rows)


def test_rouge_l_matches_published_summaries(shared_data: Path) -> None:
    rows = _rows(shared_data / "xsum_rouge_golden.jsonl.gz")
    items = [Item(str(i), "", "", {"summary": row["reference"]}) for i, row in enumerate(rows)]
    scores = all_rouge(items, [row["ptgen"] for row in rows])["ROUGE-L"]
    assert round(100 * sum(scores) / len(scores), 4) == 23.1959


def test_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no task 'gsm9k'.*toy-gsm"):
        load_task("gsm9k")


def test_items_from_file(tmp_path: Path) -> None:
    good = tmp_path / "data.jsonl.gz"
    with gzip.open(good, "wt") as stream:
        stream.write('{"prompt": "a", "answer": "b"}\n\n{"text": "c"}\n')
    assert [(i.prompt, i.answer) for i in items_from_file(good)] == [("a", "b"), ("", "c")]
    assert len(items_from_file(good, limit=1)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n', r"data\.jsonl:1: has neither"),
        ('{"text": "ok"}\n{oops\n', r"data\.jsonl:2: not valid JSON"),
        ("", "holds no items"),
        ('{"prompt": 1, "answer": "x"}\n', r"data\.jsonl:1"),
        ("[1]\n", r"data\.jsonl:1"),
    ],
)
def test_bad_data_files_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(LeapError, match=message):
        items_from_file(path)


def test_a_data_file_that_is_not_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(b"plain")
    with pytest.raises(LeapError, match="cannot be read"):
        items_from_file(path)
