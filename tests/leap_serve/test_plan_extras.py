"""Version 2 of the plan's format: what it adds survives the round trip, and the old version stays as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leap_serve.errors import PlanError
from leap_serve.plan import BaseModel, LayerPlan, Merge, Plan, Zeroed

BASE = BaseModel("org/model", "ab" * 32)
PLAIN = LayerPlan((0, 3, 5), 2)
ROWS = (((0, 0.25), (1, 0.75)), ((3, 1.0),), ((2, -0.5), (5, 1.5)))
CLUSTERS = (((0, 1.0), (1, 1.0), (6, 1.0)), ((3, 1.0), (4, 1.0)), ((2, 1.0), (5, 1.0), (7, 1.0)))
EXTRAS: dict[str, LayerPlan] = {
    "skip": replace(PLAIN, skip=0.4),
    "channels": replace(PLAIN, channels=((0, 2), (1, 31), (5, 6))),
    "ranks": replace(PLAIN, ranks=(1, 7, 2)),
    "merged": replace(PLAIN, merge=Merge(ROWS)),
    "merged, with a map": replace(PLAIN, merge=Merge(ROWS, ROWS)),
    "merged, ids mapped": replace(PLAIN, merge=Merge(CLUSTERS, CLUSTERS, "ids"), skip=1.0),
}
ZEROED = Zeroed("2:4", 0.5, "prof", "cd" * 32)


def plan_of(layer: LayerPlan, **more: Any) -> Plan:
    return Plan(BASE, 8, {0: layer, 2: replace(layer, top_k=2)}, **more)


@pytest.mark.parametrize("what", EXTRAS)
def test_round_trip_and_fingerprint(what: str, tmp_path: Path) -> None:
    plan = plan_of(EXTRAS[what])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["format_version"] == 2
    prints = [plan_of(layer).fingerprint for layer in [PLAIN, *EXTRAS.values()]]
    assert len(set(prints)) == len(prints), "extras that differ must have fingerprints that differ"
    assert plan.is_masking is False


def test_zeroed_weights_round_trip(tmp_path: Path) -> None:
    plan = plan_of(PLAIN, zeroed=ZEROED)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.fingerprint != plan_of(PLAIN).fingerprint != plan_of(PLAIN, zeroed=replace(ZEROED, pattern="row"))
    # Where the profile lies decides nothing.
    assert plan_of(PLAIN, zeroed=replace(ZEROED, profile="elsewhere")).fingerprint == plan.fingerprint
    assert plan.is_uniform and not plan.is_masking


def test_a_plan_without_extras_is_written_as_before() -> None:
    value = plan_of(PLAIN).to_json()
    assert value["format_version"] == 1
    assert not {"skip", "channels", "ranks", "merge", "zeroed"} & set(value)
    # What a file of version 1 says beyond its format means nothing.
    assert Plan.from_json(value | {"skip": {"0": 0.5}}, "x") == plan_of(PLAIN)


@pytest.mark.parametrize(("what", "uniform"), [("skip", False), ("channels", True), ("ranks", True), ("merged", False)])
def test_what_a_stock_engine_can_hold(what: str, uniform: bool) -> None:
    assert plan_of(EXTRAS[what]).is_uniform is uniform


def test_other_widths_need_our_architecture() -> None:
    narrow = replace(PLAIN, channels=((0,), (1,), (2,)))
    assert not Plan(BASE, 8, {0: EXTRAS["channels"], 1: narrow}).is_uniform
    with pytest.raises(PlanError, match="some layers only"):
        Plan(BASE, 8, {0: PLAIN, 1: narrow})


BAD: list[tuple[LayerPlan, str]] = [
    (replace(PLAIN, skip=0.0), "skips below 0.0"),
    (replace(PLAIN, skip=1.1), "skips below 1.1"),
    (replace(PLAIN, skip=float("nan")), "skips below nan"),
    (replace(PLAIN, skip=0.5, top_k=1), "with top_k 1"),
    (replace(PLAIN, channels=((0,), (1,))), "equally many channels"),
    (replace(PLAIN, channels=((0,), (1,), (2, 3))), "equally many channels"),
    (replace(PLAIN, channels=((2, 0), (0, 1), (0, 1))), "in increasing order"),
    (replace(PLAIN, ranks=(1, 2)), "2 ranks for 3 experts"),
    (replace(PLAIN, ranks=(0, 1, 2)), "one below 1"),
    (replace(PLAIN, ranks=(1, 1, 1), merge=Merge(ROWS)), "at once"),
    (replace(PLAIN, merge=Merge(ROWS[:2])), "merges into 2 experts where it retains 3"),
    (replace(PLAIN, merge=Merge((*ROWS[:2], ()))), "names no expert"),
    (replace(PLAIN, merge=Merge((*ROWS[:2], ((8, 1.0),)))), "an unknown one"),
    (replace(PLAIN, merge=Merge((*ROWS[:2], ((7, float("inf")),)))), "not finite"),
    (replace(PLAIN, merge=Merge(ROWS, ROWS[:1])), "1 router map"),
    (replace(PLAIN, merge=Merge(ROWS, ROWS, "ids")), "not every expert to one slot"),
    (replace(PLAIN, merge=Merge(ROWS, ROWS, "magic")), "applies its router map to 'magic'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("layer", "message"), BAD)
def test_contradictions_are_refused(layer: LayerPlan, message: str) -> None:
    with pytest.raises(PlanError, match="layer 0") as caught:
        plan_of(layer)
    assert message in str(caught.value)


BAD_FILES = {
    "channels that are no mask": {"channels": {"0": ["xyz"], "2": ["1"]}},
    "a negative mask": {"channels": {"0": ["-1"] * 3, "2": ["1"] * 3}},
    "a list of thresholds": {"skip": [0.5]},
    "a merge without experts": {"merge": {"0": {"router": []}}},
    "an unknown pattern": {"zeroed": ZEROED.to_json() | {"pattern": "4:8"}},
    "2:4 with another ratio": {"zeroed": ZEROED.to_json() | {"ratio": 0.25}},
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_ill_formed_extras_are_refused_by_name(what: str) -> None:
    value = plan_of(EXTRAS["skip"]).to_json() | BAD_FILES[what]
    with pytest.raises(PlanError, match=r"^leap\.json: "):
        Plan.from_json(value, "leap.json")
