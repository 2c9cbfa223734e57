"""Profiles on disk, and the command that makes one."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.cut.write import cut
from leap_serve.errors import CheckpointError, LeapError, UnsupportedError, UsageError
from leap_serve.files import sha256_of
from leap_serve.plan import LayerPlan, Merge, Plan
from leap_serve.profile import STATISTICS, Profile, check_request
from leap_serve.tasks.base import Item
from profiles import simulate
from tiny_tokenizer import talking_copy

Edit = Callable[[dict[str, Any]], object]


def test_a_profile_comes_back_bit_by_bit(tmp_path: Path) -> None:
    made = simulate(first=1)
    made.save(tmp_path / "prof")
    read = Profile.load(tmp_path / "prof")
    for index, layer in made.layers.items():
        for name in STATISTICS:
            np.testing.assert_array_equal(getattr(layer, name), getattr(read.layers[index], name), strict=True)
    assert read.base == made.base
    assert (read.top_k, read.tokens, read.items, read.groups) == (made.top_k, made.tokens, made.items, made.groups)
    assert list(read.layers) == [1, 2, 3]


def test_easy_may_be_absent(tmp_path: Path) -> None:
    made = simulate()
    made = replace(made, layers={index: replace(layer, easy=None) for index, layer in made.layers.items()})
    made.save(tmp_path / "prof")
    assert all(layer.easy is None for layer in Profile.load(tmp_path / "prof").layers.values())


def test_a_folder_is_replaced_only_by_force(tmp_path: Path) -> None:
    simulate(seed=1).save(tmp_path / "prof")
    before = (tmp_path / "prof" / "profile.safetensors").read_bytes()
    with pytest.raises(UsageError, match="not empty"):
        simulate(seed=2).save(tmp_path / "prof")
    assert (tmp_path / "prof" / "profile.safetensors").read_bytes() == before
    simulate(seed=2).save(tmp_path / "prof", force=True)
    assert (tmp_path / "prof" / "profile.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["prof"]


@pytest.mark.parametrize("place", ["given", "given/in", "."])
@pytest.mark.parametrize("verb", ["profile", "search"])
def test_what_a_command_reads_is_not_replaced_by_what_it_writes(
    verb: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = tmp_path / "given", tmp_path / place
    simulate().save(given)
    # Neither model nor profile is looked into before; several budgets leave a folder.
    flags = ["--task", "toy-gsm"] if verb == "profile" else ["--method", "reap", "--experts", "2", "3"]
    assert main([verb, str(given), *flags, "-o", str(out), "--force"]) == 2
    said = "holds the source" if place == "." else "lies in the source"
    assert f"{out}: {said} {given}" in capsys.readouterr().err
    assert sorted(path.name for path in given.iterdir()) == ["profile.json", "profile.safetensors"]


HEADER_DAMAGE: dict[str, tuple[Edit, str]] = {
    "version": (lambda h: h.update(format_version=3), "format_version is 3"),
    "another model's tensors": (lambda h: h.update(tensors_sha256="0" * 64), "is not the file"),
    "no base": (lambda h: h.pop("base_model"), "ill-formed"),
    "text for a number": (lambda h: h.update(tokens="many"), "ill-formed"),
    "wrong experts": (lambda h: h.update(num_experts=7), r"not float64 \(7,\)"),
    "wrong tokens": (lambda h: h.update(tokens=51), "counts 100 choices for 51 tokens"),
    "a layer too many": (lambda h: h["top_k"].update({"9": 2}), "top_k for"),
    "wrong top_k": (lambda h: h["top_k"].update({"0": 3}), "counts 100 choices for 50 tokens × 3"),
}


@pytest.mark.parametrize("damage", HEADER_DAMAGE)
def test_a_damaged_header_is_refused(tmp_path: Path, damage: str) -> None:
    simulate().save(tmp_path / "prof")
    path = tmp_path / "prof" / "profile.json"
    header = json.loads(path.read_text())
    edit, message = HEADER_DAMAGE[damage]
    edit(header)
    path.write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match=message):
        Profile.load(tmp_path / "prof")


TENSOR_DAMAGE: dict[str, tuple[Edit, str]] = {
    "not a number": (lambda t: t["layers.1.w"].__setitem__(0, np.nan), "layers.1.w holds negative or non-finite"),
    "negative": (lambda t: t["layers.1.m"].__setitem__(0, -1.0), "layers.1.m holds negative or non-finite"),
    "float32": (lambda t: t.update({"layers.0.a": t["layers.0.a"].astype(np.float32)}), "layers.0.a is float32"),
    "short": (lambda t: t.update({"layers.0.a": t["layers.0.a"][:4].copy()}), r"float64 \(4,\)"),
    "missing": (lambda t: t.pop("layers.0.a"), "ill-formed"),
    "unknown": (lambda t: t.update({"layers.0.zz": t["layers.0.a"]}), "ill-formed"),
    "strange name": (lambda t: t.update({"stray": t["layers.0.a"]}), "ill-formed"),
    "layer missing": (lambda t: [t.pop(k) for k in list(t) if k.startswith("layers.0.")], "has layers"),
}  # fmt: skip


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_damaged_tensors_are_refused(tmp_path: Path, damage: str) -> None:
    simulate().save(tmp_path / "prof")
    path, header = tmp_path / "prof" / "profile.safetensors", tmp_path / "prof" / "profile.json"
    tensors = {name: value.copy() for name, value in load_file(path).items()}
    edit, message = TENSOR_DAMAGE[damage]
    edit(tensors)
    save_file(tensors, path)
    # The sums agree again, so that the contents themselves are judged.
    header.write_text(json.dumps(json.loads(header.read_text()) | {"tensors_sha256": sha256_of(path)}))
    with pytest.raises(CheckpointError, match=message):
        Profile.load(tmp_path / "prof")


def test_truncated_and_missing_files_are_refused(tmp_path: Path) -> None:
    simulate().save(tmp_path / "prof")
    path, header = tmp_path / "prof" / "profile.safetensors", tmp_path / "prof" / "profile.json"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is not the file"):
        Profile.load(tmp_path / "prof")
    header.write_text(json.dumps(json.loads(header.read_text()) | {"tensors_sha256": sha256_of(path)}))
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        Profile.load(tmp_path / "prof")
    path.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        Profile.load(tmp_path / "prof")
    header.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Profile.load(tmp_path / "prof")
    with pytest.raises(CheckpointError, match="does not exist"):
        Profile.load(tmp_path / "nowhere")


def _data(path: Path, *lines: str) -> Path:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as stream:
        stream.write("\n".join(lines) + "\n")
    return path


def test_the_command_profiles_with_transformers(
    tmp_path: Path, family_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = talking_copy(family_checkpoint("qwen3_moe"), tmp_path / "model")
    data = _data(tmp_path / "data.jsonl.gz", '{"prompt": "2+2=", "answer": "4"}', '{"text": "hello"}', '{"text": "x"}')
    command = ["profile", str(model), "--data", str(data), "--limit", "2", "--engine", "torch", "-o"]
    assert main([*command, str(tmp_path / "prof"), "--json"]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    profile = Profile.load(tmp_path / "prof")
    assert (out["items"], out["tokens"], profile.tokens) == (2, 10, 10)
    for layer in profile.layers.values():
        assert layer.n.sum() == 20
        np.testing.assert_array_equal(np.diag(layer.coact), layer.n)
    assert main([*command, str(tmp_path / "prof")]) == 2
    assert main(["search", str(tmp_path / "prof"), "--method", "reap", "--experts", "4", "-o",
                 str(tmp_path / "plan.json")]) == 0  # fmt: skip


def test_a_cut_with_uneven_layers_or_skipping_is_not_profiled(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Checkpoint.open(family_checkpoint("qwen3_moe"))
    for counts, even in (((4, 4, 4, 4), True), ((4, 4, 4, 5), False)):
        layers = {index: LayerPlan(tuple(range(count)), 2) for index, count in enumerate(counts)}
        out = tmp_path / str(counts[-1])
        cut(model.folder, Plan(model.identity(), 8, layers), out)
        if even:
            check_request(Checkpoint.open(out), [Item("", "a", "b")])
        else:
            with pytest.raises(UnsupportedError, match="different numbers of experts"):
                check_request(Checkpoint.open(out), [Item("", "a", "b")])
    with pytest.raises(LeapError, match="no items"):
        check_request(model, [])
    # A choice that is skipped is no hit of an expert, and looks like one of the token's best.
    skipping = dict.fromkeys(range(4), LayerPlan((0, 1, 2, 3), 2, skip=0.5))
    cut(model.folder, Plan(model.identity(), 8, skipping), tmp_path / "skipping")
    pairs = tuple(((e, 1.0), (e + 4, 1.0)) for e in range(4))
    merging = dict.fromkeys(range(4), LayerPlan((0, 1, 2, 3), 2, merge=Merge(pairs, pairs, "ids")))
    cut(model.folder, Plan(model.identity(), 8, merging), tmp_path / "merging")
    for name, words in (("skipping", "skips experts by the token"), ("merging", "maps its router to merged experts")):
        with pytest.raises(UnsupportedError, match=words):
            check_request(Checkpoint.open(tmp_path / name), [Item("", "a", "b")])


BAD_LINES = {"{": "not valid JSON", '{"prompt": "a"}': "neither", "[1]": "not a JSON object", '{"text": 3}': "neither"}


@pytest.mark.parametrize("line", BAD_LINES)
def test_malformed_data_names_file_and_line(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _data(tmp_path / "data.jsonl", '{"text": "fine"}', line)
    assert main(["profile", "leap-tiny", "--data", str(data), "-o", str(tmp_path / "prof")]) == 1
    error = capsys.readouterr().err
    assert f"{data}:2" in error and BAD_LINES[line] in error
    assert not (tmp_path / "prof").exists()


def test_refusals_before_any_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path / "prof")]
    assert main(["profile", "leap-tiny", "--task", "toy-gsm", "--split", "test", *out]) == 2
    assert "nothing is ever chosen from a test set" in capsys.readouterr().err
    assert main(["profile", "leap-tiny", "--task", "toy-gsm", "--limit", "0", *out]) == 2
    assert main(["profile", "leap-tiny", "--data", str(tmp_path / "none.jsonl"), *out]) == 2
    assert main(["profile", str(tmp_path / "no-model"), "--task", "toy-gsm", *out]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
