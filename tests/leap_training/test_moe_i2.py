"""MoE-I²: counts that sum to the budget, a genetic search against all sets, and groups against the real model."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cut_blocks import ITEMS, cut_block, open_model, output_of
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.cut.verify import verify
from leap_serve.cut.write import cut
from leap_serve.engines.torch_subsets import masked_routers
from leap_serve.errors import UsageError
from leap_serve.files import read_json, write_json
from leap_serve.plan import LayerPlan, Plan
from leap_serve.weights.matrices import values
from leap_training.methods.blocks import BlockModel, Captured, LayerResults, MoeLayer
from leap_training.methods.moe_i2 import MoeI2Config, _child, genetic, moe_i2, pruned_counts, ranks
from leap_training.methods.naee import LayerData
from leap_training.pruning_space import PruningSpace
from leap_training.saliency import Routing

E = 8


def space_of(model: BlockModel, experts: int) -> PruningSpace:
    return PruningSpace.of(Routing.of(model.checkpoint), experts=experts, allocation="global")


def test_counts_sum_to_the_budget_and_follow_the_importance() -> None:
    assert pruned_counts([1.0, 2.0, 4.0], 7, [9, 9, 9]) == (4, 2, 1)
    assert pruned_counts([1.0, 2.0, 4.0], 7, [3, 9, 9]) == (3, 3, 1), "what a layer cannot lose, the others do"
    assert pruned_counts([0.0, 1.0], 6, [6, 6]) == (6, 0), "a layer without importance goes first"
    draw = random.Random(0)
    for _ in range(300):
        layers = draw.randint(1, 6)
        importance = [draw.expovariate(1.0) for _ in range(layers)]
        most = [draw.randint(0, 8) for _ in range(layers)]
        total = draw.randint(0, sum(most))
        found = pruned_counts(importance, total, most)
        assert sum(found) == total and all(0 <= n <= cap for n, cap in zip(found, most, strict=True))
        for one, other in itertools.permutations(range(layers), 2):
            if importance[one] < importance[other] and found[one] < found[other]:
                assert found[one] == most[one], "a less important layer loses no fewer, unless it cannot"
    with pytest.raises(UsageError, match="drops 5 experts, the layers' top_k allow 4"):
        pruned_counts([1.0, 1.0], 5, [2, 2])


@pytest.mark.parametrize("population", [20, 100])
def test_the_genetic_search_finds_what_trying_all_sets_finds(population: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        single, pair = rng.exponential(size=E), rng.normal(size=(E, E))

        def loss(kept: tuple[int, ...], single: np.ndarray = single, pair: np.ndarray = pair) -> float:  # type: ignore[type-arg]
            gone = sorted(set(range(E)) - set(kept))
            return float(single[gone].sum() + pair[np.ix_(gone, gone)].sum())

        config = MoeI2Config(population=population, seed=seed)
        found = genetic(lambda sets: [loss(one) for one in sets], E, 5, config, [seed])
        every = sorted((loss(kept), kept) for kept in itertools.combinations(range(E), 5))
        assert [kept for kept, _ in found] == [kept for _, kept in every[:3]]


def test_three_of_ten_children_swap_an_expert_for_one_that_neither_parent_drops() -> None:
    random, every = np.random.default_rng(0), frozenset(range(40))
    one, other = frozenset(range(5)), frozenset(range(3, 8))
    children = [_child(random, [one, other], every, 5) for _ in range(2000)]
    assert all(len(child) == 5 for child in children)
    foreign = [len(child - one - other) for child in children]
    # The expert that is swapped in is none of the child's own: 3 of these 35 are the parents'.
    assert set(foreign) == {0, 1} and np.mean(foreign) == pytest.approx(0.3 * 32 / 35, abs=0.03)


def test_importance_candidates_and_groups_are_those_of_real_blocks(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    ids, results = model.encode(ITEMS[:2]), LayerResults(None, {})
    plan = moe_i2(model, ids, space_of(model, 5), tmp_path / "x", results)
    assert sum(plan.counts) == 20 and plan.made_by["method"] == "moe-i2"
    pruned = [plan.made_by["pruned"][str(i)] for i in range(4)]
    importance = [plan.made_by["layer_importance"][str(i)] for i in range(4)]
    assert pruned == list(pruned_counts(importance, 12, [6] * 4)) == [E - n for n in plan.counts]

    layer = 1
    captured = model.capture(ids, tmp_path / "again", [layer])
    inputs = [captured.read(item, layer) for item in range(len(ids))]
    whole = [output_of(model.layers[layer].block, x) for x in inputs]

    def loss(kept: tuple[int, ...]) -> float:
        block = cut_block(model, layer, kept)
        return sum(float((output_of(block, x) - y).norm()) for x, y in zip(inputs, whole, strict=True))

    without = [loss(tuple(sorted(set(range(E)) - {e}))) for e in range(E)]
    assert plan.scores[layer] == pytest.approx(without, rel=1e-3, abs=1e-4)
    every = {kept: loss(kept) for kept in itertools.combinations(range(E), plan.counts[layer])}
    best = sorted(every, key=every.__getitem__)[:3]
    assert [tuple(one) for one in results.get(layer)["candidates"]] == best

    def hidden(layers: dict[int, LayerPlan], one: list[int]) -> torch.Tensor:
        with torch.no_grad(), masked_routers(model.model, model.family) as routers:
            routers.assign([Plan(plan.base, E, layers)])
            return model.model(torch.tensor([one]), output_hidden_states=True).hidden_states[3].double()

    full = {i: LayerPlan(tuple(range(E)), 2) for i in range(4)}
    options = {}
    for places in itertools.product(*(range(len(results.get(i)["candidates"])) for i in range(3))):
        own = {i: LayerPlan(tuple(results.get(i)["candidates"][place]), 2) for i, place in enumerate(places)}
        options[places] = sum(float((hidden(full | own, one) - hidden(full, one)).norm()) for one in ids)
    assert tuple(results.get(i)["chosen"] for i in range(3)) == min(options, key=options.__getitem__)
    assert results.get(3)["chosen"] == 0, "a group of one takes its best"


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "llama4_text", "glm4_moe"])
def test_plans_that_share_their_first_layers_answer_as_each_alone(
    family: str, family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = open_model(family_checkpoint, family, tmp_path)
    ids, layers = model.encode(ITEMS[:1])[0], sorted(model.layers)
    group = layers[1:3]
    full = {i: LayerPlan(tuple(range(E)), model.layers[i].top_k) for i in layers}
    base = model.checkpoint.identity()
    kept = [tuple(range(E)), (0, 2, 3, 5), (1, 4, 6, 7)]
    plans = [Plan(base, E, full | {i: LayerPlan(one, full[i].top_k) for i in group}) for one in kept]
    got = model.block_outputs(ids, plans, group)
    assert got.shape[:2] == (3, len(ids))
    for row, plan in zip(got, plans, strict=True):
        torch.testing.assert_close(row, model.block_outputs(ids, [plan], layers[: layers.index(group[-1]) + 1])[0])
    assert not torch.allclose(got[0], got[1], atol=1e-3) and not torch.allclose(got[1], got[2], atol=1e-3)


def test_a_killed_search_continues_where_it_was(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    ids, space, path = model.encode(ITEMS[:1]), space_of(model, 5), tmp_path / "layers.json"
    whole = moe_i2(model, ids, space, tmp_path / "x", LayerResults(None, {}))

    class Killed(Exception):
        pass

    # The search draws the same again, so that only what it computes tells one that goes on from one that starts anew.
    computed: list[int | tuple[int, ...]] = []
    of, block_outputs = LayerData.of, BlockModel.block_outputs

    def counted(layer: MoeLayer, index: int, captured: Captured) -> LayerData:
        computed.append(index)
        return of(layer, index, captured)

    def outputs(self: BlockModel, one: Sequence[int], plans: Sequence[Plan], group: Sequence[int]) -> torch.Tensor:
        computed.append(tuple(group))
        return block_outputs(self, one, plans, group)

    monkeypatch.setattr(LayerData, "of", counted)
    monkeypatch.setattr(BlockModel, "block_outputs", outputs)
    wanted: dict[int, list[int | tuple[int, ...]]] = {2: [0, 1], 6: [2, 3, 0, 1], 9: [2, 3, (0, 1, 2)]}
    for step in wanted:  # amid importances, candidates, groups

        def kill(done: int, _total: int, step: int = step) -> None:
            if done == step:
                raise Killed

        with pytest.raises(Killed):
            moe_i2(model, ids, space, tmp_path / "x", LayerResults(path, {"n": 1}), progress=kill)
        assert computed == wanted[step]
        computed.clear()
    # What the first group came to is written layer by layer, and a kill may come between.
    left = json.loads(path.read_text())
    for index in ("1", "2"):
        del left["layers"][index]["chosen"]
    path.write_text(json.dumps(left))
    again = moe_i2(model, ids, space, tmp_path / "x", LayerResults(path, {"n": 1}))
    assert computed == [(0, 1, 2), (3,)] and again.fingerprint == whole.fingerprint


def test_low_rank_is_cut_verified_and_says_that_it_saves_nothing(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    assert ranks([1.0, 1.0, 1.0], 4, 32) == (4, 4, 4) and ranks([0.0, 5.0], 20, 32) == (3, 32)
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    folder = model.checkpoint.folder
    plan = moe_i2(
        model, model.encode(ITEMS[:2]), space_of(model, 6), tmp_path / "x", LayerResults(None, {}), MoeI2Config(rank=5)
    )
    assert "memory and time stay" in plan.made_by["notices"][-1]
    plan.save(tmp_path / "plan.json")
    out = tmp_path / "cut"
    assert main(["cut", str(folder), str(tmp_path / "plan.json"), "-o", str(out)]) == 0
    report = verify(out, folder)
    assert report.remade == 3 * sum(plan.counts)
    made, source = Checkpoint.open(out), Checkpoint.open(folder)
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    old = f"model.layers.2.mlp.experts.{plan.layers[2].retained[1]}.up_proj.weight"
    u, s, v = np.linalg.svd(values(source.tensors[old]).astype(np.float64), full_matrices=False)
    rank = plan.layers[2].ranks[1]
    expected = (u[:, :rank] * s[:rank]) @ v[:rank]
    np.testing.assert_allclose(values(made.tensors[name]), expected, atol=1e-5)
    assert np.linalg.matrix_rank(values(made.tensors[name]), tol=1e-4) == rank < 32


def test_the_command(
    tmp_path: Path, family_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    out = tmp_path / "plan.json"
    command = ["search", str(model.checkpoint.folder), "--method", "moe-i2", "--budget", "0.5", "-o", str(out)]
    assert main(command) == 2 and main([*command, "--task", "toy-gsm", "--skip"]) == 2 and not out.exists()
    assert main([*command, "--task", "toy-gsm", "--items", "2", "--state", str(tmp_path / "state")]) == 0
    assert sum(Plan.load(out).counts) == 16
    assert "moe-i2, global: 16 of 32 experts" in capsys.readouterr().out
    state = tmp_path / "state" / "layers.json"
    assert list(state.parent.iterdir()) == [state], "the layers' inputs are gigabytes, and of no use any more"
    # What is known is taken as it is: a search from the start would choose the best set of the group again.
    known = read_json(state)
    known["layers"]["2"]["chosen"] = 2
    write_json(state, known)
    assert main([*command, "--task", "toy-gsm", "--items", "2", "--state", str(tmp_path / "state"), "--force"]) == 0
    assert read_json(state) == known and list(state.parent.iterdir()) == [state]
    assert Plan.load(out).layers[2].retained == tuple(known["layers"]["2"]["candidates"][2])
    cut(model.checkpoint.folder, Plan.load(out), tmp_path / "cut")
