"""One-shot criteria against brute force, and the invariants of the plans they make."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from families import make_checkpoint
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.errors import LeapError, UnsupportedError, UsageError
from leap_serve.plan import BaseModel, Plan
from leap_serve.profile import LayerProfile, Profile
from leap_training.pruning_space import PruningSpace
from leap_training.saliency import METHODS, OBSERVED, Routing, allocate, scores, super_experts
from profiles import simulate

BASE = BaseModel("tiny", "0" * 64)


def routing(layers: int = 2, experts: int = 4, top_k: int = 1, groups: int = 1, chosen: int = 1) -> Routing:
    return Routing(BASE, experts, dict.fromkeys(range(layers), top_k), groups, chosen)


def test_scores_are_their_definitions() -> None:
    # Two tokens by hand: expert 0 gets g = 0.75 and 1.0 with ‖f‖ = 2 and 4, expert 2 g = 0.25 with ‖f‖ = 8.
    layer = LayerProfile(
        n=np.array([2.0, 0.0, 1.0]), m=np.array([1.75, 0.0, 0.25]), a=np.array([6.0, 0.0, 8.0]),
        w=np.array([0.75 * 2 + 1.0 * 4, 0.0, 0.25 * 8]), w2=np.zeros(3), max=np.ones(3), coact=np.zeros((3, 3)),
    )  # fmt: skip
    profile = Profile(BASE, 3, {5: 1}, 1, 1, {5: layer}, 2, 1, "", "", "")
    expected = {
        "frequency": [2, 0, 1], "gate-mass": [1.75, 0, 0.25], "ean": [6, 0, 8], "ean-mean": [3, 0, 8],
        "ean-weighted": [5.5, 0, 2], "reap": [2.75, 0, 2],
    }  # fmt: skip
    assert set(expected) == set(OBSERVED)
    for method, values in expected.items():
        np.testing.assert_array_equal(scores(profile, method)[5], values)


@pytest.mark.parametrize("method", OBSERVED)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_experts_never_hit_lose_to_all_others(method: str, allocation: str) -> None:
    profile = simulate(layers=4, experts=8, dead=2, tokens=200)
    plan = allocate(scores(profile, method), Routing.of(profile), budget=0.75, allocation=allocation)
    for index, layer in plan.layers.items():
        dead = set(np.flatnonzero(profile.layers[index].n == 0))
        assert dead == {6, 7}
        if dead & set(layer.retained):
            assert set(range(6)) <= set(layer.retained), "a dead expert is kept while a live one is dropped"


@pytest.mark.parametrize("method", [*OBSERVED, "random"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("budget", [0.25, 0.3, 0.5, 1.0])
def test_invariants_of_every_plan(method: str, allocation: str, budget: float) -> None:
    profile = simulate(layers=5, experts=8, first=1)
    found = scores(profile, method, seed=3)
    plan = allocate(found, Routing.of(profile), budget=budget, allocation=allocation, method=method)
    assert sum(plan.counts) == (int(budget * 8 + 0.5) * 5 if allocation == "uniform" else int(budget * 40 + 0.5))
    for index, layer in plan.layers.items():
        assert list(layer.retained) == sorted(set(layer.retained))
        assert layer.top_k == 2 <= len(layer.retained)
        worst_kept = min(found[index][list(layer.retained)])
        dropped = set(range(8)) - set(layer.retained)
        assert all(found[index][expert] <= worst_kept for expert in dropped)
        assert plan.scores[index] == tuple(found[index])
    again = allocate(scores(profile, method, seed=3), Routing.of(profile), budget=budget, allocation=allocation)
    assert again.fingerprint == plan.fingerprint
    assert plan.made_by["method"] == method


def test_global_equals_brute_force() -> None:
    """One ranking of all experts by their share of the layer, a layer's best top_k taken first."""
    profile = simulate(layers=4, experts=6, top_k=2, dead=0, seed=9)
    found = scores(profile, "reap")
    for total in range(8, 25):
        plan = allocate(found, Routing.of(profile), budget=total / 24, allocation="global")
        share = {(layer, e): found[layer][e] / found[layer].sum() for layer in found for e in range(6)}
        floor = {pair for layer in found for pair in sorted(
            ((layer, e) for e in range(6)), key=lambda pair: -share[pair])[:2]}  # fmt: skip
        rest = sorted((pair for pair in share if pair not in floor), key=lambda pair: (-share[pair], pair))
        expected = floor | set(rest[: total - 8])
        assert {(layer, e) for layer, kept in plan.layers.items() for e in kept.retained} == expected


def test_ties_go_to_the_lower_layer_and_id() -> None:
    flat = {0: np.ones(4), 1: np.ones(4)}
    assert allocate(flat, routing(), experts=2).layers[1].retained == (0, 1)
    plan = allocate(flat, routing(), budget=5 / 8, allocation="global")
    assert [layer.retained for layer in plan.layers.values()] == [(0, 1, 2, 3), (0,)]
    nothing = {0: np.zeros(4), 1: np.zeros(4)}
    assert allocate(nothing, routing(), experts=3).layers[0].retained == (0, 1, 2)


def test_global_does_not_favour_layers_whose_norms_are_larger() -> None:
    shape = np.array([8.0, 4.0, 2.0, 1.0])
    plan = allocate({0: shape, 1: 1000 * shape}, routing(), budget=0.5, allocation="global")
    assert plan.counts == [2, 2]


def test_random_depends_on_the_seed_and_the_layer_only() -> None:
    profile = simulate(layers=3, experts=8)
    one, same, other = (scores(profile, "random", seed) for seed in (1, 1, 2))
    assert all((one[layer] == same[layer]).all() for layer in one)
    assert any((one[layer] != other[layer]).any() for layer in one)
    assert (one[0] != one[1]).any()


def test_too_few_experts_lower_top_k_with_a_notice_or_are_refused() -> None:
    profile = simulate(layers=3, experts=8, top_k=3)
    found = scores(profile, "reap")
    plan = allocate(found, Routing.of(profile), experts=2)
    assert [layer.top_k for layer in plan.layers.values()] == [2, 2, 2]
    assert plan.made_by["notices"] == [
        "top_k is lowered to the number of experts that can be chosen, in layers [0, 1, 2]"
    ]
    # Searches say the same of what they find, and nothing where that top_k was asked for.
    space, asked = (PruningSpace.of(Routing.of(profile), experts=2, top_k=top_k) for top_k in (None, 2))
    made = space.plan(space.best_of(found), method="evolution", notices=["one"])
    assert made.made_by["notices"] == ["one", *plan.made_by["notices"]] and asked.notices == ()
    for refused in (allocate, lambda _, routing, **size: PruningSpace.of(routing, **size)):
        with pytest.raises(UsageError, match="--top-k: is 4, the model's is 3"):
            refused(found, Routing.of(profile), experts=6, top_k=4)  # type: ignore[operator]
    with pytest.raises(UsageError, match="keeps 6 experts in all, but 3 layers with their top_k need 9"):
        allocate(found, Routing.of(profile), experts=2, allocation="global")
    assert allocate(found, Routing.of(profile), experts=2, allocation="global", top_k=1).counts != []


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 0.0}, {"budget": 1.5}, {"budget": float("nan")}, {"experts": 0}, {"experts": 9}, {},
        {"budget": 0.5, "experts": 2}, {"experts": 2, "top_k": 0}, {"experts": 2, "top_k": 9},
        {"experts": 2, "temperature": 0.0}, {"experts": 2, "allocation": "fair"},
        {"experts": 9, "allocation": "global"},
    ],
)  # fmt: skip
def test_impossible_requests_are_refused(wrong: dict[str, float]) -> None:
    profile = simulate()
    with pytest.raises(LeapError):
        allocate(scores(profile, "reap"), Routing.of(profile), **wrong)  # type: ignore[arg-type]


def test_groups_keep_equally_many() -> None:
    found = {0: np.array([9.0, 8, 7, 6, 1, 2, 3, 4]), 1: np.arange(8.0)}
    plan = allocate(found, routing(experts=8, groups=2, chosen=1, top_k=2), experts=4)
    assert [layer.retained for layer in plan.layers.values()] == [(0, 1, 6, 7), (2, 3, 6, 7)]
    odd = allocate(found, routing(experts=8, groups=2, chosen=1, top_k=2), experts=3)
    assert odd.counts == [4, 4]
    assert "instead of 3" in odd.made_by["notices"][0]
    # One group of the two is chosen from, so two experts per token need two in every group.
    spread = allocate(found, routing(experts=8, groups=2, chosen=1, top_k=2), budget=0.5, allocation="global")
    assert spread.counts == [4, 4]
    uneven = allocate(
        {0: np.array([1.0, 0, 0, 0, 1, 0, 0, 0]), 1: np.ones(8)},
        routing(experts=8, groups=2, chosen=1), budget=0.5, allocation="global",
    )  # fmt: skip
    assert uneven.counts == [2, 6]
    starved = allocate(found, routing(experts=8, groups=2, chosen=1, top_k=2), experts=2)
    assert [layer.top_k for layer in starved.layers.values()] == [1, 1]
    with pytest.raises(UnsupportedError, match="8 experts in 3 groups"):
        allocate(found, routing(experts=8, groups=3), experts=3)


def test_super_experts_are_kept_whatever_their_score() -> None:
    profile = simulate(layers=4, experts=64, top_k=4, dead=0, tokens=100)
    layers = dict(profile.layers)
    for index in (1, 3):
        peak = layers[index].max.copy()
        peak[17] = 5000.0
        layers[index] = replace(layers[index], max=peak)
    profile = replace(profile, layers=layers)
    guarded = super_experts(profile)
    assert guarded == {1: frozenset({17})}, "the last quarter of the layers is not guarded"
    for allocation in ("uniform", "global"):
        found = {index: np.where(np.arange(64) == 17, 0.0, layer.w) for index, layer in profile.layers.items()}
        free = allocate(found, Routing.of(profile), budget=0.125, allocation=allocation)
        plan = allocate(found, Routing.of(profile), budget=0.125, allocation=allocation, protect=guarded)
        assert 17 not in free.layers[1].retained
        assert 17 in plan.layers[1].retained
        assert sum(plan.counts) == sum(free.counts) == 32


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_magnitude_is_the_norm_of_the_loaded_weights(family: str, family_checkpoint: Callable[[str], Path]) -> None:
    """Per-expert and fused layouts; the oracle is the model that transformers builds of the same files."""
    from transformers import AutoModelForCausalLM

    folder = family_checkpoint(family)
    found = scores(Checkpoint.open(folder), "magnitude")
    modules = dict(AutoModelForCausalLM.from_pretrained(folder, dtype="float32").named_modules())
    seen = 0
    for name, module in modules.items():
        if name.endswith(".experts"):
            layer = int(name.split(".")[2])
            total = (module.gate_up_proj.double() ** 2).flatten(1).sum(1) + (module.down_proj.double() ** 2).flatten(
                1
            ).sum(1)
            np.testing.assert_allclose(found[layer], total.sqrt().detach().numpy(), rtol=1e-6)
            seen += 1
    assert seen == len(found) == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_magnitude_reads_half_precision(dtype: str, tmp_path: Path, family_checkpoint: Callable[[str], Path]) -> None:
    exact = scores(Checkpoint.open(family_checkpoint("mixtral")), "magnitude")
    half = scores(Checkpoint.open(make_checkpoint("mixtral", tmp_path / "half", dtype=dtype)), "magnitude")
    for layer in exact:
        np.testing.assert_allclose(half[layer], exact[layer], rtol=5e-3)
        assert (half[layer] != exact[layer]).any()


def test_search_writes_a_plan_and_reports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate(experts=16, top_k=2).save(tmp_path / "prof")
    command = ["search", str(tmp_path / "prof"), "--method", "reap", "--allocation", "global", "--budget", "0.25",
               "--temperature", "0.5", "-o", str(tmp_path / "plan.json")]  # fmt: skip
    assert main([*command, "--guard-super-experts", "--json"]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    plan = Plan.load(tmp_path / "plan.json")
    assert (out["retained"], out["fingerprint"]) == (plan.counts, plan.fingerprint)
    assert sum(plan.counts) == 12
    assert plan.made_by["data_sha256"] == "1" * 64 and {layer.temperature for layer in plan.layers.values()} == {0.5}
    assert main(command) == 2, "an existing plan is not replaced without --force"
    assert main([*command, "--force"]) == 0


def test_search_on_a_model_or_with_wrong_sources(
    tmp_path: Path, family_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan = str(family_checkpoint("qwen3_moe")), tmp_path / "plan.json"
    for method in METHODS:
        expected = 0 if method in ("magnitude", "random") else 2
        out = ["--experts", "4", "-o", str(plan), "--force"]
        assert main(["search", model, "--method", method, *out]) == expected, method
    assert Plan.load(plan).base == Checkpoint.open(Path(model)).identity()
    plan.unlink()
    simulate().save(tmp_path / "prof")
    assert main(["search", str(tmp_path / "prof"), "--method", "magnitude", "--experts", "4", "-o", str(plan)]) == 2
    (tmp_path / "prof" / "profile.safetensors").write_bytes(b"short")
    assert main(["search", str(tmp_path / "prof"), "--method", "reap", "--experts", "4", "-o", str(plan)]) == 1
    assert main(["search", str(tmp_path / "none"), "--method", "reap", "--experts", "4", "-o", str(plan)]) == 1
    assert main(["search", model, "--method", "random", "--experts", "4", "-o", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not plan.exists()
