"""What leap tune makes of its flags: the price of an expert read, and items that are too long."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cutting import plan_for
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import tune
from leap_serve.cut.write import cut
from leap_serve.errors import LeapError, UsageError
from leap_serve.tasks.base import Item
from leap_serve.tasks.registry import NAMES
from leap_serve.workload import Workload
from leap_training.latency import READS, LatencyModel, fit, sample_plans
from leap_training.pruning_space import PruningSpace
from leap_training.saliency import Routing
from leap_training.tune_config import TuneData
from leap_training.tune_state import STATE, remove_state
from tiny_tokenizer import talking_copy


@pytest.fixture(scope="module")
def small_cut(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    whole = talking_copy(family_checkpoint("qwen3_moe"), folder / "whole")
    cut(whole, plan_for(whole, lambda layer: (0, 2, 3, 5, 7)), folder / "cut")
    return folder / "cut"


def parsed(folder: Path, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args([str(folder), "--task", "toy-gsm", *flags])


def test_an_expert_read_costs_what_the_engine_measured(
    small_cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Checkpoint.open(small_cut).plan
    assert plan is not None
    path, load = tmp_path / "latency.json", Workload("w", 4, 4, 24)
    model = LatencyModel(
        plan.base.sha256, load, 9.0, "distinct-per-layer", (0.3, 0.01, 0.02, 0.03, 0.04, 0.1),
        {"distinct-per-layer": 0.034}, 12, 4,
    )  # fmt: skip
    model.save(path)
    config = tune._config(parsed(small_cut, "--latency-coef", "0.5", "--latency", str(path)), small_cut)
    assert config.router.latency_coef == 0.5
    assert config.router.latency_per_read == (0.01, 0.02, 0.03, 0.04) and config.router.latency_batch == 24
    assert "off by 3.4 % on 4 plans" in capsys.readouterr().out
    replace(model, form="counts").save(path)
    with pytest.raises(LeapError, match="does not hold the counts, top_k and ratio of each plan"):
        tune._config(parsed(small_cut, "--latency-coef", "0.5", "--latency", str(path)), small_cut)
    replace(model, base_sha256="0" * 64).save(path)
    with pytest.raises(UsageError, match="measured on another model"):
        tune._config(parsed(small_cut, "--latency-coef", "0.5", "--latency", str(path)), small_cut)
    with pytest.raises(UsageError, match="needs --latency, a calibration"):
        tune._config(parsed(small_cut, "--latency-coef", "0.5"), small_cut)


@pytest.mark.parametrize("slope", [0.01, 0.0])
def test_where_counts_predict_best_a_read_gets_its_price_from_the_same_measurements(
    small_cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], slope: float
) -> None:
    routing = Routing.of(Checkpoint.open(small_cut.parent / "whole"))
    plans, load = sample_plans(PruningSpace.of(routing, budget=0.5, allocation="global"), 16), Workload("w", 4, 4, 24)
    ratios, path = np.array([0.2 + slope * sum(plan.counts) for plan in plans]), tmp_path / "latency.json"
    replace(fit(plans, ratios, load, 9.0, 4), form="counts").save(path)
    found = tune._config(parsed(small_cut, "--latency-coef", "0.5", "--latency", str(path)), small_cut).router
    said, wanted = " ".join(capsys.readouterr().out.split()), fit(plans, ratios, load, 9.0, 4, READS)
    assert (found.latency_per_read, found.latency_batch) == (wanted.coefficients[1:-1], 24)
    assert f"fitted again as {wanted.form} since counts gives a read no price: off by" in said
    assert f"off by {100 * wanted.mape[wanted.form]:.1f} % on 4 plans" in said
    assert any(found.latency_per_read) == (slope > 0) != ("--latency-coef changes nothing" in said)


def test_items_that_are_too_long_are_left_out_and_counted(small_cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A letter is a token here: 2 + 3 and the end of text are 6."""
    items = [Item(str(n), "ab", "c" * n) for n in (3, 4, 5)]
    data = TuneData(items, [], items[:2], items[:1])
    kept = tune._shorter(data, small_cut, 7)
    assert (kept.pool, kept.stopping, kept.router) == (items[:2], items[:2], items[:1])
    assert "1 of 3 pool items have more than 7 tokens: left out" in capsys.readouterr().out
    with pytest.raises(UsageError, match="the shortest of the 3 pool items has 6 tokens"):
        tune._shorter(data, small_cut, 5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning-rate", "-1"], "learning_rate is -1, not above 0"),
        (["--learning-rate", "nan"], "learning_rate is nan, not above 0"),
        (["--router-learning-rate", "0"], "router learning_rate is 0, not above 0"),
        (["--noise", "0"], "noise is 0, not above 0"),
        (["--epsilon", "1.5"], "epsilon is 1.5, not in (0, 1]"),
        (["--epsilon", "0"], "epsilon is 0, not in (0, 1]"),
        (["--lr-warmup", "-5", "--router-warmup", "-1"], "lr_warmup is -5, not 0 or more; router_warmup is -1"),
        (["--kl-coef", "-1"], "kl_coef is -1, not 0 or more"),
        (["--ent-coef", "nan"], "ent_coef is nan, not 0 or more"),
        (["--adapter-l2", "inf"], "adapter_l2 is inf, not 0 or more"),
        (["--patience", "-2", "--seed", "-1"], "patience is -2, not 0 or more; seed is -1"),
        (["--steps", "0"], "steps is 0, less than 1"),
        (["--al-temperature", "0"], "al_temperature: is 0.0"),
    ],
)
def test_numbers_out_of_range_are_all_named(small_cut: Path, flags: list[str], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        tune._config(parsed(small_cut, *flags), small_cut).check()
    assert said in str(refused.value)


def test_the_temperature_of_eq_16_arrives(small_cut: Path) -> None:
    assert tune._config(parsed(small_cut, "--al-temperature", "2"), small_cut).acquisition.al_temperature == 2.0
    assert tune._config(parsed(small_cut), small_cut).acquisition.al_temperature == 1.0


def test_what_cannot_be_tuned_is_refused_before_anything_is_loaded(small_cut: Path, tmp_path: Path) -> None:
    def refused(*flags: str) -> str:
        with pytest.raises(UsageError) as error:
            tune._source(parsed(small_cut, *flags))
        return str(error.value)

    teacher = ["--baseline", "kd", "-o", str(tmp_path / "kd"), "--teacher"]
    assert "is not whole" in refused(*teacher, str(small_cut))
    assert tune._source(parsed(small_cut, *teacher, str(small_cut.parent / "whole"))) == small_cut
    whole = ["--teacher", str(small_cut.parent / "whole")]
    assert "is not whole" in refused("--teacher", str(small_cut))
    assert "learns from labels alone" in refused("--baseline", "full", "-o", str(tmp_path / "kd"), *whole)
    assert "nothing moves in them" in refused("--no-lora", "--no-supervised-router", *whole)
    config = tune._config(parsed(small_cut, *whole), small_cut)
    assert (config.distill, config.teacher, config.experts) == ("logits", whole[1], "lora")
    assert "is a file" in refused("-o", __file__) and "is a file" in refused("--state", __file__)
    assert "where no file can be made" in refused("-o", f"{__file__}/x")
    assert "lies in the source" in refused("-o", str(small_cut / "sub"))
    for flag in ("--pool", "--held-out"):
        for number in ("0", "-3"):
            assert "give 1 or more" in refused(flag, number)
    assert not (tmp_path / "kd").exists()


def test_a_state_folder_of_the_users_own_keeps_what_else_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for name in (STATE, "latency.json"):
        (tmp_path / "own" / name).write_text("x")
    remove_state(tmp_path / "own")
    assert [one.name for one in (tmp_path / "own").iterdir()] == ["latency.json"]
    (tmp_path / "own" / "latency.json").rename(tmp_path / "own" / STATE)
    remove_state(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_few_held_out_items_are_said_and_none_refused(
    small_cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def task(validation: int) -> list[str]:
        for name, numbers in (("train", range(100, 140)), ("validation", range(validation))):
            lines = "".join(f'{{"q": "{n}", "a": "{n}"}}\n' for n in numbers)
            (tmp_path / f"{name}.jsonl").write_text(lines)
        file = tmp_path / "task.yaml"
        file.write_text(
            "prompt: '{q}'\nanswer: a\nmetric: exact match\nsplits: {train: train.jsonl, validation: validation.jsonl}\n"
        )
        return ["--task", str(file)]

    with pytest.raises(UsageError, match="one of three parts"):
        tune._data(parsed(small_cut, *task(1)))
    tune._tuner(parsed(small_cut, *task(24)), small_cut)
    assert "judge whether the tuned router stays" in "".join(capsys.readouterr())


def test_a_pool_smaller_than_the_file_is_not_its_beginning(small_cut: Path, tmp_path: Path) -> None:
    """A file sorted by length or by date is no sample from its first lines."""
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f'{{"prompt": "{n}", "answer": "x"}}\n' for n in range(400)))
    args = parsed(small_cut, "--pool", "100", "--data", str(file))
    args.task = None
    data = tune._data(args)
    numbers = [int(item.prompt) for item in data.pool]
    assert len(numbers) == 100 and 150 < sum(numbers) / 100 < 250
    assert not {item.prompt for item in (*data.stopping, *data.router)} & {item.prompt for item in data.pool}


def test_few_items_are_held_out_of_a_large_file_and_untested_data_is_said(
    small_cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data.jsonl"

    def sizes(lines: int, held_out: int) -> tuple[int, int, int]:
        file.write_text("".join(f'{{"prompt": "{n}", "answer": "x"}}\n' for n in range(lines)))
        args = parsed(small_cut, "--held-out", str(held_out), "--data", str(file))
        args.task = None
        data = tune._data(args)
        return len(data.pool), len(data.stopping), len(data.router)

    assert sizes(2000, 4) == (1992, 4, 4)
    assert sizes(2000, 256) == (1900, 50, 50)
    assert sizes(2000, 1) == (1998, 1, 1)
    assert sizes(3, 256) == (1, 1, 1)
    assert "no test items are known, so none could be kept out of the pool" in capsys.readouterr().out
    with pytest.raises(UsageError, match="give at least 3"):
        sizes(2, 256)


def test_a_task_without_test_rows_is_tuned_and_this_is_said(
    small_cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f'{{"question": "{n}?", "answer": "so it is\\n#### {n}"}}\n' for n in range(200))
    (tmp_path / "gsm8k_train.jsonl").write_text(rows)
    own = "prompt: '{question}'\nanswer: answer\nmetric: exact match\nsplits: "
    (tmp_path / "own.yaml").write_text(own + "{train: gsm8k_train.jsonl}\n")
    (tmp_path / "empty.yaml").write_text(own + "{train: gsm8k_train.jsonl, test: none.jsonl}\n")
    (tmp_path / "none.jsonl").write_text("\n")

    def data_of(task: Path | str, data: Path | None) -> tuple[TuneData, bool]:
        args = parsed(small_cut)
        args.task, args.data = str(task), data
        found = tune._data(args)
        return found, "no test items are known" in capsys.readouterr().out

    for task, data in (("gsm8k", tmp_path / "gsm8k_train.jsonl"), ("gsm8k", tmp_path), (tmp_path / "own.yaml", None)):
        found, said = data_of(task, data)
        assert said and len(found.pool) == 190 and not found.tests
    with pytest.raises(LeapError, match=r"none\.jsonl: holds no test rows"):
        data_of(tmp_path / "empty.yaml", None)
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "?", "answer": "#### 7"}\n')
    found, said = data_of("gsm8k", tmp_path)
    assert not said and len(found.tests) == 1
    assert data_of("toy-gsm", None)[1] is False


def test_two_results_of_one_cut_do_not_share_a_state(small_cut: Path, tmp_path: Path) -> None:
    def state(*flags: str) -> Path | None:
        return tune._tuner(parsed(small_cut, "--pool", "8", "--held-out", "4", *flags), small_cut).state

    assert state("-o", str(tmp_path / "a")) == tmp_path / "a.tune"
    assert state("-o", str(tmp_path / "b")) == tmp_path / "b.tune"
    assert state() == small_cut.parent / "cut.tune"
    assert state("-o", str(tmp_path / "a"), "--state", str(tmp_path / "own")) == tmp_path / "own"


def test_help_names_every_task() -> None:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    shown = next(action.help for action in parser._actions if action.dest == "task")
    assert shown is not None and all(name in shown for name in (*NAMES, "task file"))


def test_items_of_the_validation_split_are_left_out_of_the_pool(
    small_cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(numbers: range) -> str:
        return "".join(f'{{"q": "{n}", "a": "{n}"}}\n' for n in numbers)

    (tmp_path / "train.jsonl").write_text(lines(range(10)))
    (tmp_path / "validation.jsonl").write_text(lines(range(4, 28)))
    task = tmp_path / "task.yaml"
    task.write_text(
        "prompt: '{q}'\nanswer: a\nmetric: exact match\nsplits: {train: train.jsonl, validation: validation.jsonl}\n"
    )
    args = parsed(small_cut, "--held-out", "4")
    args.task = str(task)
    data = tune._data(args)
    held_out = {item.answer.strip() for item in (*data.stopping, *data.router)}
    assert len(held_out) == 8 and not held_out & {item.answer.strip() for item in data.pool}
    left = 10 - len(data.pool)
    assert left == len(held_out & set("0123456789")) > 0
    assert f"{left} of 10 train items are validation items, too: left out" in capsys.readouterr().out


def test_an_interrupted_end_leaves_nothing_under_the_name_of_the_result(
    small_cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leap_training import tune_result

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_result, "write_overlays", broken)
    args = parsed(small_cut, "-o", str(tmp_path / "out"), "--steps", "1", "--rounds", "1", "--labels", "4", "--pool", "8",
                  "--held-out", "4", "--router-warmup", "0", "--state", str(tmp_path / "state"))  # fmt: skip
    args.json = False
    with pytest.raises(KeyboardInterrupt):
        tune.run(args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]
    monkeypatch.undo()
    tune.run(args)
    assert (tmp_path / "out" / "tune.json").exists() and (tmp_path / "out" / "adapter").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
