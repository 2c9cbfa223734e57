"""The cut: every retained byte where it belongs, in every family and layout, and nothing but the cut is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cutting import expected_of, plan_for, take_rows, uneven
from families import SPECIFIC, make_checkpoint
from leap_serve.checkpoint import Checkpoint, check_cut
from leap_serve.cut.verify import verify
from leap_serve.cut.write import cut
from leap_serve.errors import LeapError, UnsupportedError
from leap_serve.files import sha256_of
from leap_serve.plan import LayerPlan, Plan
from synthetic import make, qwen_config, qwen_tensors, read_all


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder and its hash."""
    return {str(p.relative_to(folder)): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}


# --- values, against torch's own slicing ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", SPECIFIC)
def test_every_family_is_sliced_as_torch_slices_it(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, dtype: str
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = family_checkpoint(family) if dtype == "float32" else make_checkpoint(family, tmp_path / "m", dtype=dtype)
    full = load_file(model / "model.safetensors")
    # The same model once more in three shards.
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_bytes((model / "config.json").read_bytes())
    weight_map = {name: f"model-0000{k % 3 + 1}-of-00003.safetensors" for k, name in enumerate(full)}
    for file in set(weight_map.values()):
        save_file({n: full[n] for n, f in weight_map.items() if f == file}, sharded / file, {"format": "pt"})
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    expected = expected_of(full, uneven, lambda tensor, ids: tensor[ids])
    # τ goes into leap.json, never into the weights: the router's rows stay what they are in fp32 and bf16 alike.
    plan = plan_for(model, uneven, tau=1.5)
    for source, limit in ((model, 5 * 10**9), (sharded, 200_000)):
        out = tmp_path / f"cut-{source.name}"
        before = tree(source)
        report = cut(source, plan, out, max_shard_bytes=limit)
        assert tree(source) == before
        got: dict[str, Any] = {}
        for file in sorted(out.glob("model*.safetensors")):
            got |= load_file(file)
        assert set(got) == set(expected)
        for name, value in expected.items():
            assert got[name].dtype == value.dtype == getattr(torch, dtype) or "correction_bias" in name
            assert torch.equal(got[name], value), name
        assert report.shards == len(list(out.glob("model*.safetensors")))
        assert (report.shards > 1) is (limit < 10**6)
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == [f"Leap{Checkpoint.open(source).family.architecture}"]
        proof = verify(out, source)
        assert proof.tensors == len(expected)
        assert proof.untouched + proof.renumbered + proof.sliced == proof.tensors


@pytest.mark.parametrize("family", SPECIFIC)
def test_an_even_cut_loads_in_stock_transformers_and_equals_the_masked_model(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    from reference import reference_logprobs

    model = family_checkpoint(family)
    plan = plan_for(model, lambda layer: (layer, layer + 1, 6, 7))
    assert plan.is_uniform
    report = cut(model, plan, tmp_path / "cut")
    assert report.architecture == Checkpoint.open(model).family.architecture
    prompts = [[5, 9, 130, 7, 7, 42, 3, 77], [150, 11, 12, 13]]
    masked = {index: (layer.retained, layer.top_k, 1.0) for index, layer in plan.layers.items()}
    wanted = reference_logprobs(model, masked, prompts)
    got = reference_logprobs(tmp_path / "cut", {}, prompts)
    unpruned = reference_logprobs(model, {}, prompts)
    for a, b, c in zip(wanted, got, unpruned, strict=True):
        assert (a - b).abs().max() <= 1e-5
        assert (a - c).abs().max() > 1e-2  # the control: dropping these experts does show


# --- layouts that no tiny model of transformers has -------------------------------------------------------


def check(folder: Path, out: Path, ids: Callable[[int], Sequence[int]]) -> None:
    """Compare a cut with its source by plain slicing of bytes."""
    assert read_all(out) == expected_of(read_all(folder), ids, take_rows)
    verify(out, folder)


QUANTISED: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "FP8 by blocks": {"weight": ("F8_E4M3", (16, 8)), "weight_scale_inv": ("F32", (1, 1))},
    "FP8 by tensor": {"weight": ("F8_E4M3", (16, 8)), "weight_scale": ("F32", ()), "input_scale": ("F32", ())},
    "AWQ": {"qweight": ("I32", (16, 1)), "qzeros": ("I32", (1, 1)), "scales": ("F16", (1, 8))},
    "GPTQ": {
        "qweight": ("I32", (2, 8)), "qzeros": ("I32", (1, 1)), "scales": ("F16", (1, 8)), "g_idx": ("I32", (16,)),
        "bias": ("F16", (8,)),
    },
    "compressed-tensors": {
        "weight_packed": ("I32", (16, 1)), "weight_scale": ("BF16", (16, 1)), "weight_shape": ("I64", (2,)),
        "weight_zero_point": ("I32", (2, 1)),
    },
    "NVFP4": {
        "weight": ("U8", (16, 4)), "weight_scale": ("F8_E4M3", (16, 1)), "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    },
}  # fmt: skip


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_experts_come_along_whole(tmp_path: Path, kind: str, shards: int) -> None:
    tensors = qwen_tensors()
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]
        for part, spec in QUANTISED[kind].items():
            tensors[name.removesuffix("weight") + part] = spec
    folder = make(tmp_path / "m", tensors, qwen_config(), shards)
    cut(folder, plan_for(folder, uneven), tmp_path / "cut", max_shard_bytes=4000)
    check(folder, tmp_path / "cut", uneven)


def test_every_tensor_starts_on_a_multiple_of_its_width(tmp_path: Path) -> None:
    tensors = {"model.odd": ("U8", (3,)), **qwen_tensors(dtype="BF16"), "model.wide": ("I64", (2,))}
    folder = make(tmp_path / "m", tensors, qwen_config(), shards=2)
    cut(folder, plan_for(folder, uneven), tmp_path / "cut")
    check(folder, tmp_path / "cut", uneven)
    widths = {"U8": 1, "BF16": 2, "I64": 8}
    for entry in Checkpoint.open(tmp_path / "cut").tensors.values():
        assert entry.begin % widths[entry.dtype] == 0


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {}
    for layer in range(2):
        head = f"model.layers.{layer}.mlp."
        tensors |= {
            f"{head}experts.gate_up_proj_blocks": ("U8", (8, 32, 2, 16)), f"{head}experts.gate_up_proj_scales": ("U8", (8, 32, 2)),
            f"{head}experts.gate_up_proj_bias": ("BF16", (8, 32)), f"{head}experts.down_proj_blocks": ("U8", (8, 16, 2, 16)),
            f"{head}experts.down_proj_scales": ("U8", (8, 16, 2)), f"{head}experts.down_proj_bias": ("BF16", (8, 16)),
            f"{head}router.weight": ("BF16", (8, 16)), f"{head}router.bias": ("BF16", (8,)),
        }  # fmt: skip
    config = qwen_config(architectures=["GptOssForCausalLM"], model_type="gpt_oss")
    config["num_local_experts"] = config.pop("num_experts")
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}
    folder = make(tmp_path / "m", tensors, config)
    cut(folder, plan_for(folder, uneven), tmp_path / "cut")
    check(folder, tmp_path / "cut", uneven)
    written = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert written["num_local_experts"] == 4
    assert written["quantization_config"] == config["quantization_config"]


def test_llama4_with_vision_and_fused_scales(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"vision_model.model.layers.0.mlp.fc1.weight": ("F32", (4, 4))}
    for layer in range(2):
        head = f"language_model.model.layers.{layer}.feed_forward."
        tensors |= {
            f"{head}experts.gate_up_proj": ("F8_E4M3", (8, 4, 8)), f"{head}experts.gate_up_proj_scale": ("F32", (8, 1, 8)),
            f"{head}experts.down_proj": ("F8_E4M3", (8, 4, 4)), f"{head}experts.input_scale": ("F32", ()),
            f"{head}router.weight": ("F32", (8, 4)), f"{head}shared_expert.up_proj.weight": ("F32", (4, 4)),
        }  # fmt: skip
    text = {"model_type": "llama4_text", "num_local_experts": 8, "num_experts_per_tok": 1, "num_hidden_layers": 2}
    config = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": text}
    folder = make(tmp_path / "m", tensors, config)
    even = plan_for(folder, lambda layer: (layer, 5, 6))
    cut(folder, even, tmp_path / "cut")
    got, source = read_all(tmp_path / "cut"), read_all(folder)
    name = "language_model.model.layers.1.feed_forward.experts.{}"
    assert got[name.format("down_proj")] == take_rows(source[name.format("down_proj")], [1, 5, 6])
    assert got[name.format("gate_up_proj_scale")] == take_rows(source[name.format("gate_up_proj_scale")], [1, 5, 6])
    assert got[name.format("input_scale")] == source[name.format("input_scale")]
    verify(tmp_path / "cut", folder)
    written = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert written["architectures"] == ["Llama4ForConditionalGeneration"]
    assert written["text_config"]["num_local_experts"] == 3
    with pytest.raises(UnsupportedError, match="no engine serves Llama4ForConditionalGeneration"):
        cut(folder, plan_for(folder, uneven), tmp_path / "uneven")


@pytest.mark.parametrize("names_of", ["model.layers.{}.", "mtp.layers.{}."])
def test_mtp_layers_follow_the_last_main_layer_or_their_own_plan(tmp_path: Path, names_of: str) -> None:
    mtp = names_of.format(2 if names_of.startswith("model") else 0)
    tensors = qwen_tensors()
    own = {k.replace("model.layers.0.", mtp): v for k, v in tensors.items() if "layers.0." in k}
    folder = make(tmp_path / "m", tensors | own | {f"{mtp}eh_proj.weight": ("F32", (4, 8))}, qwen_config())
    model = Checkpoint.open(folder)
    assert (model.moe_layers, model.mtp_layers) == ([0, 1], [2])
    plan = plan_for(folder, uneven)
    cut(folder, plan, tmp_path / "cut")
    got, source = read_all(tmp_path / "cut"), read_all(folder)
    assert got[f"{mtp}mlp.gate.weight"] == take_rows(source[f"{mtp}mlp.gate.weight"], [1, 3, 4, 7])
    assert got[f"{mtp}mlp.experts.1.up_proj.weight"] == source[f"{mtp}mlp.experts.3.up_proj.weight"]
    assert f"{mtp}mlp.experts.4.up_proj.weight" not in got
    assert got[f"{mtp}eh_proj.weight"] == source[f"{mtp}eh_proj.weight"]
    manifest = json.loads((tmp_path / "cut" / "leap.json").read_text())
    assert manifest["checkpoint"]["mtp_retained"] == {"2": [1, 3, 4, 7]}
    assert verify(tmp_path / "cut", folder).sliced == 3

    named = Plan(plan.base, 8, {**plan.layers, 2: LayerPlan((0, 7), 2)})
    cut(folder, named, tmp_path / "named")
    assert read_all(tmp_path / "named")[f"{mtp}mlp.gate.weight"] == take_rows(source[f"{mtp}mlp.gate.weight"], [0, 7])
    verify(tmp_path / "named", folder)


def test_of_a_router_of_several_layers_only_the_last_affine_head_is_cut(tmp_path: Path) -> None:
    tensors = qwen_tensors()
    for layer in range(2):
        head = f"model.layers.{layer}.mlp.gate."
        del tensors[f"{head}weight"]
        # The first layer has as many rows as there are experts, to be mixed up with the head.
        tensors |= {
            f"{head}0.weight": ("F32", (8, 16)), f"{head}0.bias": ("F32", (8,)), f"{head}2.weight": ("F32", (8, 8)),
            f"{head}2.bias": ("F32", (8,)), f"{head}10.weight": ("F32", (8, 8)), f"{head}10.bias": ("F32", (8,)),
        }  # fmt: skip
    folder = make(tmp_path / "m", tensors, qwen_config())
    cut(folder, plan_for(folder, uneven), tmp_path / "cut")
    got, source = read_all(tmp_path / "cut"), read_all(folder)
    for layer in range(2):
        head = f"model.layers.{layer}.mlp.gate."
        for part in ("0.weight", "0.bias", "2.weight", "2.bias"):
            assert got[head + part] == source[head + part]
        for part in ("10.weight", "10.bias"):
            assert got[head + part] == take_rows(source[head + part], list(uneven(layer)))
    verify(tmp_path / "cut", folder)


# --- twice ----------------------------------------------------------------------------------------------


def test_a_cut_can_be_cut_again(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", qwen_tensors(), qwen_config())
    first, second = tmp_path / "first", tmp_path / "second"
    cut(folder, plan_for(folder, uneven, tau=2.0), first)
    # Ids of the first cut: layer 0 retained 0 2 5, layer 1 retained 1 3 4 7.
    again = plan_for(first, lambda layer: ((1, 2), (0, 3))[layer], tau=1.5)
    cut(first, again, second)
    source, got = read_all(folder), read_all(second)
    assert got == expected_of(source, lambda layer: ((2, 5), (1, 7))[layer], take_rows)
    verify(second, first)
    final = Checkpoint.open(second)
    check_cut(final)
    assert final.plan is not None
    # The first cut divides its logits by 2, the plan asks for another 1.5 on top: applied once, as 3.
    assert [layer.temperature for layer in final.plan.layers.values()] == [3.0, 3.0]
    assert final.plan.base.sha256 == Checkpoint.open(first).identity().sha256
    origin = json.loads((second / "leap.json").read_text())["checkpoint"]["origin"]
    assert origin["retained"] == {"0": [0, 2, 5], "1": [1, 3, 4, 7]}
    with pytest.raises(LeapError, match="layer 0 retains expert 3, but the model's layer holds 3"):
        cut(first, plan_for(first, lambda layer: ((1, 3), (0, 3))[layer]), tmp_path / "third")


def test_an_even_cut_of_an_uneven_one_takes_the_stock_name_again(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", qwen_tensors(), qwen_config())
    assert cut(folder, plan_for(folder, uneven), tmp_path / "first").architecture == "LeapQwen3MoeForCausalLM"
    even = plan_for(tmp_path / "first", lambda layer: (0, 1))
    assert cut(tmp_path / "first", even, tmp_path / "second").architecture == "Qwen3MoeForCausalLM"
