"""Recipes: what is refused, all at once, and the verbs a good one becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from leap_serve.errors import LeapError
from leap_serve.recipe import Recipe

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


@pytest.mark.parametrize(
    ("text", "message"),
    [
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
        ("model: m\ntask: t\nprofile: {}\nsearch: {experts: [8, 16]}", "search.experts lists several budgets"),
        ("model: m\ntask: t\nprofile: {}\nsearch: {state: s}", "search.state is set by the run itself"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LeapError, match=message):
        Recipe.load(write(tmp_path, text))
