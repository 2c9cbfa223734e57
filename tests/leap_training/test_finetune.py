"""Plain fine-tuning of cuts that only our plugin serves: the plan stays, experts and routers move, the loss falls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from families import make_checkpoint
from leap_serve.checkpoint import Checkpoint, read_bytes
from leap_serve.cli import main
from leap_serve.cut.verify import verify
from leap_serve.cut.write import cut
from leap_serve.engine import mean_loss
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.errors import CheckpointError, UnsupportedError
from leap_serve.plan import Plan
from leap_serve.tasks.registry import load_task
from leap_training.finetune import FinetuneConfig, finetune
from leap_training.tune import Tuner
from parity import merging_plan, uneven_plan
from tiny_tokenizer import add_tokenizer
from tune_runs import DATA, SMALL

BRIEF = FinetuneConfig(items=8, steps=6, batch=4, lr=1e-2)


def planned(form: str, whole: Path) -> Plan:
    if form == "skip":
        plan = uneven_plan(whole)
        return replace(
            plan, layers={i: replace(one, skip=0.5) if one.top_k > 1 else one for i, one in plan.layers.items()}
        )
    return merging_plan(whole, "ids" if form == "ids" else "probabilities")


@pytest.mark.parametrize(("family", "form"), [
    ("qwen3_moe", "skip"), ("qwen3_moe", "ids"), ("olmoe", "probabilities"), ("llama4_text", "ids"), ("gpt_oss", "ids"),
])  # fmt: skip
def test_a_cut_of_our_own_form_is_tuned_as_it_is(
    family: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = add_tokenizer(make_checkpoint(family, tmp_path / "whole", dtype="bfloat16"))
    plan = planned(form, whole)
    cut(whole, plan, tmp_path / "cut")
    finetune(tmp_path / "cut", "toy-gsm", tmp_path / "out", BRIEF)
    before, after = Checkpoint.open(tmp_path / "cut"), Checkpoint.open(tmp_path / "out")
    assert after.plan == plan and after.config == before.config
    verify(tmp_path / "out")
    assert after.trained["report"] == "finetune.json" and not before.trained
    assert after.identity().sha256 != before.identity().sha256
    with pytest.raises(CheckpointError, match=r"was trained \(finetune.json\)"):
        verify(tmp_path / "out", whole)
    assert main(["inspect", str(tmp_path / "out")]) == 0 and "trained as a whole by" in capsys.readouterr().out
    kinds = {
        after.role(name).kind for name, e in after.tensors.items() if read_bytes(e) != read_bytes(before.tensors[name])
    }
    assert kinds == {"router", "fused" if family in ("gpt_oss", "llama4_text") else "expert"}
    items = load_task("toy-gsm").items("train", BRIEF.items, seed=BRIEF.seed)
    losses = [
        mean_loss(TorchEngine(tmp_path / name, dtype="float32", device="cpu").score(items)) for name in ("cut", "out")
    ]
    assert losses[1] < losses[0] - 0.05


def test_leap_tune_refuses_what_its_routing_agent_cannot_be(tmp_path: Path) -> None:
    whole = add_tokenizer(make_checkpoint("qwen3_moe", tmp_path / "whole", dtype="bfloat16"))
    priced = replace(SMALL, router=replace(SMALL.router, latency_coef=0.1))
    for form, config, words in (
        ("probabilities", SMALL, "maps its router's probabilities to merged experts"), ("skip", priced, "merges or skips"),
    ):  # fmt: skip
        cut(whole, planned(form, whole), tmp_path / form)
        with pytest.raises(UnsupportedError, match=words):
            Tuner(tmp_path / form, DATA, config)


def test_a_full_model_keeps_its_config_and_names(tmp_path: Path) -> None:
    whole = add_tokenizer(make_checkpoint("qwen2_moe", tmp_path / "whole", dtype="bfloat16"))
    finetune(whole, "toy-gsm", tmp_path / "out", BRIEF)
    before, after = Checkpoint.open(whole), Checkpoint.open(tmp_path / "out")
    assert after.config == before.config and set(after.tensors) == set(before.tensors)
    assert (tmp_path / "out" / "finetune.json").exists() and after.manifest is None
