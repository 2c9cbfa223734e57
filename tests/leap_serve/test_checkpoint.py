"""Opening checkpoints: what is read from the headers, and a sentence for everything that can be damaged."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leap_serve.checkpoint import Checkpoint, check_experts, read_bytes, resolve_model
from leap_serve.errors import CheckpointError, LeapError, UnsupportedError
from leap_serve.weights.tensorfile import read_header
from synthetic import content_of, make, qwen_config, qwen_tensors, write_safetensors


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return make(tmp_path / "whole", qwen_tensors(), qwen_config())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make(tmp_path / "sharded", qwen_tensors(), qwen_config(), shards=3)


def test_what_the_headers_say(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    assert (checkpoint.num_experts, checkpoint.top_k, checkpoint.num_hidden_layers) == (8, 2, 2)
    assert (checkpoint.moe_layers, checkpoint.mtp_layers) == ([0, 1], [])
    assert checkpoint.plan is None
    assert set(checkpoint.tensors) == set(qwen_tensors())
    entry = checkpoint.tensors["model.layers.1.mlp.experts.7.down_proj.weight"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("F32", (16, 8), 512)
    assert read_bytes(entry) == content_of(entry.name, "F32", (16, 8))
    check_experts(checkpoint)


def test_opening_a_checkpoint_loads_no_torch(whole: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import leap_serve.cut.write, leap_serve.cut.verify, leap_serve.flops;"
        "from leap_serve.checkpoint import Checkpoint; Checkpoint.open(Path(sys.argv[1])).identity();"
        "print([m for m in ('torch', 'vllm', 'transformers', 'numpy', 'huggingface_hub') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, whole], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "llama4_text", "glm4_moe"])
def test_files_of_stock_transformers(family_checkpoint: Callable[[str], Path], family: str) -> None:
    import safetensors

    folder = family_checkpoint(family)
    checkpoint = Checkpoint.open(folder)
    check_experts(checkpoint)
    assert checkpoint.family.model_type == family
    assert checkpoint.num_experts == 8
    assert checkpoint.moe_layers == ([1, 2, 3] if family == "glm4_moe" else [0, 1, 2, 3])
    with safetensors.safe_open(folder / "model.safetensors", "np") as library:
        assert set(library.keys()) == set(checkpoint.tensors)
        for name, entry in checkpoint.tensors.items():
            assert library.get_tensor(name).tobytes() == read_bytes(entry)


# --- identity ---------------------------------------------------------------------------------------------


def test_identity_does_not_depend_on_sharding(whole: Path, sharded: Path) -> None:
    one, two = Checkpoint.open(whole).identity(), Checkpoint.open(sharded).identity()
    assert one.sha256 == two.sha256
    assert (one.id, two.id) == ("whole", "sharded")


def test_identity_notices_the_router_the_shapes_and_the_routing_config(whole: Path, tmp_path: Path) -> None:
    before = Checkpoint.open(whole).identity().sha256
    others = []
    for number, (tensors, config, content) in enumerate(
        [
            (qwen_tensors(), qwen_config(), {"model.layers.0.mlp.gate.weight": bytes(512)}),
            (qwen_tensors(inner=4), qwen_config(), {}),
            (qwen_tensors(), qwen_config(top_k=1), {}),
            (qwen_tensors(), qwen_config(norm_topk_prob=False), {}),
        ]
    ):
        folder = make(tmp_path / str(number), tensors, config)
        write_safetensors(folder / "model.safetensors", tensors, content=content)
        others.append(Checkpoint.open(folder).identity().sha256)
    assert len({before, *others}) == 5


def test_identity_overlooks_what_does_not_matter(whole: Path, tmp_path: Path) -> None:
    config = qwen_config(transformers_version="9", use_cache=False)
    config["num_local_experts"] = config.pop("num_experts")
    same = make(tmp_path / "same", qwen_tensors(), config)
    assert Checkpoint.open(same).identity().sha256 == Checkpoint.open(whole).identity().sha256


def test_a_snapshot_of_the_hub_cache_is_known_by_its_id(whole: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--some-moe" / "snapshots" / "abc123"
    shutil.copytree(whole, snapshot)
    base = Checkpoint.open(snapshot).identity()
    assert (base.id, base.revision) == ("org/some-moe", "abc123")


# --- finding models ---------------------------------------------------------------------------------------


def test_resolving(whole: Path, tmp_path: Path) -> None:
    assert resolve_model(str(whole)) == whole
    with pytest.raises(CheckpointError, match=r"config\.json: is a file, not a checkpoint folder"):
        resolve_model(str(whole / "config.json"))
    for name in ("nowhere", "./nowhere", "/nowhere/at/all", f"{tmp_path}/nope"):
        with pytest.raises(CheckpointError, match="no such folder; check the path"):
            resolve_model(name)


def test_a_model_that_cannot_be_downloaded_is_one_sentence() -> None:
    code = "from leap_serve.checkpoint import resolve_model\ntry: resolve_model('org/no-such-model')\n"
    code += "except Exception as error: print(type(error).__name__, error)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={"HF_HUB_OFFLINE": "1"}
    )
    assert out.stdout.startswith("CheckpointError org/no-such-model: cannot be had from the Hugging Face Hub")
    assert "check the name and the network, or download it elsewhere and give its folder" in out.stdout


# --- damage -----------------------------------------------------------------------------------------------

Break = Callable[[Path], Any]


def _header(folder: Path) -> dict[str, Any]:
    blob = (folder / "model.safetensors").read_bytes()
    return json.loads(blob[8 : 8 + struct.unpack("<Q", blob[:8])[0]])


def _rewrite(folder: Path, header: Any, data: bytes | None = None) -> None:
    """Put another header before the data of model.safetensors."""
    path = folder / "model.safetensors"
    blob = path.read_bytes()
    if data is None:
        data = blob[8 + struct.unpack("<Q", blob[:8])[0] :]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _tensor(folder: Path, **change: Any) -> None:
    header = _header(folder)
    header["model.embed_tokens.weight"] |= change
    _rewrite(folder, header)


def _config(folder: Path, **change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | change).items() if v != "absent"}))


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _two_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def _cut_off(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


WHOLE: dict[str, tuple[Break, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{oops"), "config.json: not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list, not an object"),
    "config bottomless": (lambda f: (f / "config.json").write_text("[" * 200_000), "config.json: cannot be read"),
    "unknown family": (lambda f: _config(f, model_type="gpt2"), "model_type is 'gpt2', not one of qwen3_moe"),
    "no expert count": (lambda f: _config(f, num_experts="absent"), "num_experts is None, not a count"),
    "silly top_k": (lambda f: _config(f, num_experts_per_tok=0), "num_experts_per_tok is 0, not a count"),
    "counts disagree": (lambda f: _config(f, num_local_experts=4), "num_experts and num_local_experts disagree"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no safetensors weights"),
    "only pickle": (_only_pickle, "has only pickled weights (.bin, .pt), which can run code when read; convert them to"),
    "no index": (_two_files, "has 2 safetensors files but no model.safetensors.index.json"),
    "empty file": (lambda f: _cut_off(f, 0), "model.safetensors: is too short"),
    "seven bytes": (lambda f: _cut_off(f, 7), "model.safetensors: is too short"),
    "cut off in the header": (lambda f: _cut_off(f, 100), "the file has 100: truncated, or not safetensors"),
    "cut off in the data": (lambda f: _cut_off(f, (f / "model.safetensors").stat().st_size - 1), "is truncated: "),
    "header of 2**63 bytes": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + bytes(64)),
        "says its header has 9223372036854775808 bytes, the file has 72",
    ),
    "header not JSON": (lambda f: _rewrite(f, b"{not json}"), "its header is not valid JSON"),
    "header not UTF-8": (lambda f: _rewrite(f, b'{"\xff": 1}'), "its header is not valid JSON"),
    "header bottomless": (lambda f: _rewrite(f, b"[" * 200_000), "its header is not valid JSON"),
    "header a list": (lambda f: _rewrite(f, [1]), "its header is a JSON list, not an object"),
    "a name twice": (lambda f: _rewrite(f, b'{"a": 1, "a": 2}'), "a key occurs twice"),
    "metadata not strings": (lambda f: _rewrite(f, _header(f) | {"__metadata__": {"a": 1}}), "not a map of strings"),
    "no dtype": (lambda f: _rewrite(f, {"a": {"shape": [], "data_offsets": [0, 4]}}), "tensor a lacks dtype"),
    "a tensor is a number": (lambda f: _rewrite(f, {"a": 3}), "tensor a lacks dtype"),
    "three offsets": (lambda f: _tensor(f, data_offsets=[0, 1, 2]), "lacks dtype, shape or data_offsets"),
    "negative offset": (lambda f: _tensor(f, data_offsets=[-4, 2044]), "has impossible shape [32, 16] or range -4…2044"),
    "backward range": (lambda f: _tensor(f, data_offsets=[2048, 0]), "has impossible shape"),
    "negative shape": (lambda f: _tensor(f, shape=[-32, -16]), "has impossible shape [-32, -16]"),
    "fractional shape": (lambda f: _tensor(f, shape=[32.0, 16]), "has impossible shape"),
    "unknown dtype": (lambda f: _tensor(f, dtype="F33"), "has unknown dtype 'F33'"),
    "dtype of another size": (lambda f: _tensor(f, dtype="BF16"), "BF16 [32, 16], needs 1024 bytes but its range has 2048"),
    "shape of another size": (lambda f: _tensor(f, shape=[32, 15]), "F32 [32, 15], needs 1920 bytes but its range has 2048"),
    "overlap": (lambda f: _tensor(f, shape=[33, 16], data_offsets=[0, 2112]), "overlaps another"),
    "bytes of nobody": (
        lambda f: _rewrite(f, {k: v for k, v in _header(f).items() if k != "model.embed_tokens.weight"}),
        "2048 unowned bytes before tensor",
    ),
    "bytes after the end": (
        lambda f: (f / "model.safetensors").open("ab").write(b"x"), "has 1 bytes after the last tensor"
    ),
    "out of the file": (
        lambda f: _rewrite(f, {"a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}), "is truncated: "
    ),
    "a dense model": (
        lambda f: write_safetensors(f / "model.safetensors", {"lm_head.weight": ("F32", (4, 4))}),
        "no qwen3_moe experts among its tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WHOLE)
def test_damage_is_named(whole: Path, what: str) -> None:
    breaking, message = WHOLE[what]
    Checkpoint.open(whole)
    breaking(whole)
    with pytest.raises(LeapError) as caught:
        Checkpoint.open(whole)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(whole))


def _index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


SHARDED: dict[str, tuple[Break, str]] = {
    "shard missing": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        "model-00002-of-00003.safetensors: is missing, model.safetensors.index.json names it",
    ),
    "tensor missing": (
        lambda f: _index(f, lambda v: v["weight_map"].update({"ghost.weight": "model-00001-of-00003.safetensors"})),
        "model-00001-of-00003.safetensors: lacks tensor ghost.weight",
    ),
    "no weight_map": (lambda f: _index(f, lambda v: v.pop("weight_map")), "has no weight_map"),
    "weight_map a list": (lambda f: _index(f, lambda v: v.update(weight_map=["a"])), "has no weight_map"),
    "a path out of the folder": (
        lambda f: _index(f, lambda v: v["weight_map"].update(x="../../secret.safetensors")), "has no weight_map"
    ),
    "a pickle in the index": (
        lambda f: _index(f, lambda v: v["weight_map"].update(x="pytorch_model.bin")), "has no weight_map"
    ),
    "index not JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text(""), "model.safetensors.index.json: not valid JSON"
    ),
    "one tensor in two shards": (
        lambda f: (
            _index(f, lambda v: v["weight_map"].pop("model.embed_tokens.weight")),
            shutil.copy(f / "model-00001-of-00003.safetensors", f / "again.safetensors"),
            _index(f, lambda v: v["weight_map"].update({"model.layers.0.mlp.gate.weight": "again.safetensors"})),
        ),
        "model.embed_tokens.weight, which",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SHARDED)
def test_damage_among_shards_is_named(sharded: Path, what: str) -> None:
    breaking, message = SHARDED[what]
    Checkpoint.open(sharded)
    breaking(sharded)
    with pytest.raises(LeapError) as caught:
        Checkpoint.open(sharded)
    assert message in str(caught.value)


def test_small_malformed_files_kept_as_fixtures() -> None:
    folder = Path(__file__).parents[1] / "fixtures" / "malformed"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) >= 6
    for path in files:
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        assert str(caught.value).startswith(str(path))


def _rebuild(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = qwen_tensors()
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


EXPERTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an expert is missing": (
        lambda t: [t.pop(f"model.layers.1.mlp.experts.3.{p}_proj.weight") for p in ("gate", "up", "down")],
        "layer 1 holds 7 experts (ids 0…7), 8 are expected",
    ),
    "part of an expert is missing": (
        lambda t: t.pop("model.layers.0.mlp.experts.3.up_proj.weight"),
        "layer 0, expert 3 lacks .up_proj.weight",
    ),
    "a router of another size": (
        lambda t: t.update({"model.layers.0.mlp.gate.weight": ("F32", (7, 16))}),
        "tensor model.layers.0.mlp.gate.weight has shape [7, 16], but layer 0 has 8 experts",
    ),
    "no router": (lambda t: t.pop("model.layers.1.mlp.gate.weight"), "layer 1 has experts but no router"),
    "experts elsewhere": (
        lambda t: t.update({"model.layers.1.moe.experts.0.up.weight": ("F32", (4, 4))}),
        "is an expert's, but not where qwen3_moe keeps experts",
    ),
    "fused experts of another number": (
        lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": ("F32", (6, 16, 16))}),
        "has shape [6, 16, 16], but layer 1 has 8 experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", EXPERTS)
def test_incomplete_experts_are_named(whole: Path, what: str) -> None:
    change, message = EXPERTS[what]
    _rebuild(whole, change)
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        check_experts(Checkpoint.open(whole))
    assert message in str(caught.value)
