"""Metrics against their authors' definitions and published figures."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from leap_serve.errors import LeapError
from leap_serve.grading.metrics import METRICS, flexible_number, normalized, pass_at_k, rouge, token_f1
from leap_serve.tasks.base import Item
from leap_serve.tasks.registry import load_task
from leap_serve.tasks.xsum import all_rouge

GOLDEN = {"convs2s": 25.2427, "topic_convs2s": 25.6087}  # the third system's is in test_tasks.py


def rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 12 and then 1,234.", "1234"), ("#### -5", "-5"), ("it is $18.00", "18.00"), ("$70,000", "70000"),
     ("no", None), ("x=3", "3"), ("-12 apples", "-12")],
)  # fmt: skip
def test_flexible_extraction_takes_the_last_number(text: str, number: str | None) -> None:
    assert flexible_number(text) == number


def test_gold_gsm8k_answers_score_one_by_both_rules(shared_data: Path) -> None:
    task = load_task("gsm8k", shared_data)
    items = task.items("test")
    golds = [item.reference["answer"] for item in items]
    assert sum("," in item.answer.split("####")[1] for item in items) == 14
    assert sum(gold.startswith("-") for gold in golds) == 2
    found = task.details(items, [item.answer for item in items])  # type: ignore[attr-defined]
    assert found == {"exact match": [1.0] * 1319, "flexible match": [1.0] * 1319}
    # Without the mark the official rule finds nothing; the flexible one still does, grouped and with a full stop.
    bare = [f"The answer is {int(gold):,}." for gold in golds]
    assert sum(task.score(items, bare)) == 0
    assert task.details(items, bare)["flexible match"] == [1.0] * 1319  # type: ignore[attr-defined]
    wrong = task.details(items, [f"#### {int(gold) + 1}" for gold in golds])  # type: ignore[attr-defined]
    assert not any(map(sum, wrong.values()))


def test_token_f1_is_squad_s() -> None:
    assert normalized("The  cat, a DOG!") == "cat dog"
    assert token_f1("the cat sat", "A cat sat down.") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert token_f1("the the cat", "cat cat") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert token_f1("yes", "no") == token_f1("a", "the") == 0.0


@pytest.mark.parametrize(("n", "c", "k"), [(1, 1, 1), (1, 0, 1), (10, 3, 1), (10, 3, 5), (20, 1, 10), (10, 8, 5)])
def test_pass_at_k_is_unbiased(n: int, c: int, k: int) -> None:
    assert pass_at_k(n, [c], k) == pytest.approx([1 - math.comb(n - c, k) / math.comb(n, k)])


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(LeapError, match="k is 5 with 4 samples"):
        pass_at_k(4, [1], 5)


def test_rouge_takes_the_best_reference() -> None:
    found = rouge(["the cat sat", "a dog ran far away"], "a dog ran\n")
    assert found["ROUGE-1"] == pytest.approx(2 * 1 * 0.6 / 1.6)
    assert found["ROUGE-2"] == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert rouge(["running dogs"], "run dog")["ROUGE-L"] == 1.0, "stemmed"


def test_of_several_right_answers_the_best_counts() -> None:
    assert METRICS["exact match"](["a", "b"], " b\n") == METRICS["contains"](["Rome", "Paris"], "It is paris.") == 1.0
    assert METRICS["last number"](["1,200"], "3 + 4 is 1200") == METRICS["normalized match"](["The End"], "end.") == 1.0
    assert METRICS["exact match"](["a"], "A") == METRICS["last number"](["5"], "none") == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("system", GOLDEN)
def test_rouge_l_of_all_published_outputs(shared_data: Path, system: str) -> None:
    found = rows(shared_data / "xsum_rouge_golden.jsonl.gz")
    items = [Item(str(i), "", "", {"summary": row["reference"]}) for i, row in enumerate(found)]
    scores = all_rouge(items, [row[system] for row in found])["ROUGE-L"]
    assert round(100 * sum(scores) / 2000, 4) == GOLDEN[system]
