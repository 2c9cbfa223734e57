"""What a rival of `leap tune` leaves: a cut that leap verifies, of the same names, dtypes and config, or nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cutting import plan_for
from families import COMMON, SPECIFIC, make_checkpoint
from leap_serve.checkpoint import Checkpoint, read_bytes
from leap_serve.cli import main
from leap_serve.cut.write import cut
from leap_serve.errors import CheckpointError, LeapError, UnsupportedError
from leap_training.active_learning import Acquisition
from leap_training.tune import Tuner
from leap_training.tune_result import report_of, write_plain
from parity import uneven_plan
from tiny_tokenizer import add_tokenizer
from tune_runs import DATA, SMALL, tuned

BRIEF = replace(
    SMALL, rounds=1, steps=2, experts="full", rl_router=False, acquisition=Acquisition(strategy="random")
)  # fmt: skip


def set_config(folder: Path, **values: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **values}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture(scope="module")
def rival(tmp_path_factory: pytest.TempPathFactory) -> Tuner:
    """A rival on a bf16 cut in several shards, whose config names the dtype as transformers 4 did."""
    source = cut_of("qwen3_moe", tmp_path_factory.mktemp("rival"), dtype=None, torch_dtype="bfloat16")
    return tuned(source, replace(SMALL, experts="full", rl_router=False))


def test_a_rivals_checkpoint_is_the_cut_with_other_experts_and_routers(
    rival: Tuner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = rival.checkpoint, tmp_path / "out"
    losses = rival.item_losses(DATA.stopping)[0]
    write_plain(rival, source.folder, out, report_of(rival, None), False)
    found = Checkpoint.open(out)
    assert main(["verify", str(out)]) == 0 and "Traceback" not in capsys.readouterr().err
    assert found.config == source.config and found.config["torch_dtype"] == "bfloat16"
    assert len(found.metadata) > 1 and found.weight_bytes == source.weight_bytes
    assert changed_kinds(source, found) == {"expert", "router"}
    again = Tuner(out, DATA, SMALL)
    np.testing.assert_allclose(again.item_losses(DATA.stopping)[0], losses, atol=0.05)


def cut_of(family: str, folder: Path, **settings: Any) -> Path:
    """A bf16 cut of a random model, five of eight experts."""
    whole = add_tokenizer(make_checkpoint(family, folder / "whole", dtype="bfloat16"))
    set_config(whole, **settings)
    cut(whole, plan_for(whole, lambda layer: (0, 2, 3, 5, 7)), folder / "cut", max_shard_bytes=300_000)
    return folder / "cut"


def changed_kinds(before: Checkpoint, after: Checkpoint) -> set[str]:
    """Kinds of the tensors that differ; the two hold the same ones, of the same types."""
    described = [{name: (e.dtype, e.shape) for name, e in one.tensors.items()} for one in (before, after)]
    assert described[0] == described[1]
    names = (name for name, e in after.tensors.items() if read_bytes(e) != read_bytes(before.tensors[name]))
    return {after.role(name).kind for name in names}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_rivals_cut_may_be_uneven(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = add_tokenizer(make_checkpoint(family, tmp_path / "whole", dtype="bfloat16"))
    plan = uneven_plan(whole)
    cut(whole, plan, tmp_path / "cut")
    rival, out = tuned(tmp_path / "cut", BRIEF), tmp_path / "out"
    losses = rival.item_losses(DATA.stopping)[0]
    write_plain(rival, tmp_path / "cut", out, report_of(rival, None), False)
    assert main(["verify", str(out)]) == 0 and "Traceback" not in capsys.readouterr().err
    found = Checkpoint.open(out)
    assert changed_kinds(rival.checkpoint, found) == {"router", "expert" if family == "qwen3_moe" else "fused"}
    assert found.plan == plan and found.config == rival.checkpoint.config
    np.testing.assert_allclose(Tuner(out, DATA, SMALL).item_losses(DATA.stopping)[0], losses, atol=0.05)


def test_a_cut_that_is_damaged_or_not_the_tuned_one_leaves_nothing(rival: Tuner, tmp_path: Path) -> None:
    source, out = shutil.copytree(rival.checkpoint.folder, tmp_path / "source"), tmp_path / "out"
    other = cut_of("mixtral", tmp_path / "other")

    def refused(folder: Path, error: type[LeapError], words: str) -> None:
        with pytest.raises(error, match=words):
            write_plain(rival, folder, out, {}, False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "source"]

    shard = next(source.glob("model-00002-of-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    refused(source, CheckpointError, "is truncated")
    shard.write_bytes(content)
    set_config(source, leap_fingerprint="0" * 64)
    refused(source, CheckpointError, "belongs to another cut")
    refused(other, LeapError, "has nothing of this name where transformers holds model.layers")


def test_a_damaged_rivals_checkpoint_is_refused(
    rival: Tuner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plain(rival, rival.checkpoint.folder, tmp_path / "out", {}, False)
    shard = next((tmp_path / "out").glob("model-00001-of-*"))
    save_file(load_file(shard), shard, metadata={"format": "pt"})
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert "has fingerprint None" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "glm4_moe"])
def test_every_form_of_experts_takes_its_place_in_the_cut(family: str, tmp_path: Path) -> None:
    """Single and fused experts, biases, correction biases."""
    source = cut_of(family, tmp_path)
    tuner = tuned(source, BRIEF)
    write_plain(tuner, source, tmp_path / "out", {}, False)
    kinds = changed_kinds(Checkpoint.open(source), Checkpoint.open(tmp_path / "out"))
    assert kinds == {"router", "fused" if family in ("gpt_oss", "llama4_text") else "expert"}


def test_what_transformers_does_not_read_stays_beside_the_tuned_text_model(tmp_path: Path) -> None:
    """Llama 4 with its vision tower: transformers holds the text model alone, under other names."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    tower = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vision_output_dim=32,
        image_size=28, patch_size=14, projector_input_dim=32, projector_output_dim=32,
    )  # fmt: skip
    text = {**COMMON, **SPECIFIC["llama4_text"]}
    model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=tower))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    whole = add_tokenizer(tmp_path / "whole")
    cut(whole, plan_for(whole, lambda layer: (0, 2, 3, 5, 7)), tmp_path / "cut")
    write_plain(tuned(tmp_path / "cut", BRIEF), tmp_path / "cut", tmp_path / "out", {}, False)
    before, after = Checkpoint.open(tmp_path / "cut"), Checkpoint.open(tmp_path / "out")
    assert any(name.startswith("vision_model.") for name in after.tensors)
    assert changed_kinds(before, after) == {"router", "fused"} and after.config == before.config


def test_a_quantised_cut_is_refused_before_the_run(rival: Tuner, tmp_path: Path) -> None:
    source = shutil.copytree(rival.checkpoint.folder, tmp_path / "source")
    entry = next(e for name, e in Checkpoint.open(source).tensors.items() if ".experts.2." in name)
    tensors, metadata = load_file(entry.file), Checkpoint.open(source).metadata[entry.file.name]
    tensors[entry.name] = tensors[entry.name].to(torch.float8_e4m3fn)
    save_file(tensors, entry.file, metadata=dict(metadata))
    with pytest.raises(UnsupportedError, match=r"is quantised \(.*experts\.2.* is F8_E4M3\)"):
        Tuner(source, DATA, BRIEF)
