"""What a search takes from its user and must neither misread nor destroy: items, states, and files that are there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from families import make_checkpoint
from leap_serve.cli import main
from leap_serve.errors import UsageError
from leap_serve.plan import Plan
from leap_serve.tasks.registry import load_task
from leap_training.splits import search_items, validation_part
from tiny_tokenizer import add_tokenizer


def task_of(folder: Path, rows: int) -> Path:
    """A task file with this many training rows, of which some become its validation items."""
    folder.mkdir()
    text = [json.dumps({"q": f"{i} plus {i}", "a": str(2 * i)}) for i in range(rows)]
    (folder / "train.jsonl").write_text("\n".join(text))
    (folder / "test.jsonl").write_text(json.dumps({"q": "x", "a": "y"}))
    path = folder / "task.yaml"
    path.write_text('prompt: "{q}"\nanswer: a\nmetric: exact match\nsplits: {train: train.jsonl, test: test.jsonl}\n')
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("given") / "model"))


@pytest.fixture(scope="module")
def task(model: Path) -> Path:
    return task_of(model.parent / "task", 400)


@pytest.fixture(scope="module")
def profile(model: Path, task: Path) -> Path:
    out = model.parent / "profile"
    assert main(["profile", str(model), "--task", str(task), "--engine", "torch", "--limit", "8", "-o", str(out)]) == 0
    return out


def search(source: Path, method: str, out: Path, *flags: object) -> int:
    sizes = [] if "--experts" in flags else ["--experts", "4"]
    return main(["search", str(source), "--method", method, *sizes, *map(str, flags), "-o", str(out)])


def refused(capsys: pytest.CaptureFixture[str], source: Path, method: str, out: Path, *flags: object) -> str:
    assert search(source, method, out, *flags) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_search_without_items_is_refused(
    model: Path, profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = task_of(tmp_path / "small", 40)
    parts = {name: len(validation_part(load_task(str(small)), name, 9)) for name in ("search", "stopping", "router")}
    assert parts["search"] == 0 < sum(parts.values())
    with pytest.raises(UsageError, match="falls into the search's part"):
        search_items(load_task(str(small)), 9)
    out = tmp_path / "plan.json"
    for source, method in ((profile, "evolution"), (profile, "leap"), (model, "eep")):
        said = refused(capsys, source, method, out, "--task", small)
        assert "falls into the search's part; give it more validation items" in said and not out.exists()


def test_a_look_ahead_without_items_of_its_own_is_refused(
    profile: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, profile, "evolution", tmp_path / "plan.json", "--task", task, "--lookahead", "2")
    seen = len(validation_part(load_task(str(task)), "search", 32))
    assert 1 < seen < 32
    assert said == (
        "leap search: --lookahead: needs validation items that the search does not see, "
        f"and it sees all {seen} that are there; lower --items"
    )


def test_losses_of_another_dtype_are_not_taken_from_a_state(
    profile: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--task", task, "--engine", "torch", "--episodes", "12"]

    def loss(method: str, state: str, dtype: str) -> float:
        out = tmp_path / "plan.json"
        own = ["--batch", "4"] if method == "leap" else []
        assert search(profile, method, out, *flags, *own, "--force", "--state", tmp_path / state, "--dtype", dtype) == 0
        return float(Plan.load(out).made_by["search_loss"])

    for method in ("leap", "evolution"):
        exact, rounded = loss(method, f"{method}-a", "float32"), loss(method, f"{method}-b", "bfloat16")
        assert exact != rounded
        if method == "leap":
            said = refused(
                capsys, profile, method, tmp_path / "x.json", *flags, "--batch", "4", "--state", tmp_path / "leap-a",
                "--dtype", "bfloat16",
            )  # fmt: skip
            assert "float32" in said and "bfloat16" in said
        else:
            assert loss(method, f"{method}-a", "bfloat16") == rounded
            known: Any = json.loads((tmp_path / f"{method}-a" / "prior.json").read_text())
            assert known["of"]["losses_of"] == {"engine": "torch", "dtype": "bfloat16"}
            # And what is of this dtype is taken.
            (tmp_path / f"{method}-a" / "evaluations.jsonl").unlink()
            better = {name: [value] * len(known["losses"]) for name, value in (("losses", -9.0), ("rewards", 9.0))}
            (tmp_path / f"{method}-a" / "prior.json").write_text(json.dumps({**known, **better}))
            assert loss(method, f"{method}-a", "bfloat16") == -9.0


def test_a_ranking_that_was_not_evaluated_has_no_loss(
    profile: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--task", task, "--engine", "torch", "--episodes", "8", "--prior", "reap", "--json"]
    assert search(profile, "random-search", tmp_path / "plan.json", *flags) == 0
    told = capsys.readouterr().out
    assert "nan" not in told.lower() and "prior_loss" not in json.loads(told.splitlines()[-1])


def test_nothing_that_is_read_or_kept_is_replaced(
    model: Path, profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, base = Path(shutil.copytree(profile, tmp_path / "profile")), tmp_path / "base.json"
    before = (own / "profile.json").read_bytes()
    for name in ("profile.json", "profile.safetensors"):
        said = refused(capsys, own, "reap", own / name, "--force")
        assert said.endswith(f"{own / name}: belongs to {own}, which the search reads; choose another --out")
    assert "belongs to" in refused(capsys, model, "magnitude", model / "config.json", "--force")
    assert search(own, "reap", own / "plan.json") == search(own, "reap", own / "plan.json", "--force") == 0
    assert search(own, "reap", base) == 0
    flags = ["--experts", "1", "--on", base, "--force"]
    assert "is the plan of --on; choose another --out" in refused(capsys, model, "lexi", base, *flags)
    assert (own / "profile.json").read_bytes() == before and Plan.load(base).counts == [4] * 4
    both = tmp_path / "both"
    for state in (both, both / "in"):
        said = refused(capsys, model, "lexi", both, "--experts", "1", "2", "--state", state)
        assert said.endswith(f"--state: {state} lies in --out {both}; choose another --state")


def test_places_and_numbers_are_looked_at_before_the_search(
    model: Path, profile: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    for flags, said in (
        (["--save-policy", tmp_path], "--save-policy: "),
        (["--lambda", "nan"], "--alpha, --beta, --lambda: are 1.0, 0.0, nan; give finite numbers"),
    ):  # fmt: skip
        assert said in refused(capsys, profile, "leap", out, "--task", task, *flags)
    for flag in ("--steps", "--train-items"):
        assert "are below 1; give 1 or more" in refused(capsys, model, "tsep", out, "--task", task, flag, "0")
    state = tmp_path / "state"
    state.mkdir()
    for text in ("{}", '{"of": null}', '{"of": {}, "layers": 3}', "[]"):
        (state / "layers.json").write_text(text)
        assert search(model, "lexi", out, "--experts", "1", "--draws", "1", "--state", state) == 1
        assert "layers.json: is no state of a search; remove it" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
