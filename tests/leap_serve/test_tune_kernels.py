"""What leap tune-kernels tunes of a checkpoint, and what it refuses before anything is measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from leap_kernels.config import default_config
from leap_kernels.tuning import INTERPRETED, Entry, Shape, Table
from leap_serve import cli
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli.tune_kernels import descend, shapes_of, vllm_files
from leap_serve.cut.write import cut
from leap_serve.errors import UsageError
from leap_serve.plan import LayerPlan, Plan
from leap_vllm.compat_contenders import vllm_launches
from leap_vllm.compat_experts import vllm_file_name


@pytest.fixture(scope="module")
def pruned(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE whose layers hold 5, 3, 3 and 3 experts, of 32, 32, 16 and 16 channels."""
    whole = Checkpoint.open(family_checkpoint("qwen3_moe"))
    plans = (
        LayerPlan((0, 2, 3, 5, 7), 2, channels=(tuple(range(32)),) * 5),
        LayerPlan((1, 4, 6), 1, channels=(tuple(range(32)),) * 3),
        LayerPlan((1, 4, 6), 1, channels=(tuple(range(0, 32, 2)),) * 3),
    )
    layers = {layer: plans[min(place, 2)] for place, layer in enumerate(whole.moe_layers)}
    out = tmp_path_factory.mktemp("pruned") / "cut"
    cut(whole.folder, Plan(whole.identity(), whole.num_experts, layers), out)
    return out


def test_every_distinct_shape_once(pruned: Path, family_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(pruned)
    hidden = checkpoint.config["hidden_size"]
    assert len(checkpoint.moe_layers) > 3, "some shape comes twice"
    shapes = {
        Shape(3, hidden, 16, 1, "float16"): len(checkpoint.moe_layers) - 2,
        Shape(3, hidden, 32, 1, "float16"): 1,
        Shape(5, hidden, 32, 2, "float16"): 1,
    }
    assert shapes_of(checkpoint, "float16", 1) == shapes
    assert shapes_of(checkpoint, "float16", 4) == {
        replace(shape, width=shape.width // 4): layers for shape, layers in shapes.items()
    }
    whole = Checkpoint.open(family_checkpoint("qwen3_moe"))
    assert shapes_of(whole, "bfloat16", 1) == {Shape(8, hidden, 32, 2, "bfloat16"): len(whole.moe_layers)}


def test_ranks_hold_whole_experts(pruned: Path, family_checkpoint: Callable[[str], Path]) -> None:
    """Five experts on two ranks are three and two; a plan for run time stands in for the checkpoint's own."""
    checkpoint = Checkpoint.open(pruned)
    hidden, layers = checkpoint.config["hidden_size"], len(checkpoint.moe_layers)
    assert shapes_of(checkpoint, "float16", ranks=2) == {
        Shape(1, hidden, 16, 1, "float16", 2): layers - 2, Shape(1, hidden, 32, 1, "float16", 2): 1,
        Shape(2, hidden, 16, 1, "float16", 2): layers - 2, Shape(2, hidden, 32, 1, "float16", 2): 1,
        Shape(2, hidden, 32, 2, "float16", 2): 1, Shape(3, hidden, 32, 2, "float16", 2): 1,
    }  # fmt: skip
    whole = Checkpoint.open(family_checkpoint("qwen3_moe"))
    plan = Plan(whole.identity(), whole.num_experts, {layer: LayerPlan((0, 3), 2) for layer in whole.moe_layers})
    assert shapes_of(whole, "float16", plan=plan) == {Shape(2, hidden, 32, 2, "float16"): layers}
    assert (
        Shape(2, 64, 32, 2, "float16", 2).file_name("G")
        == "E=2,H=64,I=32,top_k=2,ranks=2,dtype=float16,device_name=G.json"
    )


@pytest.mark.parametrize(
    ("family", "flags", "sentence"),
    [
        ("qwen3_moe", ["--expert-parallel", "9"], "--expert-parallel: 9 ranks do not share 8 experts"),
        ("qwen3_moe", ["--expert-parallel", "0"], "--expert-parallel: 0 ranks do not share 8 experts"),
        ("qwen3_moe", ["--tp", "3"], "--tp: 3 ranks do not share 32 intermediate channels"),
        ("qwen3_moe", ["--tokens", "8", "0"], "--tokens: 0 is not positive"),
        ("gpt_oss", [], "its experts are not plain SiLU·mul"),
        ("qwen3_moe", [], "kernels are measured on a CUDA GPU, and there is none here"),
    ],
)
def test_refusals(
    family: str, flags: list[str], sentence: str, family_checkpoint: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    folder = family_checkpoint(family)
    assert cli.main(["tune-kernels", str(folder), *flags]) in (1, 2)
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said and not (folder / "kernels").exists()


def test_a_plan_for_another_model_is_refused(
    pruned: Path, family_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = family_checkpoint("qwen3_moe")
    assert cli.main(["tune-kernels", str(pruned), "--plan", str(pruned / "leap.json")]) == 2
    assert "layers of 8 experts" in (said := capsys.readouterr().err) and "give a plan made for this model" in said
    assert cli.main(["tune-kernels", str(folder), "--plan", str(pruned / "leap.json"), "--tp", "5"]) == 2
    assert "--tp: 5 ranks do not share 16 intermediate channels" in capsys.readouterr().err


def test_a_folder_that_cannot_hold_tables(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Said before the first measurement; what is damaged is named and left as it is."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    folder = family_checkpoint("qwen3_moe")
    (tmp_path / "file").touch()
    assert cli.main(["tune-kernels", str(folder), "-o", str(tmp_path / "file" / "tables")]) == 2
    assert "cannot be written (Not a directory); name another folder with -o" in capsys.readouterr().err
    (shape,) = shapes_of(Checkpoint.open(folder), "float32", 1)
    damaged = tmp_path / "tables" / shape.file_name("cpu, interpreted")
    damaged.parent.mkdir()
    damaged.write_text("{")
    assert cli.main(["tune-kernels", str(folder), "-o", str(damaged.parent), "--dtype", "float32"]) == 1
    said = capsys.readouterr().err
    assert f"{damaged}: not a table of kernel configurations" in said and "remove that file" in said
    assert damaged.read_text() == "{" and list(damaged.parent.iterdir()) == [damaged]


def test_layers_that_differ_in_top_k_alone_share_vllms_file(tmp_path: Path) -> None:
    """It holds what the most layers run; another checkpoint's launches of the same name are not written over."""
    eight, four = Shape(16, 64, 32, 8, "float16"), Shape(16, 64, 32, 4, "float16")
    name = vllm_file_name(16, 32, "float16")
    assert vllm_files({four: 40, eight: 8}, tmp_path, "A GPU") == {name: [four, eight]}
    assert vllm_files({four: 4, eight: 4}, tmp_path, "A GPU") == {name: [eight, four]}
    entry = Entry(default_config(1, 16, 8, 2), 1.0)
    for other in (replace(eight, hidden=96), replace(eight, dtype="bfloat16")):
        there = Table(other, "A GPU", {1: entry}).save(tmp_path)
        assert vllm_files({replace(eight, dtype="float32"): 1, other: 1}, tmp_path, "A GPU")
        with pytest.raises(UsageError, match=re.escape(f"{there}: vLLM has one file, {name}, for this shape and that")):
            vllm_files({eight: 1}, tmp_path, "A GPU")
        assert vllm_files({eight: 1}, tmp_path, "Another GPU")
        there.unlink()


def test_a_shared_file_is_announced(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before anything is measured; here the tables are there already, so nothing has to be."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    whole = Checkpoint.open(family_checkpoint("qwen3_moe"))
    layers = {layer: LayerPlan((0, 2, 3), 1 + (place == 1)) for place, layer in enumerate(whole.moe_layers)}
    cut(whole.folder, Plan(whole.identity(), whole.num_experts, layers), tmp_path / "cut")
    shapes = shapes_of(Checkpoint.open(tmp_path / "cut"), "float32", 1)
    for shape in shapes:
        Table(shape, INTERPRETED, {1: Entry(default_config(1, 3, 1, 4), 1.0)}).save(tmp_path / "cut" / "kernels")
    command = ["tune-kernels", str(tmp_path / "cut"), "--dtype", "float32", "--tokens", "1"]
    assert cli.main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"will hold the launches of top-1 ({len(layers) - 1} layers), which top-2 (1 layer) must follow" in said


def test_vllms_launches_include_the_one_that_it_ships() -> None:
    """Qwen3-30B-A3B on an H200: vLLM would run the shipped launch of the nearest number of tokens, were ours not there."""
    name = "E=128,N=768,device_name=NVIDIA_H200.json"
    default, shipped = vllm_launches(1000, 128, 2048, 768, 8, name)
    assert shipped == vllm_launches(1024, 128, 2048, 768, 8, name)[1] != default
    assert set(shipped) <= set(default), "a change reaches every field of either"
    assert vllm_launches(1000, 128, 2048, 768, 8, "E=127,N=768,device_name=NVIDIA_H200.json") == [default]


def test_no_start_of_a_descent_is_faster_than_its_end() -> None:
    """From the default alone this landscape's descent ends on the near side of a ridge, at 6 µs."""
    cost = {(0, 0): 7.0, (1, 0): 6.0, (0, 1): 8.0, (1, 1): 9.0, (2, 2): 3.0, (2, 0): 8.0, (0, 2): 8.0, (1, 2): 9.0}

    def measure(launch: Mapping[str, int]) -> float:
        return cost.get((launch["warps"], launch["stages"]), 5.0)

    groups = [[{"warps": n} for n in (0, 1, 2)], [{"stages": n} for n in (0, 1, 2)]]
    default, shipped = {"warps": 0, "stages": 0}, {"warps": 2, "stages": 1}
    assert descend([default], groups, measure) == (6.0, {"warps": 1, "stages": 0})
    assert descend([default, shipped], groups, measure) == (3.0, {"warps": 2, "stages": 2})
    assert descend([shipped, default], [], measure) == (5.0, shipped)
