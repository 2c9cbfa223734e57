"""LExI: deviations against the block itself, the dynamic programme against every choice, and its limits."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from families import make_checkpoint
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.errors import UsageError
from leap_serve.flops import flops_per_token
from leap_serve.plan import BaseModel, LayerPlan, Plan
from leap_training.methods.blocks import BlockModel, LayerResults
from leap_training.methods.lexi import LexiConfig, active_budget, comes_even, evolution, exact, lexi, sensitivity
from tiny_tokenizer import talking_copy

K = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BlockModel:
    made = make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("lexi") / "m", num_experts_per_tok=K)
    return BlockModel(Checkpoint.open(talking_copy(made, made.with_name("talking"))))


def base_of(checkpoint: Checkpoint, top_k: int = K) -> Plan:
    every = LayerPlan(tuple(range(8)), top_k)
    return Plan(checkpoint.identity(), 8, dict.fromkeys(checkpoint.moe_layers, every))


@pytest.mark.parametrize("k_min", [1, 2])
def test_the_dynamic_programme_is_exhaustive_search_and_evolution_never_beats_it(k_min: int) -> None:
    random = np.random.default_rng(0)
    for trial in range(6):
        # Not monotone, not convex, and of different lengths: greedy allocation is wrong here.
        deviations = [random.exponential(size=most) for most in (4, 2, 4, 1, 3)]
        for total in range(sum(min(k_min, len(of)) for of in deviations), 15):
            ranges = [range(min(k_min, len(of)), len(of) + 1) for of in deviations]

            def loss(chosen: tuple[int, ...], of: list[np.ndarray] = deviations) -> float:  # type: ignore[type-arg]
                return sum(float(one[k - 1]) for one, k in zip(of, chosen, strict=True))

            every = [chosen for chosen in itertools.product(*ranges) if sum(chosen) == total]
            best = min(every, key=loss)
            assert exact(deviations, total, k_min) == best
            config = LexiConfig(solver="evolution", k_min=k_min, population=4, generations=10, seed=trial)
            evolved = evolution(deviations, total, config)
            assert evolved in every and loss(evolved) >= loss(best)


def test_evolution_finds_the_best_of_a_small_problem() -> None:
    deviations = [np.array([9.0, 3.0, 0.0]), np.array([1.0, 0.5, 0.0]), np.array([5.0, 4.0, 0.0])]
    assert evolution(deviations, 6, LexiConfig(solver="evolution")) == exact(deviations, 6) == (2, 1, 3)


def test_deviations_are_those_of_the_block_with_another_top_k(model: BlockModel) -> None:
    config = LexiConfig(draws=2, tokens=16)
    layer = model.layers[1]
    found = sensitivity(layer, LayerPlan(tuple(range(8)), K), config, 1)
    random = torch.Generator().manual_seed(int(np.random.SeedSequence([0, 1]).generate_state(1)[0]))
    for draw in range(2):
        x = torch.randn(16, 64, generator=random)
        outputs = []
        for k in range(1, K + 1):
            layer.router.top_k = k
            with torch.no_grad():
                outputs.append(layer.block(x[None])[0].double())
        expected = [float((one - outputs[-1]).norm()) for one in outputs]
        np.testing.assert_allclose(found[draw], expected, rtol=1e-4, atol=1e-4)
    assert (found[:, :-1] > 0.1).all() and (found[:, -1] == 0).all()


def test_a_killed_measurement_continues_and_another_is_refused(model: BlockModel, tmp_path: Path) -> None:
    base, config = base_of(model.checkpoint), LexiConfig(draws=3, tokens=8)
    total = active_budget(base, 1, budget=0.6)
    assert total == 10  # of 4 layers × 4
    path, identity = tmp_path / "layers.json", {"draws": 3}
    results = LayerResults(path, identity)
    whole = lexi(model, base, total, config, results)
    assert sum(layer.top_k for layer in whole.layers.values()) == 10
    marked = [[7.0, 0.0, 0.0, 0.0]] * 3  # what is known is taken as it is, not measured again
    results.put(0, marked)
    again = lexi(model, base, total, config, LayerResults(path, identity))
    assert again.made_by["deviations"]["0"] == marked[0]
    assert again.made_by["deviations"]["1"] == whole.made_by["deviations"]["1"]
    draws = np.array(results.get(1))
    np.testing.assert_allclose(whole.made_by["standard_errors"]["1"], draws.std(0, ddof=1) / np.sqrt(3))
    with pytest.raises(UsageError, match="draws is 3 there and 4 now"):
        LayerResults(path, {"draws": 4})


def test_command_on_a_plan_and_flops_against_a_counted_forward_pass(
    model: BlockModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    folder = model.checkpoint.folder
    base = Plan(model.checkpoint.identity(), 8, {n: LayerPlan((0, 2, 3, 5, 7), 3, 2.0) for n in range(4)})
    base.save(tmp_path / "base.json")
    out = tmp_path / "plan.json"
    command = ["search", str(folder), "--method", "lexi", "--budget", "0.5", "--on", str(tmp_path / "base.json")]
    assert main([*command, "--draws", "2", "-o", str(out)]) == 0
    plan = Plan.load(out)
    chosen = [layer.top_k for layer in plan.layers.values()]
    assert sum(chosen) == 6 and all(layer.retained == (0, 2, 3, 5, 7) for layer in plan.layers.values())
    assert all(layer.temperature == 2.0 for layer in plan.layers.values())
    engine = TorchEngine(folder, dtype="float32", device="cpu")
    engine._model.set_attn_implementation("eager")
    engine._model.set_experts_implementation("eager")
    engine.apply(plan)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        engine._model(torch.tensor([[7]]), use_cache=False)
    # One token attends to itself alone, and a shrunk router still computes all eight logits.
    beyond = 4 * 2 * 2 * 2 * 32 + 4 * 2 * 3 * 64
    assert counter.get_total_flops() - beyond == flops_per_token(model.checkpoint, plan)
    capsys.readouterr()
    assert main([*command, "--top-k", "2", "-o", str(tmp_path / "no.json")]) == 2
    assert main(["search", str(folder), "--method", "lexi", "--budget", "0.1", "-o", str(tmp_path / "no.json")]) == 2
    assert "lexi takes 4 to 16" in capsys.readouterr().err and not (tmp_path / "no.json").exists()
    for share in ("nan", "inf", "0", "1.5"):
        assert (
            main(["search", str(folder), "--method", "lexi", "--budget", share, "-o", str(tmp_path / "no.json")]) == 2
        )
        assert "not a fraction" in capsys.readouterr().err


def test_several_budgets_show_their_active_experts_and_flops(
    model: BlockModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plans"
    command = ["search", str(model.checkpoint.folder), "--method", "lexi", "--draws", "2", "-o", str(out)]
    assert main([*command, "--budget", "0.5", "0.75"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    rows = json.loads((out / "pareto.json").read_text())["plans"]
    assert [row["share"] for row in rows] == [0.5, 0.75] and [sum(row["top_k"]) for row in rows] == [8, 12]
    for row in rows:
        flops = flops_per_token(model.checkpoint, Plan.load(out / row["plan"]))
        assert f"{row['budget']} 32 {sum(row['top_k'])} {row['deviation']:.4f} {flops:,} {row['plan']}" in said
    assert rows[0]["flops_per_token"] < rows[1]["flops_per_token"] < rows[1]["full_flops_per_token"]


@pytest.mark.parametrize("own", [(1,), (4,), (2, 2, 2), (4, 2, 3), (1, 1), (3, 1)])
def test_a_plan_is_even_for_sure_just_where_no_uneven_one_is_left(own: tuple[int, ...]) -> None:
    layers = {index: LayerPlan(tuple(range(8)), k) for index, k in enumerate(own)}
    base = Plan(BaseModel("m", "0" * 64), 8, layers)
    for k_min in (1, 2):
        fewest = [min(k_min, k) for k in own]
        for total in range(sum(fewest), sum(own) + 1):
            ranges = [range(least, k + 1) for least, k in zip(fewest, own, strict=True)]
            plans = [chosen for chosen in itertools.product(*ranges) if sum(chosen) == total]
            assert comes_even(base, total, k_min) is all(len(set(chosen)) == 1 for chosen in plans)


def test_one_expert_per_token_leaves_nothing_to_do(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = family_checkpoint("llama4_text"), tmp_path / "plan.json"
    assert main(["search", str(folder), "--method", "lexi", "--budget", "1", "-o", str(out)]) == 1
    assert "nothing to do" in capsys.readouterr().err and not out.exists()
