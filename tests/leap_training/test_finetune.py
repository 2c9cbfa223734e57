"""Plain fine-tuning of cuts that only our plugin serves: the plan stays, experts and routers move, the loss falls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from families import make_checkpoint
from leap_serve.adapter import RouterHead, write_overlays
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
from leap_training.finetune import main as run_finetune
from leap_training.tune import Tuner
from parity import merging_plan, uneven_plan
from synthetic import make, qwen_config, qwen_tensors
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


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded to be trained; nothing is."""
    loaded: list[str] = []
    monkeypatch.setattr("leap_training.finetune.load_model", lambda source, _dtype: loaded.append(source.folder.name))
    return loaded


def test_what_could_not_be_written_is_refused_before_it_is_loaded(
    trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = add_tokenizer(make_checkpoint("qwen3_moe", tmp_path / "whole", dtype="bfloat16"))
    packed = {n: ("F8_E4M3" if ".mlp.experts." in n else kind, shape) for n, (kind, shape) in qwen_tensors().items()}
    make(tmp_path / "packed", packed, qwen_config())
    cut(whole, uneven_plan(whole), tmp_path / "tuned")
    source = Checkpoint.open(tmp_path / "tuned")
    head = RouterHead(torch.zeros(source.experts_in(1), int(source.config["hidden_size"])), None)
    write_overlays(tmp_path / "tuned", router_head={1: head}, adapter=None, made_by={})
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    for name, out, flags, status, words in (
        ("whole", "there", [], 2, "there: exists and is not empty; choose another --out, or pass --force to replace it"),
        ("whole", "whole", ["--force"], 2, "lies in the source"),
        ("whole", "whole/in", [], 2, "lies in the source"),
        ("packed", "out", [], 1, "packed: is quantised (model.layers.0.mlp.experts."),
        ("tuned", "out", [], 1, "is tuned for the experts of this cut and would not fit another; merge it with leap export"),
    ):  # fmt: skip
        line = [str(tmp_path / name), "--task", "toy-gsm", "--out", str(tmp_path / out), *flags]
        monkeypatch.setattr("sys.argv", ["finetune", *line])
        with pytest.raises(SystemExit) as ended:
            run_finetune()
        assert (ended.value.code, words in capsys.readouterr().err) == (status, True), words
    assert (tmp_path / "there" / "file").read_text() == "mine" and trained == []
    assert (
        main(
            [
                "search",
                str(tmp_path / "tuned"),
                "--method",
                "naee",
                "--experts",
                "2",
                "--task",
                "toy-gsm",
                "-o",
                str(tmp_path / "p.json"),
            ]
        )
        == 1
    )
    assert "merge it with leap export first" in capsys.readouterr().err and not (tmp_path / "p.json").exists()


def test_a_full_model_keeps_its_config_and_names(tmp_path: Path) -> None:
    whole = add_tokenizer(make_checkpoint("qwen2_moe", tmp_path / "whole", dtype="bfloat16"))
    finetune(whole, "toy-gsm", tmp_path / "out", BRIEF)
    before, after = Checkpoint.open(whole), Checkpoint.open(tmp_path / "out")
    assert after.config == before.config and set(after.tensors) == set(before.tensors)
    assert (tmp_path / "out" / "finetune.json").exists() and after.manifest is None
