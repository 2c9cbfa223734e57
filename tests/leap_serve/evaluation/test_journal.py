"""Answers on record: what is known is not asked again, whatever happened to the process that asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from leap_serve.encoding import Encoded
from leap_serve.engine import Model
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.errors import LeapError
from leap_serve.evaluation.journal import Journal, Recorded, folder_identity
from leap_serve.tasks.base import Item
from tiny_tokenizer import talking_copy

PROMPTS = ["Once", "2 + 2 =", "Once", "Q"]
ITEMS = [Item(str(number), prompt, f" {prompt[::-1]}") for number, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def engine(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchEngine]:
    folder = talking_copy(family_checkpoint("qwen3_moe"), tmp_path_factory.mktemp("journal") / "m")
    engine = TorchEngine(folder, dtype="float32", device="cpu")
    yield engine
    engine.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def never() -> Model:
    raise AssertionError("the model was opened")


def test_what_is_on_record_is_not_asked_again(engine: TorchEngine, tmp_path: Path) -> None:
    path = tmp_path / "a" / "answers.jsonl"
    with Journal(path) as journal:
        model = Recorded(lambda: engine, journal, {"weights": 1}, "mine")
        answers = model.generate(PROMPTS, 5), model.score(ITEMS), model.score_ids([Encoded([5, 6], [7])])
    assert answers == (engine.generate(PROMPTS, 5), engine.score(ITEMS), engine.score_ids([Encoded([5, 6], [7])]))
    assert [row["kind"] for row in lines(path)] == ["completion"] * 3 + ["score"] * 4, "equal questions are asked once"
    assert {row["for"] for row in lines(path)} == {"mine"}
    seen: list[tuple[int, int]] = []
    with Journal(path) as journal:
        again = Recorded(never, journal, {"weights": 1})
        assert again.generate(PROMPTS, 5, progress=lambda *at: seen.append(at)) == answers[0]
        assert again.score(ITEMS) == answers[1] and again.score_ids([Encoded([5, 6], [7])]) == answers[2]
        for other in (
            lambda: again.generate(PROMPTS, 6), lambda: again.generate(PROMPTS, 5, ["x"]),
            lambda: again.generate(PROMPTS, 5, temperature=1.0, seed=1), lambda: again.score([ITEMS[0], Item("", "a", "b")]),
            lambda: Recorded(never, journal, {"weights": 2}).generate(PROMPTS, 5),
        ):  # fmt: skip
            with pytest.raises(AssertionError, match="was opened"):
                other()
    assert seen == [(4, 4)]


def test_only_what_is_missing_is_asked(engine: TorchEngine, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with Journal(tmp_path / "j") as journal:
        model = Recorded(lambda: engine, journal, {})
        first = model.generate(PROMPTS[:1], 5)
        whole = model.generate(PROMPTS, 5, progress=lambda *at: seen.append(at))
    assert whole[0] == whole[2] == first[0] and len(lines(tmp_path / "j")) == 3
    assert seen[0] == (2, 4) and seen[-1] == (4, 4)


def test_a_line_cut_off_by_a_kill_is_dropped_and_asked_again(engine: TorchEngine, tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        expected = Recorded(lambda: engine, journal, {}).generate(PROMPTS, 5)
    path.write_bytes(path.read_bytes()[:-10])
    with Journal(path) as journal:
        assert len(journal.known) == 2
        assert Recorded(lambda: engine, journal, {}).generate(PROMPTS, 5) == expected
    assert len(lines(path)) == 3, "every line is whole again"


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for damage in ("{oops\n", "[1]\n", '{"text": "no key"}\n'):
        path.write_text('{"key": "a", "text": ""}\n' + damage + '{"key": "b"}\n')
        with pytest.raises(LeapError, match=r"j:2: is no answer on record"):
            Journal(path)
        assert damage in path.read_text()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "j"), pytest.raises(LeapError, match="another process writes it"):
        Journal(tmp_path / "j")
    Journal(tmp_path / "j").done(keep=False)
    assert not (tmp_path / "j").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(LeapError, match="cannot be written"):
        Journal(tmp_path / "file" / "j")


def test_other_files_are_another_model(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "adapter").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"1")
    (folder / "notes.txt").write_text("")
    first = folder_identity(folder)
    (folder / "notes.txt").write_text("other")
    assert folder_identity(folder) == first
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"1")
    assert folder_identity(folder) != first
