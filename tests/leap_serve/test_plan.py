"""The plan format: what it says survives the round trip, and whatever cannot be right is refused with a sentence."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leap_serve.errors import PlanError
from leap_serve.plan import BaseModel, LayerPlan, Plan

BASE = BaseModel("org/model", "ab" * 32, "main")
LAYERS = {0: LayerPlan((0, 3, 5), 2), 2: LayerPlan((1, 2), 2, 1.5)}
PLAN = Plan(BASE, 8, LAYERS, scores={0: (0.5,) * 8}, made_by={"version": "1", "argv": ["leap", "search"]})


def test_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == PLAN
    assert again.fingerprint == PLAN.fingerprint
    assert again.counts == [3, 2]
    assert again.layers[0].old_to_new() == {0: 0, 3: 1, 5: 2}


def test_layers_are_read_in_the_order_of_numbers() -> None:
    plan = Plan(BASE, 4, {index: LayerPlan((0, 1), 1) for index in range(12)})
    value = json.loads(json.dumps(plan.to_json(), sort_keys=True))
    assert list(value["retained"])[:3] == ["0", "1", "10"]
    assert list(Plan.from_json(value, "x").layers) == list(range(12))


def test_more_keys_are_read_over() -> None:
    assert Plan.from_json(PLAN.to_json() | {"checkpoint": {"mtp_retained": {}}}, "leap.json") == PLAN


CHANGES: dict[str, Plan] = {
    "another base": replace(PLAN, base=BaseModel("org/model", "cd" * 32)),
    "more experts": replace(PLAN, num_experts=9, scores={}),
    "other ids": replace(PLAN, layers={**LAYERS, 0: LayerPlan((0, 3, 6), 2)}),
    "other top_k": replace(PLAN, layers={**LAYERS, 0: LayerPlan((0, 3, 5), 1)}),
    "other temperature": replace(PLAN, layers={**LAYERS, 0: LayerPlan((0, 3, 5), 2, 1.01)}),
    "another layer": replace(PLAN, layers={0: LAYERS[0], 3: LAYERS[2]}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_fingerprint_covers_what_decides_the_routing(what: str) -> None:
    assert CHANGES[what].fingerprint != PLAN.fingerprint


def test_the_fingerprint_leaves_out_scores_provenance_and_the_models_name() -> None:
    same = replace(PLAN, scores={}, made_by={}, base=replace(BASE, id="elsewhere", revision=None))
    assert same.fingerprint == PLAN.fingerprint
    # The recipe written out: a change of it would orphan every checkpoint cut before.
    essence = f'["{"ab" * 32}",8,[[0,[0,3,5],2,1.0],[2,[1,2],2,1.5]]]'
    assert PLAN.fingerprint == hashlib.sha256(essence.encode()).hexdigest()


@pytest.mark.parametrize(
    ("layers", "uniform"),
    [
        ({0: LayerPlan((0, 1), 1), 1: LayerPlan((2, 3), 1)}, True),
        ({0: LayerPlan((0, 1), 1), 1: LayerPlan((2, 3, 4), 1)}, False),
        ({0: LayerPlan((0, 1), 1), 1: LayerPlan((2, 3), 2)}, False),
        ({0: LayerPlan((0, 1), 1, 2.0), 1: LayerPlan((2, 3), 1, 2.0)}, False),
    ],
)
def test_uniform_means_that_a_stock_engine_can_hold_it(layers: dict[int, LayerPlan], uniform: bool) -> None:
    assert Plan(BASE, 8, layers).is_uniform is uniform


BAD_LAYERS: list[tuple[dict[int, LayerPlan], str]] = [
    ({}, "no MoE layer is planned"),
    ({1: LAYERS[0], 0: LAYERS[0]}, "layers are out of order: [1, 0]"),
    ({0: LayerPlan((), 1)}, "layer 0 retains [], not strictly increasing ids within 0…7"),
    ({0: LayerPlan((3, 1), 1)}, "layer 0 retains [3, 1], not strictly increasing"),
    ({0: LayerPlan((1, 1), 1)}, "layer 0 retains [1, 1], not strictly increasing"),
    ({0: LayerPlan((-1, 1), 1)}, "layer 0 retains [-1, 1], not strictly increasing"),
    ({0: LayerPlan((1, 8), 1)}, "layer 0 retains [1, 8], not strictly increasing ids within 0…7"),
    ({12: LayerPlan((0, 1), 3)}, "layer 12 retains 2 experts but its top_k is 3; cut again, or set top_k[12] to 2"),
    ({0: LayerPlan((0, 1), 0)}, "its top_k is 0"),
    ({0: LayerPlan((0, 1), 1, 0.0)}, "layer 0 has temperature 0.0"),
    ({0: LayerPlan((0, 1), 1, float("nan"))}, "layer 0 has temperature nan"),
    ({0: LayerPlan((0, 1), 1, float("inf"))}, "layer 0 has temperature inf"),
]


@pytest.mark.parametrize(("layers", "message"), BAD_LAYERS)
def test_contradictions_are_refused(layers: dict[int, LayerPlan], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan(BASE, 8, layers)
    assert message in str(caught.value)


def test_scores_of_another_width_are_refused() -> None:
    with pytest.raises(PlanError, match="layer 0 has 3 scores for 8 experts"):
        Plan(BASE, 8, LAYERS, scores={0: (1.0, 2.0, 3.0)})


def _without(key: str) -> dict[str, Any]:
    return {k: v for k, v in PLAN.to_json().items() if k != key}


BAD_FILES: dict[str, tuple[Any, str]] = {
    "not an object": ([1], "holds list, not an object"),
    "version of the future": (
        PLAN.to_json() | {"format_version": 3},
        "format_version is 3, this leap-serve reads 1 and 2",
    ),
    "no version": (_without("format_version"), "format_version is None"),
    "no layers": (_without("retained"), "is incomplete or ill-formed (KeyError('retained'))"),
    "no base": (_without("base_model"), "is incomplete"),
    "layers as a list": (PLAN.to_json() | {"retained": [[0, 1]]}, "is incomplete or ill-formed"),
    "ids as text": (PLAN.to_json() | {"retained": {"0": ["a"]}}, "is incomplete or ill-formed"),
    "top_k of one layer missing": (PLAN.to_json() | {"top_k": {"0": 2}}, "is incomplete or ill-formed"),
    "top_k too large": (PLAN.to_json() | {"top_k": {"0": 4, "2": 2}}, "layer 0 retains 3 experts but its top_k is 4"),
    "edited by hand": (PLAN.to_json() | {"retained": {"0": [0, 3, 6], "2": [1, 2]}}, "was edited by hand"),
    "no fingerprint": (_without("fingerprint"), "says fingerprint None"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path: Path, what: str) -> None:
    value, message = BAD_FILES[what]
    (tmp_path / "leap.json").write_text(json.dumps(value))
    with pytest.raises(PlanError) as caught:
        Plan.load(tmp_path / "leap.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "leap.json"))
