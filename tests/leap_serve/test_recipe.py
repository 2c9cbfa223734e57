"""Recipes: what is refused, all at once, and the verbs a good one becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from leap_serve.cli import main
from leap_serve.cli.run import check_flags
from leap_serve.errors import LeapError, UsageError
from leap_serve.recipe import CHANNEL_SUMS, Recipe

GOOD = """
model: leap-tiny
task: toy-gsm
profile: {limit: 16}
search: {method: reap, experts: 16}
cut: {max_shard_size: 1GB}
eval: {limit: 8}
bench: {kind: latency, batch: [1, 2], rounds: 1}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_becomes_verbs(tmp_path: Path) -> None:
    stages = Recipe.load(write(tmp_path, GOOD)).plan_of_work(Path("out"))
    assert [stage.name for stage in stages] == ["profile", "search", "cut", "eval", "bench"]
    assert stages[0].argv == (
        "profile",
        "leap-tiny",
        "--task",
        "toy-gsm",
        "--out",
        "out/profile",
        "--force",
        "--limit",
        "16",
    )
    assert stages[2].argv[-2:] == ("--max-shard-size", "1GB")
    assert stages[4].argv[:3] == ("bench", "latency", "out/checkpoint")
    assert "--batch 1 2" in " ".join(stages[4].argv)


def test_a_search_that_reads_weights_gets_the_model(tmp_path: Path) -> None:
    for method, source in (("magnitude", "leap-tiny"), ("reap", "out/profile")):
        stages = Recipe.load(write(tmp_path, GOOD.replace("method: reap", f"method: {method}"))).plan_of_work(
            Path("out")
        )
        assert stages[1].argv[:2] == ("search", source)


def test_an_agents_search_gets_its_task_and_a_state_of_its_own(tmp_path: Path) -> None:
    text = GOOD.replace("method: reap", "method: leap")
    search = Recipe.load(write(tmp_path, text)).plan_of_work(Path("out"))[1]
    assert search.argv[1:6] == ("out/profile", "--out", "out/plan.json", "--force", "--task")
    state = search.argv[search.argv.index("--state") + 1]
    assert state.startswith("out/search/")
    other = Recipe.load(write(tmp_path, text.replace("experts: 16", "experts: 8"))).plan_of_work(Path("out"))[1]
    assert other.argv[other.argv.index("--state") + 1] != state
    assert "--state" not in Recipe.load(write(tmp_path, GOOD)).plan_of_work(Path("out"))[1].argv


def test_keys_follow_from_everything_before(tmp_path: Path) -> None:
    one = Recipe.load(write(tmp_path, GOOD)).plan_of_work(Path("out"))
    two = Recipe.load(write(tmp_path, GOOD.replace("experts: 16", "experts: 8"))).plan_of_work(Path("out"))
    assert one[0].key == two[0].key
    assert all(a.key != b.key for a, b in zip(one[1:], two[1:], strict=True))


def test_what_is_tuned_is_what_comes_after(tmp_path: Path) -> None:
    text = GOOD.replace("cut:", "tune: {steps: 40, no-lora: true}\ncut:")
    stages = {one.name: one.argv for one in Recipe.load(write(tmp_path, text)).plan_of_work(Path("out"))}
    assert list(stages) == ["profile", "search", "cut", "tune", "eval", "bench"]
    tune = stages["tune"]
    assert tune[:6] == ("tune", "out/checkpoint", "--task", "toy-gsm", "--out", "out/tuned")
    assert tune[tune.index("--steps") + 1] == "40" and "--no-lora" in tune and "true" not in tune
    assert tune[tune.index("--state") + 1].startswith("out/tune/")
    assert stages["eval"][1] == stages["bench"][2] == "out/tuned"
    more = "export:\nload: {limit: 9}\n"
    stages = {one.name: one.argv for one in Recipe.load(write(tmp_path, text + more)).plan_of_work(Path("out"))}
    assert stages["export"][:4] == ("export", "out/tuned", "--out", "out/plain")
    assert stages["eval"][1] == stages["bench"][2] == "out/plain"
    assert stages["load"] == (
        "profile",
        "out/plain",
        "--task",
        "toy-gsm",
        "--out",
        "out/load",
        "--force",
        "--limit",
        "9",
    )


def test_the_router_pays_what_the_search_measured(tmp_path: Path) -> None:
    text = GOOD.replace("method: reap", "method: leap, lambda: 0.1") + "tune: {latency-coef: 0.2}\n"
    stages = {one.name: one.argv for one in Recipe.load(write(tmp_path, text)).plan_of_work(Path("out"))}
    state = stages["search"][stages["search"].index("--state") + 1]
    assert stages["tune"][stages["tune"].index("--latency") + 1] == f"{state}/latency.json"
    with pytest.raises(LeapError, match=r"tune.latency-coef needs search.method leap and search.lambda"):
        Recipe.load(write(tmp_path, text.replace(", lambda: 0.1", "")))


def test_other_data_under_the_same_name_is_other_work(tmp_path: Path) -> None:
    text = GOOD.replace("task: toy-gsm", "data: train.jsonl").replace("eval: {limit: 8}", "")
    recipe = write(tmp_path, text)
    with pytest.raises(LeapError, match=r"train.jsonl: the file does not exist"):
        Recipe.load(recipe).plan_of_work(Path("out"))
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n')
    one = Recipe.load(recipe).plan_of_work(Path("out"))
    data.write_text('{"prompt": "a", "answer": "c"}\n')
    two = Recipe.load(recipe).plan_of_work(Path("out"))
    assert all(a.argv == b.argv and a.key != b.key for a, b in zip(one, two, strict=True))


def test_the_gate_is_an_evaluation_against_the_full_model(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text("checks: []")
    stages = Recipe.load(write(tmp_path, GOOD + "gate: {file: gate.yaml, engine: torch}\n")).plan_of_work(Path("out"))
    assert [one.name for one in stages][-2:] == ["gate", "bench"]
    assert stages[-2].argv == (
        "eval", "out/checkpoint", "--vs", "leap-tiny", "--out", "out/gate.json", "--gate", str(tmp_path / "gate.yaml"),
        "--engine", "torch",
    )  # fmt: skip
    plain = Recipe.load(write(tmp_path, GOOD)).plan_of_work(Path("out"))
    assert [one.key for one in plain[:4]] == [one.key for one in stages[:4]], "a gate makes nothing before it anew"
    with pytest.raises(LeapError, match=r"gate\.file is missing"):
        Recipe.load(write(tmp_path, GOOD + "gate: {}\n"))


def test_a_task_file_is_found_from_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text('prompt: "{q}"\nanswer: a\nmetric: exact match\nsplits: {train: rows.jsonl}\n')
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "1", "a": "2"}\n')
    recipe = write(
        tmp_path, GOOD.replace("toy-gsm", "mine.yaml").replace("{limit: 8}", "{task: [mine.yaml, toy-xsum]}")
    )
    stages = Recipe.load(recipe).plan_of_work(Path("out"))
    assert stages[0].argv[2:4] == ("--task", str(tmp_path / "mine.yaml"))
    assert stages[3].argv[-4:] == ("--task", str(tmp_path / "mine.yaml"), "--task", "toy-xsum")
    rows.write_text('{"q": "1", "a": "3"}\n')
    assert all(a.key != b.key for a, b in zip(stages, Recipe.load(recipe).plan_of_work(Path("out")), strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\ntask: t\nprofile: {}\nsearch: {}\ncut: {}\nexport: {}", "export needs tune"),
        (
            "model: m\ntask: t\nprofile: {}\nsearch: {}\ncut: {}\ntune: {baseline: full}\nexport:",
            "export has nothing to merge after tune.baseline full, which writes whole weights: leave it out",
        ),
        ("model: m\ntask: t\nprofile: {task: x}", "profile.task is set by the run itself"),
        ("[1]", "not a mapping"),
        ("model: [", "not readable YAML"),
        ("model: leap-tiny\nprofile: {}", "either task or data"),
        ("task: toy-gsm\nprofile: {}", "model is missing"),
        ("model: m\ntask: t\nprofil: {}", "unknown key 'profil'; no stage is given"),
        ("model: m\ntask: t\ncut: {}", "cut needs search"),
        ("model: m\ntask: t\nprofile: {out: x}", "profile.out is set by the run itself"),
        ("model: m\ntask: t\nprofile: 3", "profile is not a mapping"),
        ("model: m\ndata: d\nprofile: {}\nsearch: {}\ncut: {}\neval: {}", "eval needs a task"),
        ("model: m\ndata: d\nprofile: {}\nsearch: {method: leap}", "search.method leap needs a task"),
        (
            "model: m\ntask: t\nprofile: {}\nsearch: {method: intra, budget: 0.5}",
            r"search.method intra needs channel sums: give profile: \{channels: true\}",
        ),
        (
            "model: m\ndata: d\nprofile: {limit: 9, channels: false}\nsearch: {method: moe-pruner, zero: row}",
            r"recipe.yaml: search.method moe-pruner needs channel sums: give profile: \{channels: true\};",
        ),
        ("model: m\ntask: t\nprofile: {}\nsearch: {experts: [8, 16]}", "search.experts lists several budgets"),
        ("model: m\ntask: t\nprofile: {}\nsearch: {state: s}", "search.state is set by the run itself"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LeapError, match=message):
        Recipe.load(write(tmp_path, text))


def test_searches_that_look_at_a_task_are_refused_where_there_is_data_only(tmp_path: Path) -> None:
    from leap_training.methods.registry import CHANNELWISE, METHODS

    assert CHANNEL_SUMS == CHANNELWISE
    refused = []
    for method in METHODS:
        text = f"model: m\nprofile: {{channels: true}}\nsearch: {{method: {method.name}, experts: 4}}\n"
        Recipe.load(write(tmp_path, f"{text}task: t\n"))
        try:
            Recipe.load(write(tmp_path, f"{text}data: d\n"))
        except LeapError as error:
            assert f"search.method {method.name} needs a task: give task in place of data" in str(error)
            refused.append(method.name)
    assert refused == [method.name for method in METHODS if "items" in method.source]
    assert {"naee", "naee-progressive", "moe-i2", "hc-smoe", "tsep", "eep", "leap", "rco"} < set(refused)


def test_switches_that_are_on_are_turned_off_by_false(tmp_path: Path) -> None:
    tune = "tune: {supervised_router: false, active-learning: false, no-lora: false, checkpointing: true}\n"
    argv = Recipe.load(write(tmp_path, GOOD + tune)).plan_of_work(Path("out"))[3].argv
    assert [word for word in argv if word.startswith("--no-") or word == "--checkpointing"] == [
        "--no-supervised-router", "--no-active-learning", "--checkpointing",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tune: {roundz: 4}", "stage tune: unrecognized arguments: --roundz 4; correct the recipe"),
        ("tune: {rounds: many}", "stage tune: argument --rounds: invalid int value: 'many'"),
        ("load: {limit: 1.5}", "stage load: argument --limit"),
        ("search: {method: reap, experts: 16, zero: row}", "stage search: --zero means nothing to reap; leave it out"),
        ("search: {method: reap, experts: 16, episodes: 10}", "stage search: --episodes means nothing to reap"),
    ],
)
def test_flags_that_a_verb_does_not_take_are_refused_before_the_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, said: str
) -> None:
    good = "".join(line for line in GOOD.splitlines(True) if line.partition(":")[0] != change.partition(":")[0])
    path, out = write(tmp_path, f"{good}{change}\n"), tmp_path / "run"
    with pytest.raises(UsageError, match=said):
        check_flags(Recipe.load(path).plan_of_work(out))
    assert main(["run", str(path), "-o", str(out)]) == 2 and said in capsys.readouterr().err
    assert not list(out.iterdir())


def test_a_search_that_keeps_a_state_gets_a_place_for_it(tmp_path: Path) -> None:
    for method, keeps in (("evolution", True), ("tsep", True), ("lexi", True), ("frequency", False)):
        argv = (
            Recipe.load(write(tmp_path, GOOD.replace("method: reap", f"method: {method}")))
            .plan_of_work(Path("out"))[1]
            .argv
        )
        assert ("--state" in argv) is keeps, method
