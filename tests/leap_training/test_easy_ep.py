"""EASY-EP keeps the experts with the highest sums of the profile, and refuses a profile that has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from leap_serve.cli import main
from leap_serve.errors import UsageError
from leap_serve.plan import Plan
from leap_training.methods.easy_ep import easy_ep
from profiles import simulate


def test_the_plan_keeps_the_highest(tmp_path: Path) -> None:
    profile = simulate()
    profile.save(tmp_path / "prof")
    out = tmp_path / "plan.json"
    assert main(["search", str(tmp_path / "prof"), "--method", "easy-ep", "--experts", "3", "-o", str(out)]) == 0
    plan = Plan.load(out)
    assert plan.made_by["method"] == "easy-ep"
    for index, layer in profile.layers.items():
        assert layer.easy is not None
        assert set(plan.layers[index].retained) == set(np.argsort(-layer.easy, kind="stable")[:3].tolist())


def test_a_profile_without_the_residual_is_refused() -> None:
    profile = simulate()
    blind = {index: replace(layer, easy=None) for index, layer in profile.layers.items()}
    with pytest.raises(UsageError, match="residual"):
        easy_ep(replace(profile, layers=blind))
