"""``leap eval`` in the reference engine: results, comparison, pass@k, resuming, the gate, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli import main
from leap_serve.cut.write import cut
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.errors import LeapError, UsageError
from leap_serve.evaluation.evaluate import Sampling, compare, evaluate
from leap_serve.evaluation.gate import Gate
from leap_serve.plan import LayerPlan, Plan
from leap_serve.tasks.registry import load_task

ENGINE = ["--engine", "torch"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """leap-tiny with the first 16 of its 64 experts, which ruins it."""
    source = Checkpoint.open(resolve_model("leap-tiny"))
    layers = {layer: LayerPlan(tuple(range(16)), source.top_k) for layer in source.moe_layers}
    out = tmp_path_factory.mktemp("cut") / "first-16"
    cut(source.folder, Plan(source.identity(), 64, layers, made_by={"version": "test", "argv": ["pytest"]}), out)
    return out


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    engine = TorchEngine("leap-tiny")
    yield engine
    engine.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def leap(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, Any, str]:
    """Run ``leap eval … --json``: status, the last line of standard output, standard error."""
    status = main(["eval", *map(str, argv), "--json"])
    said = capsys.readouterr()
    lines = said.out.strip().splitlines()
    return status, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None, said.err


def test_scores_and_details(engine: TorchEngine) -> None:
    task = load_task("toy-gsm")
    items = task.items("test", 8)
    seen: list[tuple[int, int]] = []
    found = evaluate(engine, task, items, lambda *at: seen.append(at))
    assert found.score > 0.8 and found.loss < 0.2 and found.no_loss == ""
    assert found.per_item == tuple(task.score(items, [answer.text for answer in found.completions]))
    assert set(found.details) == {"flexible match"} and len(found.scores) == 8
    assert seen == sorted(seen) and seen[-1] == (16, 16), "generation and scoring are one progress"
    assert found.interval.low <= found.score <= found.interval.high
    same = compare(found, found)
    assert {name: (one.mean, one.low, one.high) for name, one in same.items()} == dict.fromkeys(
        ("score", "flexible match", "loss"), (0.0, 0.0, 0.0)
    )
    with pytest.raises(UsageError, match="not of the same items"):
        compare(found, evaluate(engine, task, items[:1]))
    with pytest.raises(UsageError, match="no items"):
        evaluate(engine, task, [])


def test_pass_at_k_of_several_samples(engine: TorchEngine) -> None:
    task = load_task("toy-code")
    items = task.items("test", 5)
    found = evaluate(engine, task, items, sampling=Sampling(2, 1.5, (1, 2), seed=5))
    assert found.metric == "pass@1" and set(found.details) == {"pass@2"}
    assert set(found.per_item) <= {0.0, 0.5, 1.0} and 0.5 in found.per_item, "both samples count"
    assert found.details["pass@2"] == tuple(float(one > 0) for one in found.per_item)
    with pytest.raises(UsageError, match="scored on one answer"):
        evaluate(engine, load_task("toy-gsm"), items, sampling=Sampling(2, 1.0))
    for wrong in ((0, 0.0), (2, 0.0), (1, -1.0), (1, 0.0, (2,)), (2, 1.0, ())):
        with pytest.raises(UsageError):
            Sampling(*wrong)


def test_full_against_pruned_and_again_from_the_record(
    pruned: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (pruned, "--vs", "leap-tiny", "--task", "toy-xsum", "--limit", "6", "-o", "r.json", *ENGINE)
    status, found, _ = leap(capsys, *command)
    assert status == 0
    difference = found["differences"]["toy-xsum"]
    ours, full = found["tasks"]["toy-xsum"], found["vs"]["tasks"]["toy-xsum"]
    assert difference["score"]["mean"] == pytest.approx(ours["score"] - full["score"]) and full["score"] > 0.9
    assert difference["score"]["high"] < 0 < difference["loss"]["low"], "the intervals exclude zero"
    assert set(difference) == {"score", "ROUGE-1", "ROUGE-2", "loss"}
    written = json.loads(Path("r.json").read_text())
    rows = written["tasks"]["toy-xsum"]["per_item"]
    assert len(rows) == 6 and set(rows[0]) == {"id", "score", "logprob", "tokens", "text", "finish_reason"}
    assert written["made_by"]["argv"] and "per_item" not in ours
    kept = Path("r.answers.jsonl").read_text()
    assert len(kept.splitlines()) == 24
    assert leap(capsys, *command)[1] == found and Path("r.answers.jsonl").read_text() == kept
    assert not Path("runs").exists()


def test_perplexity_and_passkey_by_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.txt").write_text("Anna has 23 apples. " * 30)
    status, found, _ = leap(
        capsys, "leap-tiny", "--task", "perplexity", "--data", "t.txt", "--window", "64", "--stride", "32", *ENGINE
    )
    assert status == 0
    told = found["tasks"]["perplexity"]
    assert told["score"] == pytest.approx(2.718281828459045 ** told["loss"]) and told["metric"] == "perplexity"
    status, found, _ = leap(
        capsys, "leap-tiny", "--task", "passkey", "--words", "20", "60", "--depths", "50", "--limit", "4", *ENGINE
    )
    assert status == 0 and set(found["tasks"]["passkey"]["groups"]) == {"20 words, depth 50 %", "60 words, depth 50 %"}
    assert list(Path("runs/eval").iterdir()) == [], "nothing is kept of what came to its end"


GATE = """\
checks:
  - {task: toy-code, limit: 3, max_score_drop: 0.1, max_degenerate_increase: 0.5}
  - {text: t.txt, windows: 3, window: 64, continue: 16, max_loss_increase: 0.2, max_degenerate_increase: 1.0}
"""


def test_the_gate_breaks_for_a_ruined_model_and_keeps_for_the_full_one(
    pruned: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("t.txt").write_text("\n".join(item.prompt + item.answer for item in load_task("toy-xsum").items("test", 9)))
    Path("gate.yaml").write_text(GATE)
    # The manifest names leap-tiny, and its identity is checked.
    status, found, said = leap(capsys, pruned, "--gate", "gate.yaml", *ENGINE)
    assert status == 1 and not found["passed"] and "leap eval: gate.yaml: bounds broken: toy-code: max_" in said
    code, text = found["checks"]
    assert not code["bounds"]["max_score_drop"]["kept"] and code["bounds"]["max_degenerate_increase"]["kept"]
    assert code["bounds"]["max_score_drop"]["observed"]["mean"] == pytest.approx(
        code["full"]["score"] - code["pruned"]["score"]
    )
    assert text["bounds"]["max_loss_increase"]["observed"]["mean"] == pytest.approx(
        text["pruned"]["loss"] - text["full"]["loss"]
    )
    assert 0 <= text["pruned"]["degenerate_share"] <= 1 and len(text["degenerate_examples"]) <= 3
    assert [line.split(" is ")[0] for line in found["broken"]] == [
        "toy-code: max_score_drop",
        "t.txt: max_loss_increase",
    ]
    written = json.loads(Path("runs/eval/gate.json").read_text())
    assert {key: written[key] for key in found} == found and "made_by" in written
    status, found, _ = leap(capsys, "leap-tiny", "--vs", "leap-tiny", "--gate", "gate.yaml", "-o", "g.json", *ENGINE)
    assert status == 0 and found["passed"] and found["broken"] == []
    assert json.loads(Path("g.json").read_text())["passed"] is True


def test_by_interval_the_worse_end_must_keep_the_bound() -> None:
    from leap_serve.engine import Completion, Score
    from leap_serve.evaluation.evaluate import Evaluation
    from leap_serve.evaluation.gate import Check, Observed, _row

    def side(values: list[float]) -> Observed:
        ids = tuple(map(str, range(10)))
        scores = (Score(-1.0, 1),) * 10
        answers = (Completion("fine", (), "stop"),) * 10
        return Observed(Evaluation("t", "F1", sum(values) / 10, 1.0, tuple(values), ids, scores, answers), answers)

    check = Check("t", load_task("toy-gsm"), "test", 10, 0, 0, {"max_score_drop": 0.15})
    full, ours = side([1.0] * 10), side([1.0] * 9 + [0.0])
    kept = {
        by: _row(Gate("g", (check,), by), check, full, ours)["bounds"]["max_score_drop"] for by in ("mean", "interval")
    }  # type: ignore[arg-type]
    assert kept["mean"]["kept"] and not kept["interval"]["kept"]
    assert kept["mean"]["observed"]["mean"] == pytest.approx(0.1) and kept["mean"]["observed"]["high"] > 0.15


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checks: []\n", "holds no list of checks"),
        ("5\n", "holds no list of checks"),
        ("check: [\n", "not readable YAML"),
        ("checks: [{task: toy-gsm}]\n", "check 1: has no bound"),
        ("checks: [{max_score_drop: 1}]\n", "names neither one text nor one task"),
        ("checks: [{task: toy-gsm, text: a, max_score_drop: 1}]\n", "names neither one text nor one task"),
        ("checks: [{task: toy-gsm, max_score_drop: lots}]\n", "max_score_drop is 'lots', not a number"),
        ("checks: [{task: toy-gsm, max_score_drop: .nan}]\n", "max_score_drop is nan"),
        ("checks: [{task: toy-gsm, max_score_drop: 0, limit: 0}]\n", "limit is 0, not a count"),
        ("checks: [{task: toy-gsm, max_score_drop: 0, windows: 4}]\n", "unknown key 'windows', known are task"),
        ("checks: [{text: a, max_degenerate_increase: 0}]\n", "needs continue"),
        ("checks: [{text: a, max_loss_increase: 0, split: dev}]\n", "split is 'dev'"),
        (
            "by: luck\nof: x\nchecks: [{task: [a], max_score_drop: 0}]\n",
            r"unknown key 'of'; by is 'luck'.*task is \['a'\]",
        ),
        ("checks: [{text: none.txt, max_loss_increase: 0}]\n", "none.txt is no text file"),
        ("checks: [{task: toy-gms, max_score_drop: 0}]\n", "no task 'toy-gms'"),
    ],
)
def test_a_bad_gate_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(text)
    with pytest.raises(LeapError, match=message):
        Gate.load(path)


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["leap-tiny"], 2, "give either tasks or a gate"),
        (["leap-tiny", "--task", "toy-gsm", "--gate", "g.yaml"], 2, "give either tasks or a gate"),
        (["leap-tiny", "--gate", "g.yaml"], 2, "g.yaml does not exist"),
        (["leap-tiny", "--task", "toy-gsm", "--limit", "0"], 2, "--limit"),
        (["leap-tiny", "--task", "toy-gsm", "--data", "x"], 2, "generates its own items"),
        (["leap-tiny", "--task", "gsm8k", "--task", "xsum", "--data", "x"], 2, "is given for 2 tasks"),
        (["leap-tiny", "--task", "toy-gsm", "--chat"], 2, "are for an endpoint"),
        (["leap-tiny", "--task", "perplexity", "--data", "none.txt"], 2, "no text file"),
        (["leap-tiny", "--task", "passkey", "--words", "0"], 2, "name no place for a key"),
        (["leap-tiny", "--task", "toy-gsm", "--samples", "2"], 2, "--temperature"),
        (["http://127.0.0.1:9", "--task", "toy-gsm", "--concurrency", "0"], 2, "--concurrency"),
        (["leap-tiny", "--task", "toy-gsm", "-o", "other.json"], 2, "is no result of leap eval"),
        (["no-such-folder", "--task", "toy-gsm"], 1, "no such folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(
    here: Path, capsys: pytest.CaptureFixture[str], argv: list[str], status: int, message: str
) -> None:
    Path("other.json").write_text('{"something": "else"}')
    found, _, said = leap(capsys, *argv, *ENGINE)
    assert found == status
    assert re.search(message, said) and "Traceback" not in said
    assert json.loads(Path("other.json").read_text()) == {"something": "else"}


def test_the_gate_needs_a_full_model_to_compare_with(
    pruned: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("g.yaml").write_text("checks: [{task: toy-code, max_score_drop: 1}]\n")
    status, _, said = leap(capsys, "leap-tiny", "--gate", "g.yaml", *ENGINE)
    assert status == 2 and "is no cut, so it names no full model; give the full model with --vs" in said
