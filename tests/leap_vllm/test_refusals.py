"""A damaged or contradictory checkpoint is refused in real vLLM, with a sentence, before anything is served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from leap_serve.cut.write import cut
from leap_serve.plan import LayerPlan, Plan
from parity import uneven_plan
from serving import Job, Served, serve

pytestmark = pytest.mark.e2e
Damage = Callable[[Path], Any]


def edit(name: str, **values: Any) -> Damage:
    """Set keys of a JSON file; a value that is callable gets the old one."""

    def damage(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text())
        for key, value in values.items():
            found[key] = value(found[key]) if callable(value) else value
        path.write_text(json.dumps(found))

    return damage


def shard_of(folder: Path) -> Path:
    return sorted(folder.glob("model*.safetensors"))[0]


def rewrite(change: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None, **metadata: str) -> Damage:
    """Write the shard again with other tensors or other metadata."""

    def damage(folder: Path) -> None:
        path = shard_of(folder)
        with safe_open(path, "pt") as file:
            before = file.metadata()
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={**before, **metadata})

    return damage


def head(fingerprint: str | None = None, rows: int | None = None) -> Damage:
    """Add a router head for layer 0, with the plan's fingerprint and row count unless told otherwise."""

    def damage(folder: Path) -> None:
        plan = Plan.load(folder / "leap.json")
        weight = torch.zeros(rows or plan.counts[0], 64)
        metadata = {"leap_fingerprint": fingerprint or plan.fingerprint}
        save_file({"layers.0.weight": weight}, folder / "router_head.safetensors", metadata=metadata)

    return damage


def adapter_for(experts: int) -> Damage:
    """Add an adapter on layer 0's down_proj as PEFT writes it, made for that many experts."""

    def damage(folder: Path) -> None:
        (folder / "adapter").mkdir()
        name = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
        tensors = {name.format("A"): torch.zeros(2 * experts, 32), name.format("B"): torch.zeros(64, 2 * experts)}
        metadata = {"leap_fingerprint": Plan.load(folder / "leap.json").fingerprint}
        save_file(tensors, folder / "adapter" / "adapter_model.safetensors", metadata=metadata)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.down_proj"]}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    return damage


def narrow(name: str, dimension: int, length: int) -> Damage:
    """Shorten one tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].narrow(dimension, 0, length).contiguous()

    return rewrite(change)


def truncate(folder: Path) -> None:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes()[:-100])


def other_top_k(old: dict[str, int]) -> dict[str, int]:
    return {**old, "1": 3}  # layer 1 retains 2


STOCK = "Qwen3MoeForCausalLM"
CASES: dict[str, tuple[str, Damage, dict[str, Any], str]] = {
    "unknown format_version": ("qwen3_moe", edit("leap.json", format_version=99), {}, "leap.json: format_version is 99, this leap-serve reads 1 and 2; update leap-serve"),
    "fewer experts than top_k": ("qwen3_moe", edit("leap.json", top_k=other_top_k), {}, "leap.json: layer 1 retains 2 experts but its top_k is 3; cut again, or set top_k[1] to 2"),
    "plan edited by hand": ("qwen3_moe", edit("leap.json", temperature=lambda old: {**old, "2": 9.0}), {}, "leap.json: says fingerprint"),
    "config of another cut": ("qwen3_moe", edit("config.json", leap_fingerprint="beef"), {}, "config.json: has fingerprint beef"),
    "shard of another cut": ("qwen3_moe", rewrite(leap_fingerprint="beef"), {}, ".safetensors: has fingerprint beef"),
    "router head of another cut": ("qwen3_moe", head("beef"), {}, "router_head.safetensors: has fingerprint beef"),
    "router head of a wrong shape": ("qwen3_moe", head(rows=3), {}, "router_head.safetensors: tensor layers.0.weight has shape [3, 64], but layer 0 has 5 experts"),
    "adapter without its weights": ("qwen3_moe", lambda folder: (folder / "adapter").mkdir(), {}, "adapter: has no adapter_model.safetensors"),
    "adapter of another cut": ("qwen3_moe", adapter_for(3), {}, "experts.lora_A.weight has shape [6, 32], but layer 0 has 5 experts and down_proj [5, 64, 32], at rank 2"),
    "adapter twice": ("qwen3_moe", adapter_for(5), {"enable_lora": True}, "--enable-lora: would apply adapters on top of adapter/adapter_model.safetensors"),
    "no leap.json": ("qwen3_moe", lambda folder: (folder / "leap.json").unlink(), {}, "has no leap.json, without which architecture LeapQwen3MoeForCausalLM cannot be served"),
    "truncated shard": ("qwen3_moe", truncate, {}, ".safetensors: "),
    "missing shard": ("qwen3_moe", lambda folder: shard_of(folder).unlink(), {}, ".safetensors: is missing, model.safetensors.index.json names it"),
    "router of a wrong shape": ("qwen3_moe", narrow("model.layers.0.mlp.gate.weight", 0, 4), {}, "tensor model.layers.0.mlp.gate.weight has shape [4, 64], but layer 0 has 5 experts"),
    "expert of a wrong shape": ("qwen3_moe", narrow("model.layers.0.mlp.experts.1.up_proj.weight", 1, 60), {}, "model.layers.0.mlp.experts.1.up_proj.weight has shape [32, 60], which does not go with [32, 64] of model.layers.0.mlp.experts.0.up_proj.weight"),
    "fused experts of a wrong shape": ("gpt_oss", narrow("model.layers.0.mlp.experts.down_proj", 0, 4), {}, "tensor model.layers.0.mlp.experts.down_proj has shape [4, 64, 64], but layer 0 has 5 experts"),
    "groups that do not divide": ("glm4_moe", edit("config.json", n_group=2), {}, "layer 1 retains 5 experts, its router picks 2 of them from 1 of 2 equal groups"),
    "stock name, uneven plan": ("qwen3_moe", edit("config.json", architectures=[STOCK]), {"load_format": "leap"}, "architecture Qwen3MoeForCausalLM cannot hold a plan whose layers differ"),
    "stock name, router head": ("even", head(), {"load_format": "leap"}, "architecture Qwen3MoeForCausalLM would be served without router_head.safetensors"),
    "full model, router head": ("full", lambda folder: save_file({"x": torch.zeros(1)}, folder / "router_head.safetensors"), {"load_format": "leap"}, "router_head.safetensors: lies beside a checkpoint that has no leap.json"),
}  # fmt: skip


def even_plan(folder: Path) -> Plan:
    """Four experts in every layer and nothing else that stock vLLM cannot hold."""
    uneven = uneven_plan(folder)
    layers = {layer: LayerPlan((0, 2, 3, 7), 2) for layer in uneven.layers}
    return Plan(uneven.base, uneven.num_experts, layers)


@pytest.fixture(scope="module")
def refused(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """Each damaged checkpoint, given to real vLLM by one child process."""
    work = tmp_path_factory.mktemp("refusals")
    sources = {}
    for name in ("qwen3_moe", "gpt_oss", "glm4_moe"):
        sources[name] = work / f"sound-{name}"
        cut(family_checkpoint(name), uneven_plan(family_checkpoint(name)), sources[name])
    qwen = family_checkpoint("qwen3_moe")
    cut(qwen, even_plan(qwen), work / "sound-even")
    sources |= {"even": work / "sound-even", "full": qwen}
    jobs = []
    for number, (source, damage, args, _) in enumerate(CASES.values()):
        folder = work / str(number)
        shutil.copytree(sources[source], folder)
        damage(folder)
        jobs.append(Job(str(folder), [[5, 6, 7]], args))
    return dict(zip(CASES, serve(jobs), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_sentence(refused: dict[str, Served], case: str) -> None:
    got = refused[case]
    assert CASES[case][3] in got.message, got
    assert got.error in ("CheckpointError", "PlanError", "UnsupportedError")
