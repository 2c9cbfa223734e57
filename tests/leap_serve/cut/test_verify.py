"""The proof: verify accepts the very bytes and nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cutting import plan_of
from leap_serve.checkpoint import Checkpoint
from leap_serve.cut.verify import verify
from leap_serve.cut.write import cut
from leap_serve.errors import CheckpointError
from synthetic import make, qwen_config, qwen_tensors, read_all, read_safetensors, write_safetensors


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def test_verify_sees_a_single_flipped_bit_in_any_tensor(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cut(model, plan_of(model), out)
    first = verify(out, model)
    assert (first.untouched, first.renumbered, first.sliced) == (4, 21, 2)
    assert first.bytes_compared == sum(len(blob) for _, _, blob in read_all(out).values())
    rng = random.Random(1)
    for name, entry in Checkpoint.open(out).tensors.items():
        offset = rng.randrange(entry.begin, entry.end)
        _flip(entry.file, offset)
        with pytest.raises(CheckpointError) as caught:
            verify(out, model)
        assert f"tensor {name} differs from" in str(caught.value)
        _flip(entry.file, offset)
    assert verify(out, model) == first


def test_verify_wants_the_very_base(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cut(model, plan_of(model), out)
    other = make(tmp_path / "other", qwen_tensors(), qwen_config(norm_topk_prob=False))
    with pytest.raises(CheckpointError, match=r"is not the model that .*out was cut from \(m\)"):
        verify(out, other)
    with pytest.raises(CheckpointError, match="it is not a cut checkpoint"):
        verify(model)
    assert verify(out).bytes_compared == 0


def test_verify_sees_that_a_tensor_is_gone(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = cut(model, plan_of(model), out)
    parts = read_safetensors(out / "model.safetensors")
    del parts["lm_head.weight"]
    (out / "model.safetensors.index.json").unlink()
    write_safetensors(
        out / "model.safetensors", {name: (dtype, shape) for name, (dtype, shape, _) in parts.items()},
        {"leap_fingerprint": report.fingerprint}, {name: blob for name, (_, _, blob) in parts.items()},
    )  # fmt: skip
    verify(out)
    with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight"):
        verify(out, model)
