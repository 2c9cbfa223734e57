"""Overlays as files: written whole or not at all, named in every report, merged into a plain checkpoint once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from leap_serve.adapter import RouterHead, describe_overlays, write_overlays
from leap_serve.checkpoint import Checkpoint, check_cut
from leap_serve.cli import main
from leap_serve.cut.export import export
from leap_serve.cut.verify import verify
from leap_serve.cut.write import cut
from leap_serve.errors import CheckpointError, LeapError, UnsupportedError, UsageError
from leap_serve.plan import LayerPlan, Plan
from parity import uneven_plan
from synthetic import make, qwen_config, qwen_tensors, read_all

STOCK, OURS = "Qwen3MoeForCausalLM", "LeapQwen3MoeForCausalLM"
EVEN = {0: LayerPlan((0, 2, 5), 2), 1: LayerPlan((1, 3, 7), 2)}
UNEVEN = {0: LayerPlan((0, 2, 5), 2), 1: LayerPlan((1, 3, 4, 7), 2, 2.0)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make(tmp_path / "base", qwen_tensors(), qwen_config())


@pytest.fixture
def done(base: Path, tmp_path: Path) -> Path:
    cut(base, Plan(Checkpoint.open(base).identity(), 8, EVEN), tmp_path / "cut")
    return tmp_path / "cut"


def head(value: float = 1.0, rows: int = 3) -> dict[int, RouterHead]:
    return {1: RouterHead(torch.full((rows, 16), value))}


def adapter(folder: Path, value: float = 0.5, experts: int = 3, alpha: int = 4) -> Path:
    """PEFT's files for both parameters of layer 0, rank 2; every factor is one constant."""
    folder.mkdir(exist_ok=True)
    name = "base_model.model.model.layers.0.mlp.experts.{}lora_{}.weight"
    shapes = {("base_layer.", "A"): (2 * experts, 16), ("base_layer.", "B"): (16, 2 * experts),
              ("", "A"): (2 * experts, 8), ("", "B"): (16, 2 * experts)}  # fmt: skip
    save_file({name.format(*key): torch.full(shape, value) for key, shape in shapes.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha,
              "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def architecture(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["architectures"][0])


def test_overlays_come_and_go(done: Path, tmp_path: Path) -> None:
    before = tree(done)
    shard = (done / "model.safetensors").stat().st_ino
    made = adapter(tmp_path / "made")
    write_overlays(done, router_head=head(), adapter=made, made_by={"seed": 7})
    checkpoint = Checkpoint.open(done)
    check_cut(checkpoint)
    assert architecture(done) == OURS and (done / "model.safetensors").stat().st_ino == shard
    assert {**tree(done), "config.json": b""}.items() >= {**before, "config.json": b""}.items()
    for name in ("router_head.safetensors", "adapter/adapter_model.safetensors"):
        with safe_open(done / name, "pt") as file:
            metadata = file.metadata()
        assert metadata["leap_fingerprint"] == checkpoint.plan.fingerprint  # type: ignore[union-attr]
        assert json.loads(metadata["leap_made_by"]) == {"seed": 7}
    found = describe_overlays(checkpoint)
    assert found["router_head"]["layers"] == [1] and found["adapter"]["layers"] == [0]
    assert (found["adapter"]["rank"], found["adapter"]["alpha"]) == (2, 4)
    write_overlays(done, router_head=head(2.0), adapter=None, made_by={})
    assert float(load_file(done / "router_head.safetensors")["layers.1.weight"].mean()) == 2.0
    assert not (done / "adapter").exists() and architecture(done) == OURS
    write_overlays(done, router_head=None, adapter=None, made_by={})
    assert tree(done) == before and architecture(done) == STOCK
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("parts", [
    (head(rows=4), None, r"cut/router_head\.safetensors: tensor layers\.1\.weight has shape \[4, 16\]"),
    ({5: RouterHead(torch.zeros(3, 16))}, None, r"tensor layers\.5\.weight is for no MoE layer"),
    ({1: RouterHead(torch.zeros(3, 16), torch.zeros(3))}, None, r"layers\.1\.bias replaces nothing"),
    (None, 4, r"cut/adapter/adapter_model\.safetensors: tensor .* has shape \[8, 16\], but layer 0 has 3 experts"),
])  # fmt: skip
def test_parts_that_do_not_fit_leave_the_cut_as_it_was(done: Path, tmp_path: Path, parts: Any) -> None:
    rows, experts, message = parts
    write_overlays(done, router_head=head(), adapter=None, made_by={})
    before = tree(done)
    made = adapter(tmp_path / "made", experts=experts) if experts else None
    with pytest.raises(CheckpointError, match=message):
        write_overlays(done, router_head=rows, adapter=made, made_by={})
    with pytest.raises(CheckpointError, match=r"lacks adapter_config\.json; give a folder that PEFT"):
        write_overlays(done, router_head=None, adapter=done, made_by={})
    assert tree(done) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "cut", "made"}


def test_a_kill_leaves_the_old_parts_or_the_new_never_a_mix(done: Path, tmp_path: Path) -> None:
    for alpha in (1, 2):
        adapter(tmp_path / f"made{alpha}", float(alpha), alpha=alpha)
    script = """
import sys
from pathlib import Path
from leap_serve.adapter import write_overlays
folder, work = map(Path, sys.argv[1:])
print("ready", flush=True)
while True:
    for name in ("made1", None, "made2"):
        write_overlays(folder, router_head=None, adapter=name and work / name, made_by={})
"""
    seen, draw = set(), random.Random(1)
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(done), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.05, 0.3))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        checkpoint = Checkpoint.open(done)
        check_cut(checkpoint)
        alpha = describe_overlays(checkpoint).get("adapter", {}).get("alpha", 0)
        weights = [float(t.mean()) for part in checkpoint.overlays for t in load_file(part).values()]
        assert set(weights) == ({float(alpha)} if alpha else set()), "a mix"
        assert architecture(done) == (OURS if alpha else STOCK)
        seen.add(alpha)
    write_overlays(done, router_head=None, adapter=None, made_by={})
    assert len(seen) > 1, "the kills never hit two states"
    assert not list(tmp_path.glob(".cut.partial-*")), "the next run removes what a killed one left"


def test_standing_in_the_folder(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done)
    write_overlays(Path(), router_head=head(), adapter=None, made_by={})
    assert Path("router_head.safetensors").exists()


def test_export_merges_what_the_format_says(done: Path, tmp_path: Path) -> None:
    write_overlays(done, router_head=head(), adapter=adapter(tmp_path / "made"), made_by={})
    before = load_file(done / "model.safetensors")
    report = export(done, tmp_path / "plain")
    after = load_file(tmp_path / "plain" / "model.safetensors")
    # alpha / r · Σ over rank 2 of 0.5 · 0.5
    for name, tensor in before.items():
        if ".layers.0.mlp.experts." in name:
            torch.testing.assert_close(after[name], tensor + 1.0, rtol=0, atol=0, equal_nan=True)
        elif name == "model.layers.1.mlp.gate.weight":
            assert torch.equal(after[name], torch.ones(3, 16))
        else:
            assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert (report.changed, report.tensors, report.plugin, report.left_out) == (10, len(before), False, [])
    plain = Checkpoint.open(tmp_path / "plain")
    check_cut(plain)
    assert plain.overlays == [] and architecture(plain.folder) == STOCK
    assert plain.manifest is not None and set(plain.manifest["checkpoint"]["exported"]["merged"]) == set(report.merged)
    assert not (tmp_path / "plain" / "adapter").exists()


def test_what_was_merged_is_not_merged_again(base: Path, tmp_path: Path) -> None:
    source, plain = tmp_path / "cut", tmp_path / "plain"
    cut(base, Plan(Checkpoint.open(base).identity(), 8, UNEVEN), source)
    made = adapter(tmp_path / "made")
    write_overlays(source, router_head=None, adapter=made, made_by={})
    assert export(source, plain).plugin is True and architecture(plain) == OURS
    with pytest.raises(CheckpointError, match=r"plain/adapter/.* is merged into these weights already"):
        write_overlays(plain, router_head=None, adapter=made, made_by={"seed": 2})
    write_overlays(plain, router_head=None, adapter=adapter(tmp_path / "other", 0.25), made_by={})
    check_cut(Checkpoint.open(plain))


def test_a_cut_without_tuned_parts_is_exported_as_it_is(
    done: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is after a tuning in which neither router nor experts gained; it still passes for a cut of its base."""
    write_overlays(done, router_head=None, adapter=None, made_by={})
    assert main(["export", str(done), "-o", str(tmp_path / "plain"), "--json"]) == 0
    *said, last = capsys.readouterr().out.splitlines()
    assert "there was nothing to merge" in " ".join(" ".join(said).split())
    report = json.loads(last)
    assert (report["merged"], report["changed"], report["architecture"]) == ([], 0, STOCK)
    assert read_all(tmp_path / "plain") == read_all(done)
    assert Checkpoint.open(tmp_path / "plain").exported == {}
    verify(tmp_path / "plain", base)
    # What was merged before stays on record.
    write_overlays(done, router_head=head(), adapter=None, made_by={})
    once, twice = (Checkpoint.open(Path(export(source, out).out)) for source, out in (
        (done, tmp_path / "once"), (tmp_path / "once", tmp_path / "twice")))  # fmt: skip
    assert once.exported == twice.exported != {}


def test_export_refuses_and_leaves_nothing(done: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no leap\.json: it is not a cut checkpoint"):
        export(tmp_path / "base", tmp_path / "plain")
    write_overlays(done, router_head=head(), adapter=None, made_by={})
    with pytest.raises(UsageError, match="lies in the source"):
        export(done, done / "plain")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UsageError, match="exists and is not empty"):
        export(done, tmp_path / "full")
    (done / "router_head.safetensors").write_bytes((done / "router_head.safetensors").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"router_head\.safetensors: is truncated"):
        export(done, tmp_path / "plain")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "cut", "full"}


def test_commands_name_the_overlays(done: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_overlays(done, router_head=head(), adapter=adapter(tmp_path / "made"), made_by={"seed": 7})

    def leap(*argv: object) -> dict[str, Any]:
        assert main([*map(str, argv), "--json"]) == 0, capsys.readouterr().err
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    names = ["router_head.safetensors", "adapter/adapter_model.safetensors"]
    assert leap("verify", done)["overlays"] == names
    assert leap("verify", done, "--base", base)["overlays"] == names  # the weights are still the base's
    shown = leap("inspect", done)
    assert shown["overlays"] == names and shown["problem"] is None
    assert shown["tuned"]["adapter"]["rank"] == 2 and shown["tuned"]["router_head"]["made_by"] == {"seed": 7}
    assert leap("export", done, "-o", tmp_path / "plain")["architecture"] == STOCK
    assert leap("inspect", tmp_path / "plain")["tuned"] == {}
    with pytest.raises(CheckpointError, match="was exported: what tuning learned is merged"):
        verify(tmp_path / "plain", base)
    (done / "adapter" / "adapter_config.json").unlink()
    assert "adapter_config.json" in leap("inspect", done)["problem"]
    assert main(["verify", str(done)]) == 1


def test_quantised_experts_are_refused(tmp_path: Path) -> None:
    tensors = qwen_tensors()
    for tensor in [name for name in tensors if ".experts." in name]:
        tensors[tensor] = ("F8_E4M3", tensors[tensor][1])
        tensors[f"{tensor}_scale"] = ("F32", (1,))
    base = make(tmp_path / "base", tensors, qwen_config())
    cut(base, Plan(Checkpoint.open(base).identity(), 8, EVEN), tmp_path / "cut")
    before = read_all(tmp_path / "cut")
    with pytest.raises(UnsupportedError, match="is F8_E4M3, into which no adapter can be merged"):
        write_overlays(tmp_path / "cut", router_head=None, adapter=adapter(tmp_path / "made"), made_by={})
    write_overlays(tmp_path / "cut", router_head=head(), adapter=None, made_by={})  # the router is not quantised
    assert read_all(tmp_path / "cut") == before


def test_a_full_disk_leaves_the_cut_as_it_was(done: Path, tmp_path: Path) -> None:
    write_overlays(done, router_head=head(), adapter=None, made_by={})
    before = tree(done)
    script = """
import resource, sys, signal
from pathlib import Path
from leap_serve.adapter import write_overlays
from leap_serve.errors import LeapError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_overlays(Path(sys.argv[1]), router_head=None, adapter=Path(sys.argv[2]), made_by={})
except LeapError as error:
    print(error)
"""
    made = adapter(tmp_path / "made")
    run = subprocess.run([sys.executable, "-c", script, str(done), str(made)], capture_output=True, text=True)
    assert "could not be written (File too large); the checkpoint is as it was" in run.stdout, run.stderr
    assert tree(done) == before


def test_bf16_export_rounds_once(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tuning import tune_at_random

    AutoModelForCausalLM.from_pretrained(family_checkpoint("olmoe"), dtype=torch.bfloat16).save_pretrained(
        tmp_path / "full"
    )
    plan = uneven_plan(tmp_path / "full")
    cut(tmp_path / "full", plan, tmp_path / "cut")
    tuned = tune_at_random(tmp_path / "full", plan, tmp_path / "cut", tmp_path / "made")
    tuned.merge_and_unload().save_pretrained(tmp_path / "theirs")  # fp32
    export(tmp_path / "cut", tmp_path / "plain")
    theirs, ours = (
        load_file(tmp_path / "theirs" / "model.safetensors"),
        load_file(tmp_path / "plain" / "model.safetensors"),
    )
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        wanted = theirs[name].bfloat16()
        assert torch.isclose(tensor.float(), wanted.float(), rtol=2**-7, atol=1e-6).all(), name
        assert (tensor == wanted).float().mean() > 0.99, name


def test_overlays_of_a_missing_cut(tmp_path: Path) -> None:
    with pytest.raises(LeapError, match="no such folder"):
        write_overlays(tmp_path / "none", router_head=head(), adapter=None, made_by={})
    model = make(tmp_path / "model", qwen_tensors(), qwen_config())
    with pytest.raises(CheckpointError, match=r"has no leap\.json: it is not a cut checkpoint"):
        write_overlays(model, router_head=head(), adapter=None, made_by={})
