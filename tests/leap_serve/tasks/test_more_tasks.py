"""Passkey, SciTLDR, Qasper, running text, and tasks from a YAML file: items, metrics, and what they refuse."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leap_serve.engine import mean_loss
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.errors import LeapError, UsageError
from leap_serve.evaluation.evaluate import evaluate_text
from leap_serve.tasks.base import SPLITS
from leap_serve.tasks.passkey import Passkey
from leap_serve.tasks.qasper import answer_of
from leap_serve.tasks.registry import load_task
from leap_serve.tasks.text import Text
from leap_serve.tasks.user import UserTask
from tiny_tokenizer import talking_copy


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    return path


def test_passkeys_stand_where_they_should() -> None:
    task = Passkey((100, 400), (0, 50, 100))
    items = task.items("test")
    assert len(items) == 60 and len({item.reference["group"] for item in items}) == 6
    for item in items:
        words, depth = map(int, re.findall(r"\d+", item.reference["group"]))
        key = item.reference["answer"]
        before, after = re.split(rf"The pass key is {key}\. Remember it\. {key} is the pass key\.", item.prompt)
        filler = before.split()[28:], after.split()[:-9]
        assert abs(len(filler[0]) + len(filler[1]) - words) <= 12
        assert abs(len(filler[0]) / words - depth / 100) < 0.06
        assert before.rstrip().endswith("."), "the key begins a sentence"
        assert item.prompt.endswith("The pass key is")
    assert task.score(items[:2], [items[0].answer, " 1"]) == [1.0, 0.0]
    assert task.score(items[:1], [f" {items[0].reference['answer']}9"]) == [0.0]
    keys = [{item.reference["answer"] for item in task.items(split, 300)} for split in SPLITS]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert task.items("test", 5) == items[:5] != task.items("test", 5, seed=1)
    with pytest.raises(UsageError, match="depths of 0 to 100"):
        Passkey((10,), (101,))


def test_scitldr_in_its_official_splits(shared_data: Path) -> None:
    task = load_task("scitldr", shared_data)
    items = task.items("test")
    assert len(items) == 618 and len(task.items("validation", 5)) == 5
    references = [json.loads(item.reference["references"]) for item in items]
    assert sum(map(len, references)) == 1967
    assert task.score(items[:40], [found[-1] for found in references[:40]]) == [1.0] * 40, "any reference is right"
    assert task.score(items[:5], [""] * 5) == [0.0] * 5


def test_scitldr_of_the_hub_s_rows(tmp_path: Path) -> None:
    row = {"source": ["One.", "Two."], "target": ["Short.", "Brief."], "paper_id": "p1"}
    (item,) = load_task("scitldr", write(tmp_path / "scitldr_test.jsonl", [row])).items("test")
    assert (item.prompt, item.answer) == ("Abstract: One. Two.\nTL;DR:", " Short.")
    with pytest.raises(LeapError, match=r"scitldr_test\.jsonl:1: has no"):
        load_task("scitldr", write(tmp_path / "scitldr_test.jsonl", [{"source": []}])).items("test")


def annotated(**answer: Any) -> dict[str, Any]:
    return {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": "", **answer}


PAPER = {
    "id": "1", "title": "On Cats", "abstract": "We study cats.",
    "full_text": {"section_name": ["Intro", None], "paragraphs": [["Cats sleep.", "A lot."], ["The end."]]},
    "qas": {
        "question": ["What do cats do?", "Do dogs?"], "question_id": ["q1", "q2"],
        "answers": [
            {"answer": [annotated(extractive_spans=["sleep", "a lot"]), annotated(free_form_answer="They sleep.")]},
            {"answer": [annotated(unanswerable=True)]},
        ],
    },
}  # fmt: skip


def test_qasper_papers_become_questions(tmp_path: Path) -> None:
    flat = {"id": "f", "question": "Why?", "context": "Because.", "answers": ["Because"]}
    task = load_task("qasper", write(tmp_path / "qasper_test.jsonl", [PAPER, flat]))
    first, second, third = task.items("test")
    assert first.prompt == (
        "On Cats\n\nWe study cats.\n\nIntro\nCats sleep.\nA lot.\n\nThe end.\n\nQuestion: What do cats do?\nAnswer:"
    )
    assert [item.id for item in (first, second, third)] == ["qasper/q1", "qasper/q2", "qasper/f"]
    assert task.score([first, first, second], ["they SLEEP!", "sleep, lot", "Unanswerable."]) == [1.0, 1.0, 1.0]
    assert task.score([first, third], ["eat", "because it is"]) == [0.0, 0.5]
    assert task.items("test", 1) == [first]
    assert [answer_of(annotated(yes_no=value)) for value in (True, False)] == ["Yes", "No"]
    for broken in (
        {**PAPER, "qas": {}},
        {**PAPER, "full_text": None},
        {**flat, "answers": []},
        {**flat, "answers": [""]},
    ):
        with pytest.raises(LeapError, match=r"qasper_test\.jsonl:1: is no paper"):
            load_task("qasper", write(tmp_path / "qasper_test.jsonl", [broken])).items("test")


# Running text


@pytest.mark.parametrize(("window", "stride", "length"), [(8, 4, 30), (8, 8, 30), (8, 1, 9), (8, 3, 5), (8, 8, 16)])
def test_windows_score_every_token_once(window: int, stride: int, length: int) -> None:
    ids = list(range(100, 100 + length))
    found = Text("allenai/c4", window, stride).windows(ids)
    assert [token for one in found for token in one.answer] == ids
    for one in found:
        whole = one.prompt + one.answer
        assert len(whole) <= window and whole == ids[whole[0] - 100 : whole[0] - 100 + len(whole)]
    assert all(len(one.prompt) == window - stride for one in found[1:-1])


def test_perplexity_is_the_field_s(family_checkpoint: Callable[[str], Path], tmp_path: Path, shared_data: Path) -> None:
    """The strided loop as transformers' documentation has it: labels of −100 for the context, mean over the rest."""
    import torch

    with gzip.open(shared_data / "tinyshakespeare.txt.gz", "rt") as stream:
        (tmp_path / "text.txt").write_text(stream.read()[:150])
    engine = TorchEngine(talking_copy(family_checkpoint("qwen3_moe"), tmp_path / "m", with_bos=True), dtype="float32", device="cpu")  # fmt: skip
    text = Text(str(tmp_path / "text.txt"), 32, 12)
    found = evaluate_text(engine, text, "test", None)
    ids = torch.tensor([[1, *engine.tokenize([text.read("test")])[0]]])
    losses, before = [], 0
    for begin in range(0, ids.shape[1], 12):
        end = min(begin + 32, ids.shape[1])
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : -(end - before)] = -100
        labels = labels[:, 1:]
        with torch.inference_mode():
            logits = engine._model(window).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="none")[labels[0] != -100])  # fmt: skip
        before = end
        if end == ids.shape[1]:
            break
    expected = torch.cat(losses).double()
    assert sum(score.tokens for score in found.scores) == len(expected) == ids.shape[1] - 1
    assert found.loss == mean_loss(found.scores) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.score == pytest.approx(float(expected.mean().exp()), rel=1e-5)
    assert found.interval.low < found.score < found.interval.high
    assert evaluate_text(engine, text, "test", 2).per_item == found.per_item[:2]
    engine.close()


def test_texts_from_files(tmp_path: Path, shared_data: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b"}])
    assert Text(str(path)).read("test") == "a\n\nb"
    assert Text(str(shared_data / "wikitext2_test.txt.gz")).read("test").startswith(" \n = Robert")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "bad.txt.gz").write_bytes(b"plain")
    for name, message in (
        ("empty.txt", "holds no text"),
        ("bad.txt", "give text in UTF-8"),
        ("bad.txt.gz", "cannot be"),
    ):
        with pytest.raises(LeapError, match=message):
            Text(str(tmp_path / name)).read("test")
    with pytest.raises(UsageError, match=r"no text file, and not Salesforce/wikitext or allenai/c4"):
        Text("none.txt")
    with pytest.raises(UsageError, match="a stride up to it"):
        Text("allenai/c4", 8, 9)


# Tasks from a file

TASK = 'prompt: "{{q}} {question}\\nA:"\nanswer: gold\nmetric: exact match\nsplits: {train: tr.jsonl, test: te.jsonl}\n'


def test_a_task_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(TASK + 'name: mine\nstop: ["END"]\nmax_tokens: 9\n')
    write(tmp_path / "tr.jsonl", [{"question": f"{i}?", "gold": i, "id": i} for i in range(40)])
    write(tmp_path / "te.jsonl", [{"question": "x", "gold": ["y", "z"], "split": "whatever"}])
    task = load_task(str(tmp_path / "mine.yaml"))
    assert (task.name, task.metric, task.stop, task.max_tokens) == ("mine", "exact match", ("END",), 9)
    (item,) = task.items("test")
    assert (item.prompt, item.answer) == ("{q} x\nA:", " y")
    assert task.score([item, item, item], ["z", " y\n", "w"]) == [1.0, 1.0, 0.0]
    train, held = task.items("train"), task.items("validation")
    assert (len(train), len(held)) == (38, 2) and not {i.id for i in train} & {i.id for i in held}
    assert train[0].id.startswith("mine/")
    (other,) = load_task(str(tmp_path / "mine.yaml"), write(tmp_path / "mine_test.jsonl", [{"question": "o", "gold": "p"}])).items("test")  # fmt: skip
    assert other.prompt == "{q} o\nA:"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("metrics: x\n", "unknown key 'metrics'"),
        ("metric: accuracy\n", r"metric is 'accuracy', not one of exact match"),
        ("prompt: none\n", r"prompt names no \{field\}"),
        ('prompt: "{a.__class__}"\n', r"brace that is no \{field\}"),
        ('prompt: "{question!r}"\n', r"brace that is no \{field\}"),
        ("answer: 5\n", "answer is 5, not a text"),
        ("splits: {dev: x}\n", r"splits\.dev is none of"),
        ("splits: {test: [a]}\n", r"splits\.test is \['a'\], not a file"),
        ("splits: []\n", "does not map"),
        ("hub: {id: a/b, splits: [test]}\n", "give either splits"),
        ("max_tokens: 0\n", "max_tokens is 0"),
        ("max_tokens: true\n", "max_tokens is True"),
        ("stop: END\n", "stop is not a list"),
        ("name: [1]\n", "name or separator"),
        ("prompt: !!python/object:os.system {}\n", "not readable YAML"),
        ("prompt: 5\nmetric: 6\n", "prompt is 5.*metric is 6"),
    ],
)
def test_a_bad_task_file_says_all_that_is_wrong(tmp_path: Path, change: str, message: str) -> None:
    keys = {line.split(":")[0] for line in change.splitlines()}
    kept = [line for line in TASK.splitlines() if line.split(":")[0] not in keys]
    path = tmp_path / "t.yaml"
    path.write_text("\n".join(kept) + "\n" + change)
    with pytest.raises(LeapError, match=message):
        UserTask.load(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"gold": "a"}, r"te\.jsonl:1: 'question' is None; .*it has gold"),
        ({"question": ["q"], "gold": "a"}, r"'question' is \['q'\]"),
        ({"question": "q"}, "'gold' holds no answer: None"),
        ({"question": "q", "gold": [" "]}, "holds no answer"),
        ({"question": "q", "gold": [{}, "a"]}, "holds no answer"),
    ],
)
def test_bad_rows_of_a_task_file_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "t.yaml").write_text(TASK)
    write(tmp_path / "te.jsonl", [row])
    with pytest.raises(LeapError, match=message):
        UserTask.load(tmp_path / "t.yaml").items("test")


def test_a_missing_task_file_or_split_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml does not exist"):
        load_task(str(tmp_path / "none.yaml"))
    (tmp_path / "t.yaml").write_text(TASK.replace("train: tr.jsonl, ", ""))
    with pytest.raises(UsageError, match="has no train split, only test"):
        UserTask.load(tmp_path / "t.yaml").items("train")
    with pytest.raises(UsageError, match=r"te\.jsonl: the file does not exist"):
        UserTask.load(tmp_path / "t.yaml").items("test")


def test_a_task_file_may_name_the_hub(tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text(TASK.split("splits")[0] + "hub: {id: org/set, config: main, splits: [test]}\n")
    task = UserTask.load(tmp_path / "h.yaml")
    assert (task.source.hub, task.source.config, task.source.splits, task.data) == ("org/set", "main", ("test",), None)
    with pytest.raises(UsageError, match="has no train split"):
        task.items("train")
