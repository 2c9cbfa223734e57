"""Cuts whose weights are computed: what cannot be is refused before a byte is written, and damage is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leap_serve.checkpoint import Checkpoint, check_cut
from leap_serve.cut.remake import rounded, truncated
from leap_serve.cut.verify import verify
from leap_serve.cut.write import cut
from leap_serve.errors import CheckpointError, PlanError, UnsupportedError, UsageError
from leap_serve.plan import LayerPlan, Merge, Plan
from leap_serve.weights.matrices import values
from synthetic import make, qwen_config, qwen_tensors

ROWS = (((0, 0.5), (1, 0.5)), ((2, 1.0), (3, -0.25)), ((7, 1.0),))
MERGED = LayerPlan((0, 2, 7), 2, merge=Merge(ROWS, ROWS))
NARROW = LayerPlan((0, 2), 2, channels=((0, 1, 5, 7), (2, 3, 4, 6)))


def plan_of(model: Path, layer: LayerPlan) -> Plan:
    checkpoint = Checkpoint.open(model)
    return Plan(checkpoint.identity(), checkpoint.num_experts, dict.fromkeys(checkpoint.moe_layers, layer))


@pytest.fixture
def float_model(tmp_path: Path) -> Path:
    """The synthetic model with finite numbers in it; its own bytes are noise."""
    folder = make(tmp_path / "floats" / "m", qwen_tensors(), qwen_config())
    draw = np.random.default_rng(0)
    for entry in Checkpoint.open(folder).tensors.values():
        with entry.file.open("r+b") as stream:
            stream.seek(entry.begin)
            stream.write(draw.normal(size=entry.shape).astype("<f4").tobytes())
    return folder


def test_merged_and_narrowed_by_hand(float_model: Path, tmp_path: Path) -> None:
    source = {name: values(entry) for name, entry in Checkpoint.open(float_model).tensors.items()}
    cut(float_model, plan_of(float_model, MERGED), tmp_path / "merged", max_shard_bytes=3000)
    found = {name: values(entry) for name, entry in Checkpoint.open(tmp_path / "merged").tensors.items()}
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    np.testing.assert_array_equal(
        found[name.format(1)],
        (source[name.format(2)].astype(np.float64) - 0.25 * source[name.format(3)]).astype(np.float32),
    )
    np.testing.assert_array_equal(found[name.format(2)], source[name.format(7)])
    assert found["model.layers.1.mlp.gate.weight"].shape == (8, 16)
    assert verify(tmp_path / "merged", float_model).remade == 2 * 3 * 3

    cut(float_model, plan_of(float_model, NARROW), tmp_path / "narrow")
    found = {name: values(entry) for name, entry in Checkpoint.open(tmp_path / "narrow").tensors.items()}
    np.testing.assert_array_equal(found[name.format(1)], source[name.format(2)][:, [2, 3, 4, 6]])
    gate = "model.layers.0.mlp.experts.{}.gate_proj.weight"
    np.testing.assert_array_equal(found[gate.format(0)], source[gate.format(0)][[0, 1, 5, 7]])
    assert found["model.layers.1.mlp.gate.weight"].shape == (2, 16)
    assert verify(tmp_path / "narrow", float_model).remade == 2 * 2 * 3


def test_what_is_left_of_a_matrix_at_a_rank() -> None:
    matrix = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    np.testing.assert_allclose(truncated(matrix, 4), matrix, atol=1e-6)
    singular = np.linalg.svd(matrix, compute_uv=False)
    for rank in (1, 2, 3):
        lost = np.linalg.norm(truncated(matrix, rank) - matrix)
        assert lost == pytest.approx(np.sqrt((singular[rank:] ** 2).sum()), rel=1e-5)
        assert np.linalg.matrix_rank(truncated(matrix, rank), tol=1e-6) == rank
    assert rounded(np.array([1.0, 1.00390625, 1.01171875]), "BF16").tolist() == [0x3F80, 0x3F80, 0x3F82]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], LayerPlan, str]] = {
    "quantised, merged": ({"dtype": "F8_E4M3"}, {}, MERGED, "cannot be remade"),
    "quantised, truncated": ({"dtype": "F8_E4M3"}, {}, LayerPlan((0, 2), 2, ranks=(1, 1)), "cannot be remade"),
    "too wide": ({}, {}, LayerPlan((0, 2), 2, channels=((0, 8), (1, 2))), "keeps channel 8 of an expert"),
    "MTP layers": ({"layers": (0, 1, 2)}, {"num_nextn_predict_layers": 1}, NARROW, "has MTP layers"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_computed_is_refused_and_nothing_is_written(what: str, tmp_path: Path) -> None:
    tensors, config, layer, message = REFUSED[what]
    folder = make(tmp_path / "m", qwen_tensors(**tensors), qwen_config(**config))
    with pytest.raises((UnsupportedError, PlanError), match=message):
        cut(folder, plan_of(folder, layer), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "layer", "message"),
    [
        ("llama4_text", LayerPlan((0, 2), 1, channels=((0,), (1,))), "shared expert's size hangs on intermediate_size"),
        ("glm4_moe", NARROW, "hangs on moe_intermediate_size"),
        ("glm4_moe", MERGED, r"\(sigmoid-bias\) has no softmax"),
        ("gpt_oss", NARROW, "one gate, up and down matrix per expert"),
    ],
)
def test_families_that_cannot_hold_it(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, layer: LayerPlan, message: str
) -> None:
    folder = family_checkpoint(family)
    with pytest.raises(UnsupportedError, match=message):
        cut(folder, plan_of(folder, layer), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_optimizer_state_does_not_go_with_computed_weights(float_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not go with a plan that changes weights"):
        cut(float_model, plan_of(float_model, MERGED), tmp_path / "out", optimizer=tmp_path / "state")
    assert not (tmp_path / "out").exists()


def test_damage_of_such_a_cut_is_found(float_model: Path, tmp_path: Path) -> None:
    cut(float_model, plan_of(float_model, NARROW), tmp_path / "narrow")
    path = tmp_path / "narrow" / "config.json"
    config = json.loads(path.read_text())
    assert config["moe_intermediate_size"] == 4
    path.write_text(json.dumps(config | {"moe_intermediate_size": 8}))
    with pytest.raises(CheckpointError, match=r"says 8 channels, leap\.json says 4"):
        check_cut(Checkpoint.open(tmp_path / "narrow"))

    cut(float_model, plan_of(float_model, MERGED), tmp_path / "merged")
    without = LayerPlan(MERGED.retained, 2, merge=Merge(ROWS))
    cut(float_model, plan_of(float_model, without), tmp_path / "sliced")
    assert verify(tmp_path / "sliced", float_model).sliced == 2
    # The weights of one under the manifest of the other: the router has too few rows, whatever the fingerprints say.
    (tmp_path / "merged" / "model.safetensors").write_bytes((tmp_path / "sliced" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"gate.weight has shape \[3, 16\], but layer 0 has 8 experts"):
        check_cut(Checkpoint.open(tmp_path / "merged"))
