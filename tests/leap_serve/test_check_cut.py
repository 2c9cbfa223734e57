"""A cut against its manifest: the loader refuses whatever leap.json does not vouch for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leap_serve.checkpoint import Checkpoint, check_cut
from leap_serve.cut.write import cut
from leap_serve.errors import CheckpointError, LeapError
from leap_serve.plan import LayerPlan, Plan
from synthetic import make, qwen_config, qwen_tensors, read_safetensors, write_safetensors

Break = Callable[[Path], Any]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return make(tmp_path / "whole", qwen_tensors(), qwen_config())


def _config(folder: Path, **change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | change).items() if v != "absent"}))


@pytest.fixture
def done(whole: Path, tmp_path: Path) -> Path:
    base = Checkpoint.open(whole).identity()
    plan = Plan(base, 8, {0: LayerPlan((0, 2, 5), 2), 1: LayerPlan((1, 3, 4, 7), 2, 2.0)})
    cut(whole, plan, tmp_path / "cut")
    check_cut(Checkpoint.open(tmp_path / "cut"))
    return tmp_path / "cut"


def _metadata(path: Path, fingerprint: str) -> None:
    parts = read_safetensors(path)
    specs = {name: (dtype, shape) for name, (dtype, shape, _) in parts.items()}
    content = {name: blob for name, (_, _, blob) in parts.items()}
    write_safetensors(path, specs, {"format": "pt", "leap_fingerprint": fingerprint}, content)


def _overlay(
    folder: Path, name: str, fingerprint: str | None = None, rows: int = 3, layer: int = 0, tensor: str = "weight"
) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    own = json.loads((folder / "leap.json").read_text())["fingerprint"]
    metadata = {"leap_fingerprint": fingerprint or own}
    write_safetensors(path, {f"layers.{layer}.{tensor}": ("F32", (rows, 16))}, metadata)


def _adapter(folder: Path, rank: int = 2, layer: int = 0, config: dict[str, Any] | None = None, **shapes: Any) -> None:
    """PEFT's files for the down_proj [3, 16, 8] of layer 0, written without PEFT."""
    shapes = {"A": (rank * 3, 8), "B": (16, rank * 3)} | shapes
    (folder / "adapter").mkdir()
    name = f"base_model.model.model.layers.{layer}.mlp.experts.lora_{{}}.weight"
    metadata = {"leap_fingerprint": json.loads((folder / "leap.json").read_text())["fingerprint"]}
    specs = {name.format(side): ("F32", shape) for side, shape in shapes.items() if shape}
    write_safetensors(folder / ADAPTER, specs, metadata)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["mlp.experts.down_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(plain | (config or {})))


def _manifest_of_another_plan(folder: Path, **layers: tuple[tuple[int, ...], int]) -> None:
    old = Plan.load(folder / "leap.json")
    new = {int(key[1:]): LayerPlan(*value) for key, value in layers.items()}
    Plan(old.base, 8, new).save(folder / "leap.json")


HEAD, ADAPTER = "router_head.safetensors", "adapter/adapter_model.safetensors"
CUTS: dict[str, tuple[Break, str]] = {
    "no manifest": (lambda f: (f / "leap.json").unlink(), "has no leap.json: it is not a cut checkpoint"),
    "manifest of the future": (
        lambda f: (f / "leap.json").write_text(
            json.dumps(json.loads((f / "leap.json").read_text()) | {"format_version": 7})
        ),
        "format_version is 7, this leap-serve reads 1",
    ),
    "manifest not JSON": (lambda f: (f / "leap.json").write_text("["), "leap.json: not valid JSON"),
    "manifest a list": (lambda f: (f / "leap.json").write_text("[]"), "leap.json: holds a JSON list"),
    "manifest with other counts": (
        lambda f: _manifest_of_another_plan(f, l0=((0, 2), 2), l1=((1, 3, 4, 7), 2)),
        "layer 0 has 2 experts",
    ),
    "manifest of other ids": (
        lambda f: _manifest_of_another_plan(f, l0=((0, 2, 6), 2), l1=((1, 3, 4, 7), 2)),
        "config.json: has fingerprint",
    ),
    "manifest of other layers": (
        lambda f: _manifest_of_another_plan(f, l1=((1, 3, 4, 7), 2)), "and the weights disagree on MoE layers [0]"
    ),
    "a shard of another cut": (
        lambda f: _metadata(f / "model.safetensors", "0" * 64), "model.safetensors: has fingerprint 000000000000…"
    ),
    "config of another cut": (lambda f: _config(f, leap_fingerprint="1" * 64), "config.json: has fingerprint 1111"),
    "config without fingerprint": (lambda f: _config(f, leap_fingerprint="absent"), "config.json: has fingerprint None"),
    "config of other counts": (lambda f: _config(f, num_experts=3), "says 3 experts, leap.json says 4"),
    "config of another top_k": (lambda f: _config(f, num_experts_per_tok=1), "says 1 top_k, leap.json says 2"),
    "stock architecture for uneven layers": (
        lambda f: _config(f, architectures=["Qwen3MoeForCausalLM"]),
        "architecture Qwen3MoeForCausalLM cannot hold a plan whose layers differ; set it to LeapQwen3MoeForCausalLM",
    ),
    "router head of another cut": (lambda f: _overlay(f, HEAD, "2" * 64), "router_head.safetensors: has fingerprint 2222"),
    "router head of another size": (lambda f: _overlay(f, HEAD, rows=4), "tensor layers.0.weight has shape [4, 16], but layer 0 has 3 experts"),
    "router head of another layer": (lambda f: _overlay(f, HEAD, layer=9), "layers.9.weight is for no MoE layer"),
    "adapter of another cut": (lambda f: _overlay(f, ADAPTER, "3" * 64), "adapter_model.safetensors: has fingerprint 3333"),
    "adapter of another size": (lambda f: _adapter(f, A=(8, 8)), "experts.lora_A.weight has shape [8, 8], but layer 0 has 3 experts and down_proj [3, 16, 8], at rank 2"),
    "adapter turned round": (lambda f: _adapter(f, B=(6, 16)), "experts.lora_B.weight has shape [6, 16], but layer 0"),
    "adapter of another rank": (lambda f: _adapter(f, config={"r": 3}), "at rank 3"),
    "adapter of another layer": (lambda f: _adapter(f, layer=5), "adapts down_proj of layer 5, where leap.json has no"),
    "adapter on attention too": (lambda f: _adapter(f, config={"target_modules": ["q_proj"]}), "target_modules is ['q_proj'], which cannot be merged"),
    "adapter of another kind": (lambda f: _adapter(f, config={"use_dora": True}), "use_dora is True, which cannot be merged"),
    "adapter of an old PEFT": (lambda f: _adapter(f, config={"peft_version": "0.18.1"}), "was written by PEFT 0.18, which lays out"),
    "adapter of unknown targets": (lambda f: _adapter(f, config={"target_parameters": ["mlp.gate.weight"]}), "target_parameters are ['weight'], not"),
    "adapter without a rank": (lambda f: _adapter(f, config={"r": "many"}), "r is 'many' and lora_alpha 4, not two numbers"),
    "adapter's config no object": (lambda f: (_adapter(f), (f / "adapter" / "adapter_config.json").write_text("[]")), "adapter_config.json: holds a JSON list"),
    "adapter without its weights": (lambda f: (f / "adapter").mkdir(), "adapter: has no adapter_model.safetensors"),
    "adapter without its config": (lambda f: (_adapter(f), (f / "adapter" / "adapter_config.json").unlink()), "adapter_config.json: the file does not exist"),
    "adapter halved": (lambda f: _adapter(f, A=(6, 8), B=None) , "lacks its counterpart"),
    "router head of another tensor": (lambda f: _overlay(f, HEAD, tensor="bias"), "layers.0.bias replaces nothing in the checkpoint"),
    "router head damaged": (lambda f: (f / HEAD).write_bytes(b"12345678"), "router_head.safetensors: "),
}  # fmt: skip


@pytest.mark.parametrize("what", CUTS)
def test_a_cut_that_is_not_what_its_manifest_says(done: Path, what: str) -> None:
    breaking, message = CUTS[what]
    breaking(done)
    with pytest.raises(LeapError) as caught:
        check_cut(Checkpoint.open(done))
    assert message in str(caught.value)


def test_overlays_that_belong_are_let_through(done: Path) -> None:
    _overlay(done, HEAD)
    _adapter(done)
    checkpoint = Checkpoint.open(done)
    check_cut(checkpoint)
    assert checkpoint.overlays == [done / HEAD, done / ADAPTER]


def test_overlays_need_an_architecture_that_stock_engines_refuse(whole: Path, tmp_path: Path) -> None:
    layers = {0: LayerPlan((0, 2, 5), 2), 1: LayerPlan((1, 3, 4), 2)}
    cut(whole, Plan(Checkpoint.open(whole).identity(), 8, layers), tmp_path / "even")
    check_cut(Checkpoint.open(tmp_path / "even"))
    _overlay(tmp_path / "even", HEAD)
    with pytest.raises(CheckpointError, match=r"would be served without router_head\.safetensors"):
        check_cut(Checkpoint.open(tmp_path / "even"))
    _config(tmp_path / "even", architectures=["LeapQwen3MoeForCausalLM"])
    check_cut(Checkpoint.open(tmp_path / "even"))


def test_an_expert_narrower_than_its_peers_is_refused(done: Path) -> None:
    # vLLM would pad it and answer with NaN.
    path = done / "model.safetensors"
    parts = read_safetensors(path)
    metadata = {"format": "pt", "leap_fingerprint": json.loads((done / "leap.json").read_text())["fingerprint"]}
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    dtype, (rows, columns), blob = parts[name]
    parts[name] = (dtype, (rows - 1, columns), blob[: len(blob) // rows * (rows - 1)])
    specs = {key: (kind, shape) for key, (kind, shape, _) in parts.items()}
    write_safetensors(path, specs, metadata, {key: blob for key, (_, _, blob) in parts.items()})
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.experts\.2\.up_proj\.weight has shape .* does not go with"
    ):
        check_cut(Checkpoint.open(done))
