"""The authors' interface: light to import, refused with the true values, and a recipe like any other underneath."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import leap_serve
from leap_serve import LEAPFramework, ModelConfig
from leap_serve.errors import LeapError, UsageError


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import leap_serve, sys; assert 'leap_serve.framework' not in sys.modules\n"
        "from leap_serve import LEAPFramework, ModelConfig; LEAPFramework(ModelConfig())\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'leap_training', 'leap_vllm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
    with pytest.raises(AttributeError, match="LEAPFrame"):
        leap_serve.LEAPFrame  # noqa: B018


def test_claims_about_the_model_are_checked_before_anything_runs(tmp_path: Path) -> None:
    config = ModelConfig(
        model_type="llama_maverick", num_experts=128, expert_dim=17000000000, target_experts=16, task="toy-gsm"
    )
    with pytest.raises(LeapError) as refused:
        LEAPFramework(config, tmp_path).optimize(model="leap-tiny", num_episodes=500, budget_constraint=0.125)
    for words in (
        "model.type is llama_maverick, the model's is qwen3_moe", "model.num_experts is 128, the model's is 64",
        "model.expert_size is 17,000,000,000, the model's is", "budget_constraint 0.125 of 64 experts is 8",
    ):  # fmt: skip
        assert words in str(refused.value)
    assert not (tmp_path / "run.json").exists() and not (tmp_path / "profile").exists()


def test_what_it_writes_is_a_recipe_and_a_task(tmp_path: Path) -> None:
    """Rows in memory lie in a file afterwards; a wrong claim stops the run before its first stage."""
    rows = [{"ticket": f"nr {n}", "team": "a"} for n in range(3)]
    config = ModelConfig(
        num_experts=63, target_experts=16, task="tickets", prompt="{ticket}: ", answer="team", metric="contains",
        settings={"tune": {"steps": 20}, "pruning": {"ppo_epochs": 2}, "bench": {"kind": "memory"}},
    )  # fmt: skip
    with pytest.raises(LeapError, match=r"model.num_experts is 63"):
        LEAPFramework(config, tmp_path).optimize("leap-tiny", rows, tmp_path / "val.jsonl", num_episodes=30)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["model"] == {"path": "leap-tiny", "num_experts": 63}
    assert recipe["pruning"] == {"target_experts": 16, "meta_episodes": 30, "ppo_epochs": 2}
    assert (recipe["tune"], recipe["bench"]) == ({"steps": 20}, {"kind": "memory"})
    task = yaml.safe_load(Path(recipe["task"]).read_text())
    assert (task["prompt"], task["answer"], task["metric"]) == ("{ticket}: ", "team", "contains")
    assert task["splits"]["validation"] == str(tmp_path / "val.jsonl")
    assert [json.loads(line) for line in Path(task["splits"]["train"]).read_text().splitlines()] == rows


def test_rows_may_be_a_data_set_of_the_hub(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    rows = [{"prompt": "1 + 1 =", "answer": " 2"}, {"prompt": "1 + 2 =", "answer": " 3"}]
    config = ModelConfig(num_experts=63, target_experts=16)
    with pytest.raises(LeapError, match=r"model.num_experts is 63"):
        LEAPFramework(config, tmp_path).optimize("leap-tiny", datasets.Dataset.from_list(rows))
    assert [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()] == rows


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no 'tuen'"):
        LEAPFramework(ModelConfig(settings={"tuen": {}}))
    with pytest.raises(UsageError, match="budget_constraint: is missing"):
        LEAPFramework(ModelConfig(task="toy-gsm"), tmp_path).optimize("leap-tiny")
    with pytest.raises(UsageError, match="task: is missing, and there is no data"):
        LEAPFramework(ModelConfig(target_experts=16), tmp_path).optimize("leap-tiny")
    with pytest.raises(LeapError, match="train row 2: is a str"):
        LEAPFramework(ModelConfig(target_experts=16), tmp_path).optimize("leap-tiny", [{"prompt": "a"}, "b"])  # type: ignore[list-item]
    assert not (tmp_path / "recipe.yaml").exists()
