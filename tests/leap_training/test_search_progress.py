"""Every pass of a search that reads weights or runs the model says on standard error how far it is; stdout stays clean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cut_blocks import ITEMS
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import console, main
from leap_serve.engines.torch_engine import TorchEngine
from leap_training.saliency import scores
from tiny_tokenizer import talking_copy

MATRICES = 4 * 8 * 3


@pytest.fixture(scope="module")
def home(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model m and its profile prof with channel sums."""
    folder = tmp_path_factory.mktemp("progress")
    engine = TorchEngine(talking_copy(family_checkpoint("qwen3_moe"), folder / "m"), dtype="float32", device="cpu")
    engine.profile(ITEMS, channels=True).save(folder / "prof")
    engine.close()
    return folder


def lines_of(home: Path, out: Path, capsys: pytest.CaptureFixture[str], source: str, *flags: str) -> list[str]:
    """What a search prints on stderr, its lines cut at « · »; its stdout ends with JSON and has no line of progress."""
    assert main(["search", str(home / source), *flags, "-o", str(out), "--json"]) == 0
    shown, err = capsys.readouterr()
    assert json.loads(shown.splitlines()[-1])["out"] == str(out)
    lines = [line.split(" · ")[0] for line in err.splitlines()]
    assert not any(line in shown for line in lines)
    return lines


@pytest.mark.parametrize(
    ("label", "command"),
    [
        ("magnitude", ["m", "--method", "magnitude", "--experts", "4"]),
        ("moe-pruner", ["prof", "--method", "moe-pruner", "--experts", "4"]),
        ("intra 0.5", ["prof", "--method", "intra", "--budget", "0.5"]),
    ],
)
def test_reading_every_matrix_is_counted(
    label: str, command: list[str], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(console, "LINE_S", 0.0)
    model = ["--model", str(home / "m")] if command[0] == "prof" else []
    lines = lines_of(home, tmp_path / "plan.json", capsys, *command, *model)
    assert lines == [f"{label}, matrices {done}/{MATRICES}" for done in range(1, MATRICES + 1)]


def test_experts_in_one_tensor_are_counted_one_by_one(family_checkpoint: Callable[[str], Path]) -> None:
    seen: list[tuple[int, int]] = []
    scores(Checkpoint.open(family_checkpoint("gpt_oss")), "magnitude", progress=lambda *both: seen.append(both))
    assert seen == [(done, 4 * 8 * 2) for done in range(1, 4 * 8 * 2 + 1)]


@pytest.mark.parametrize(("method", "steps"), [("naee", 4), ("moe-i2", 10), ("hc-smoe", 4)])
def test_the_pass_that_writes_the_layers_inputs_is_counted_before_the_steps(
    method: str, steps: int, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(console, "LINE_S", 0.0)
    flags = ["--method", method, "--experts", "6", "--task", "toy-gsm", "--items", "3"]
    lines = lines_of(home, tmp_path / "plan.json", capsys, "m", *flags)
    inputs = [f"{method} 6 inputs, items {done}/3" for done in (1, 2)]
    assert lines == [*inputs, *(f"{method} 6 {done}/{steps}" for done in range(1, steps + 1))]
