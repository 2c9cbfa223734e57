"""Published tasks from their own files: official splits, held-out validation, MBPP as HumanEval's pool."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leap_serve.errors import LeapError, UsageError
from leap_serve.tasks.base import SPLITS, fingerprint
from leap_serve.tasks.registry import PUBLISHED, load_task
from leap_serve.tasks.rows import held_out


def gsm_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"question": f"How much is {i}+1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(start, start + count)]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


MBPP_ROW = {
    "task_id": 7, "split": "train", "text": 'Write a function to shout. Not """quietly""".',
    "code": 'import re\r\ndef check(s): \r\n\t"""Doc."""\r\n\treturn louder(s)\t# loud\r\ndef louder(s):\r\n\treturn re.sub("$", MARK, s)\r\nMARK = "!"',
    "test_setup_code": "", "test_list": ["assert check('a')=='a!'", "assert check('') == '!'"],
}  # fmt: skip


def test_mbpp_rows_become_humaneval_items(tmp_path: Path) -> None:
    wrong = {**MBPP_ROW, "split": "validation", "task_id": 8, "text": "Another.", "test_list": ["assert check('a') == 'a?'"]}  # fmt: skip
    few_shot = {**MBPP_ROW, "split": "prompt", "task_id": 1}
    test = {**MBPP_ROW, "split": "test", "task_id": 9, "text": "A third."}
    task = load_task("mbpp", write(tmp_path / "mbpp.jsonl", [few_shot, MBPP_ROW, wrong, test]))
    (item,) = task.items("train")
    assert item.id == "mbpp/7"
    assert item.prompt == (
        "import re\n\ndef louder(s):\n    return re.sub('$', MARK, s)\n\nMARK = '!'\n\ndef check(s):\n"
        "    \"\"\"Write a function to shout. Not '''quietly'''.\n    >>> check('a')\n    'a!'\n    \"\"\"\n"
    )
    assert item.answer == "    return louder(s)\n"
    assert task.score([item, item], [item.answer, "    return s\n"]) == [1.0, 0.0]
    (other,) = task.items("validation")
    assert task.score([other], [other.answer]) == [0.0], "its own assert fails"


def test_a_copy_of_a_test_item_leaves_train(tmp_path: Path) -> None:
    copy = {**MBPP_ROW, "split": "test", "task_id": 600}
    fresh = {**MBPP_ROW, "task_id": 10, "text": "Write a function to cry."}
    task = load_task("mbpp", write(tmp_path / "mbpp.jsonl", [MBPP_ROW, fresh, copy]))
    assert [item.id for item in task.items("train")] == ["mbpp/10"]


def test_gsm8k_holds_out_five_percent_of_train(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k_train.jsonl", gsm_rows(200))
    write(tmp_path / "gsm8k_test.jsonl", gsm_rows(40, start=500))
    task = load_task("gsm8k", tmp_path)
    train, validation, test = (task.items(split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (190, 10, 40)
    keys = [{fingerprint(item) for item in items} for items in (train, validation, test)]
    assert len(set.union(*keys)) == 240
    assert [item.reference["answer"] for item in test[:2]] == ["501", "502"], "test keeps its official order"
    assert task.items("train", 5) == train[:5] != task.items("train", 5, seed=1)
    assert set(i.id for i in task.items("validation", seed=1)) == set(i.id for i in validation)
    # The order of the rows does not matter.
    assert {fingerprint(i) for i in held_out([*train, *validation])[1]} == keys[1]
    assert load_task("gsm8k", tmp_path / "gsm8k_train.jsonl").items("train") == train


@pytest.mark.parametrize(
    ("task", "name", "rows", "split", "message"),
    [
        ("gsm8k", "gsm8k_test.jsonl", gsm_rows(3), "train", r"holds no train rows of gsm8k; name the file gsm8k_train"),
        ("gsm8k", "mine.jsonl", gsm_rows(3), "test", r'mine\.jsonl: holds no test rows.* the field "split"'),
        ("gsm8k", "gsm8k_test.jsonl", [{"question": "?", "answer": "5"}], "test", r"jsonl:1: .*no number after ####"),
        ("gsm8k", "gsm8k_test.jsonl", [{"question": 5}], "test", r'jsonl:1: "question" is not a non-empty string'),
        ("xsum", "xsum_test.jsonl", [{"document": "d"}], "test", r'jsonl:1: "summary" is not'),
        ("mbpp", "mbpp.jsonl", [{**MBPP_ROW, "code": "def f(:"}], "train", r"not Python"),
        ("mbpp", "mbpp.jsonl", [{**MBPP_ROW, "test_list": ["assert 1"]}], "train", r"call 0 of the functions"),
        ("mbpp", "mbpp.jsonl", [{**MBPP_ROW, "test_list": None}], "train", r"call 0 of the functions"),
        ("mbpp", "mbpp_train.jsonl", [["row"]], "train", r"jsonl:1: not a JSON object"),
    ],
)
def test_bad_files_say_what_is_wrong(
    tmp_path: Path, task: str, name: str, rows: list[Any], split: Any, message: str
) -> None:
    with pytest.raises(LeapError, match=message):
        load_task(task, write(tmp_path / name, rows)).items(split)


def test_generated_tasks_take_no_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data: toy-gsm generates its own items"):
        load_task("toy-gsm", tmp_path)


def test_humaneval_never_trains_on_itself(tmp_path: Path) -> None:
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "def check(c):\n    assert c() == 1\n", "entry_point": "f"}  # fmt: skip
    write(tmp_path / "HumanEval.jsonl", [row])
    task = load_task("humaneval", tmp_path)
    assert [item.id for item in task.items("test")] == ["HumanEval/0"]
    assert task.score(task.items("test"), ["    return 1\n"]) == [1.0]
    with pytest.raises(LeapError, match="holds no train rows of mbpp"):
        task.items("train")
    write(tmp_path / "mbpp.jsonl", [MBPP_ROW, {**MBPP_ROW, "split": "test", "text": "Other."}])
    assert [item.id for item in task.items("train")] == ["mbpp/7"]


def test_offline_names_the_hub_and_the_files(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        'prompt: "{q}"\nanswer: a\nmetric: F1\nhub: {id: org/mine, config: main, splits: [test]}\n'
    )
    code = f"""
from leap_serve.errors import LeapError
from leap_serve.tasks.registry import load_task
from leap_serve.tasks.text import Text
names = "gsm8k", "xsum", "humaneval", "mbpp", "scitldr", "qasper", {str(tmp_path / "mine.yaml")!r}
asks = [lambda n=n: load_task(n).items("test") for n in names]
for ask in [*asks, *(lambda s=s: Text(s).read("test") for s in ("Salesforce/wikitext", "allenai/c4"))]:
    try:
        ask()
    except LeapError as error:
        print(error)
"""
    # A hub that nobody is at; a port that a socket holds and does not listen on refuses.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        env.pop("HF_HUB_OFFLINE", None)
        run = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "Retry" not in run.stderr, "it is asked once"
    said = run.stdout.strip().splitlines()
    named = {
        "openai/gsm8k": "gsm8k_test.jsonl", "EdinburghNLP/xsum": "xsum_test.jsonl",
        "openai/openai_humaneval": "humaneval_test.jsonl", "google-research-datasets/mbpp": "mbpp_test.jsonl",
        "allenai/scitldr": "scitldr_test.jsonl", "allenai/qasper": "qasper_test", "org/mine": "mine_test.jsonl", "Salesforce/wikitext": "a text file",
        "allenai/c4": "a text file",
    }  # fmt: skip
    assert len(said) == len(named)
    for line, (hub, file) in zip(said, named.items(), strict=True):
        assert f"{hub} cannot be had from the Hugging Face Hub" in line
        assert "--data" in line and file in line


def test_real_files_have_the_official_sizes(shared_data: Path) -> None:
    gsm8k, code = load_task("gsm8k", shared_data), load_task("humaneval", shared_data)
    assert [len(gsm8k.items(split)) for split in SPLITS] == [7099, 374, 1319]
    pool = code.items("train") + code.items("validation")
    assert all(item.id.startswith("mbpp/") for item in pool) and len(pool) == 374 + 90
    tests = code.items("test")
    assert len(tests) == 164
    assert not {item.prompt.strip() for item in tests} & {item.prompt.strip() for item in pool}


def test_real_gold_answers_score_one(shared_data: Path) -> None:
    gsm8k = load_task("gsm8k", shared_data)
    items = gsm8k.items("validation")
    assert gsm8k.score(items, [item.answer for item in items]) == [1.0] * len(items)
    code = load_task("humaneval", shared_data)
    for split in ("validation", "test"):
        items = code.items(split, 6)  # type: ignore[arg-type]
        assert code.score(items, [item.answer for item in items]) == [1.0] * 6
        assert code.score(items, ["    pass\n"] * 6) == [0.0] * 6


@pytest.mark.slow
def test_all_real_code_passes_its_own_tests(shared_data: Path) -> None:
    code = load_task("humaneval", shared_data)
    for split, expected in (("train", 374), ("validation", 90), ("test", 164)):
        items = code.items(split)  # type: ignore[arg-type]
        assert sum(code.score(items, [item.answer for item in items])) == expected
        assert split == "train" or sum(code.score(items, [""] * expected)) == 0


def test_every_published_task_is_known_by_name() -> None:
    assert set(PUBLISHED) == {"gsm8k", "humaneval", "mbpp", "xsum", "scitldr", "qasper"}
    assert all(load_task(name).name == name for name in PUBLISHED)
    with pytest.raises(UsageError, match=r"no task 'gsm9k'.*toy-gsm.*gsm8k"):
        load_task("gsm9k")
