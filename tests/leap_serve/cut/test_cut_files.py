"""What the cut writes beside the weights: config, index, manifest, run, and the small files of the source."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from cutting import expected_of, plan_for, take_rows, uneven
from leap_serve.cut.verify import verify
from leap_serve.cut.write import cut
from leap_serve.plan import Plan
from synthetic import make, qwen_config, qwen_tensors, read_all, read_safetensors


def check(folder: Path, out: Path, ids: Callable[[int], Sequence[int]]) -> None:
    """Compare a cut with its source by plain slicing of bytes."""
    assert read_all(out) == expected_of(read_all(folder), ids, take_rows)
    verify(out, folder)


def test_config_index_manifest_and_run(tmp_path: Path) -> None:
    config = qwen_config(expert_capacity=100, capacity_factor=1.25)
    config["quantization_config"] = {
        "quant_method": "fp8",
        "ignored_layers": ["lm_head", "model.layers.0.mlp.experts.2.up_proj", "model.layers.0.mlp.experts.3.up_proj"],
        "modules_to_not_convert": ["layers.1.mlp.experts.7", "re:.*mlp.gate$"],
        "per_module": {"model.layers.1.mlp.experts.4.up_proj": {"bits": 8}, "model.layers.1.mlp.experts.5.up_proj": {}},
    }
    folder = make(tmp_path / "m", qwen_tensors(), config, shards=2, total_parameters=1_000_000)
    report = cut(folder, plan_for(folder, uneven), tmp_path / "cut", max_shard_bytes=6000)
    out = tmp_path / "cut"
    written = json.loads((out / "config.json").read_text())
    assert (written["num_experts"], written["num_experts_per_tok"], written["expert_capacity"]) == (4, 2, 267)
    assert (written["capacity_factor"], written["router_aux_loss_coef"]) == (1.25, 0.001)
    assert written["leap_fingerprint"] == report.fingerprint
    assert written["quantization_config"] == {
        "quant_method": "fp8",
        "ignored_layers": ["lm_head", "model.layers.0.mlp.experts.1.up_proj"],
        "modules_to_not_convert": ["layers.1.mlp.experts.3", "re:.*mlp.gate$"],
        "per_module": {"model.layers.1.mlp.experts.2.up_proj": {"bits": 8}},
    }

    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)
    ]
    for file in files:
        assert {n for n, f in index["weight_map"].items() if f == file.name} == set(read_safetensors(file))
        assert sum(len(blob) for _, _, blob in read_safetensors(file).values()) <= 6000
    size = sum(len(blob) for _, _, blob in read_all(out).values())
    assert index["metadata"]["total_size"] == size == report.weights_bytes
    # 9 of the 16 experts go, 3 × 128 elements each, and 9 router rows of 16.
    assert index["metadata"]["total_parameters"] == 1_000_000 - 9 * (3 * 128 + 16)

    plan = Plan.load(out / "leap.json")
    assert plan.fingerprint == Plan.load(out / "run" / "plan.json").fingerprint == report.fingerprint
    run = yaml.safe_load((out / "run" / "run.yaml").read_text())
    assert (run["verb"], run["plan"], run["model"]["id"]) == ("cut", "plan.json", "m")
    assert {"python", "leap-serve", "safetensors"} <= set(run["versions"])


def test_small_files_come_along_and_others_do_not(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", qwen_tensors(), qwen_config())
    (tmp_path / "secret.txt").write_text("of somebody else")
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/a.jinja",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    left_out = (".hidden", "pytorch_model.bin", "old.pt", "rust_model.ot.h5", "optimizer.safetensors", "linked.txt")
    for name in left_out[:-1]:
        (folder / name).write_text(name)
    (folder / "linked.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "inner.txt").symlink_to(folder / "tokenizer.json")
    quantised = {"quantization": {"exclude_modules": ["model.layers.0.mlp.experts.5", "model.layers.0.mlp.experts.6"]}}
    (folder / "hf_quant_config.json").write_text(json.dumps(quantised))
    report = cut(folder, plan_for(folder, uneven), tmp_path / "cut")
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/a.jinja",
    ):
        assert (tmp_path / "cut" / name).read_text() == name
    assert not (tmp_path / "cut" / "inner.txt").is_symlink()
    assert set(left_out) == set(report.left_out)
    assert not any((tmp_path / "cut" / name).exists() for name in left_out)
    renumbered = json.loads((tmp_path / "cut" / "hf_quant_config.json").read_text())
    assert renumbered == {"quantization": {"exclude_modules": ["model.layers.0.mlp.experts.2"]}}


def test_the_hub_caches_links_are_followed(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--moe"
    snapshot = make(repo / "snapshots" / "abc", qwen_tensors(), qwen_config())
    (repo / "blobs").mkdir()
    (snapshot / "tokenizer.json").write_text("{}")
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repo / "blobs" / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    cut(snapshot, plan_for(snapshot, uneven), tmp_path / "cut")
    check(snapshot, tmp_path / "cut", uneven)
    assert (tmp_path / "cut" / "tokenizer.json").read_text() == "{}"
    assert Plan.load(tmp_path / "cut" / "leap.json").base.id == "org/moe"
