"""NAEE against exhaustive search over blocks that are really cut, in every kind of router; greedy says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cut_blocks import ITEMS, cut_block, open_model, output_of
from families import make_checkpoint
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.engines.torch_subsets import masked_routers
from leap_serve.flops import flops_per_token
from leap_serve.plan import LayerPlan, Plan
from leap_training.methods import naee as module
from leap_training.methods.blocks import BlockModel, Captured, LayerResults
from leap_training.methods.naee import LayerData, naee
from leap_training.pruning_space import PruningSpace
from leap_training.saliency import Routing
from tiny_tokenizer import talking_copy

FAMILIES = ["qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "llama4_text"]
E = 8


def space_of(model: BlockModel, experts: int, **more: Any) -> PruningSpace:
    return PruningSpace.of(Routing.of(model.checkpoint), experts=experts, **more)


def loss_of(model: BlockModel, layer: int, inputs: list[torch.Tensor], ids: Sequence[int]) -> float:
    cut, whole = cut_block(model, layer, ids), model.layers[layer].block
    return sum(float((output_of(cut, x) - output_of(whole, x)).norm()) for x in inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_find_is_that_of_exhaustive_search_over_real_cuts(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    model = open_model(family_checkpoint, family, tmp_path)
    ids, results = model.encode(ITEMS), LayerResults(None, {})
    plan = naee(model, ids, space_of(model, 6), tmp_path / "x", results)
    layer = list(plan.layers)[-1]
    captured = model.capture(ids, tmp_path / "again", [layer])
    inputs = [captured.read(item, layer) for item in range(len(ids))]
    losses = {kept: loss_of(model, layer, inputs, kept) for kept in itertools.combinations(range(E), 6)}
    best = min(losses, key=losses.__getitem__)
    assert plan.layers[layer].retained == best
    assert results.get(layer)["loss"] == pytest.approx(losses[best], rel=1e-3)
    assert plan.made_by["method"] == "naee" and plan.made_by["exact"] is True
    # Not the best alone: every subset has its own error.
    data = LayerData.of(model.layers[layer], layer, captured)
    k = model.checkpoint.top_k
    found = data.losses([LayerPlan(kept, k) for kept in losses])
    assert found == pytest.approx(list(losses.values()), rel=1e-3)


def test_the_progressive_search_sees_the_pruned_model(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    ids, space, results = model.encode(ITEMS), space_of(model, 3), LayerResults(None, {})
    plan = naee(model, ids, space, tmp_path / "x", results, progressive=True)
    assert plan.made_by["method"] == "naee-progressive"
    every = LayerPlan(tuple(range(E)), 2)
    for layer in (0, 3):
        inputs: list[torch.Tensor] = []
        hook = model.layers[layer].block.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].clone()))  # noqa: B023
        before = {n: plan.layers[n] if n < layer else every for n in plan.layers}
        with torch.no_grad(), masked_routers(model.model, model.family) as routers:
            routers.assign([Plan(plan.base, E, before)])
            for one in ids:
                model.model(torch.tensor([one]))
        hook.remove()
        losses = {kept: loss_of(model, layer, inputs, kept) for kept in itertools.combinations(range(E), 3)}
        assert plan.layers[layer].retained == min(losses, key=losses.__getitem__)
        assert results.get(layer)["loss"] == pytest.approx(min(losses.values()), rel=1e-3)


def test_above_the_limit_it_is_backward_elimination_and_says_so(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    ids, space = model.encode(ITEMS), space_of(model, 3)
    best = naee(model, ids, space, tmp_path / "x", LayerResults(None, {}))
    monkeypatch.setattr(module, "EXHAUSTIVE", 55)  # C(8, 3) = 56
    plan = naee(model, ids, space, tmp_path / "x", LayerResults(None, {}))
    assert plan.made_by["method"] == "naee-greedy" and plan.made_by["exact"] is False
    assert any("56 subsets" in notice for notice in plan.made_by["notices"])
    data = LayerData.of(model.layers[1], 1, model.capture(ids, tmp_path / "x", [1]))
    kept = set(range(E))
    while len(kept) > 3:
        fewer = [sorted(kept - {e}) for e in sorted(kept)]
        kept = set(min(fewer, key=lambda one: data.losses([LayerPlan(tuple(one), 2)])[0]))
    assert plan.layers[1].retained == tuple(sorted(kept))
    assert plan.made_by["reconstruction"]["1"] >= best.made_by["reconstruction"]["1"]


def test_skipping_thresholds_and_resuming(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    ids, space, path = model.encode(ITEMS), space_of(model, 4), tmp_path / "layers.json"
    plan = naee(model, ids, space, tmp_path / "x", LayerResults(path, {"n": 1}))
    captured = model.capture(ids, tmp_path / "x", [2])
    x = torch.cat([captured.read(item, 2) for item in range(len(ids))])
    highest = (x @ model.layers[2].router.weight[list(plan.layers[2].retained)].T).softmax(-1).topk(2, -1).values
    middle = float((highest[:, 1] / highest[:, 0]).quantile(0.5))
    assert plan.made_by["dynamic_skipping"]["beta"]["2"] == pytest.approx(middle, rel=1e-4)
    known = LayerResults(path, {"n": 1})
    known.put(2, {"retained": [0, 1, 2, 3], "loss": 0.5, "beta": 0.25})
    again = naee(model, ids, space, tmp_path / "y", LayerResults(path, {"n": 1}))
    assert again.layers[2].retained == (0, 1, 2, 3) and not (tmp_path / "y").exists()
    assert again.layers[1] == plan.layers[1]


def test_a_killed_progressive_search_goes_on_behind_the_layers_it_knows(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    ids, space, path = model.encode(ITEMS[:1]), space_of(model, 4), tmp_path / "layers.json"
    whole = naee(model, ids, space, tmp_path / "x", LayerResults(None, {}), progressive=True)
    seen: list[tuple[list[int], Plan]] = []
    capture = BlockModel.capture

    def counted(self: BlockModel, ids: Any, folder: Path, layers: Sequence[int], under: Plan, **more: Any) -> Captured:
        seen.append((list(layers), under))
        return capture(self, ids, folder, layers, under, **more)

    class Killed(Exception):
        pass

    def kill(done: int, _total: int) -> None:
        if done == 2:
            raise Killed

    monkeypatch.setattr(BlockModel, "capture", counted)
    with pytest.raises(Killed):
        naee(model, ids, space, tmp_path / "x", LayerResults(path, {"n": 1}), progressive=True, progress=kill)
    assert [layers for layers, _ in seen] == [[0], [1]]
    seen.clear()
    again = naee(model, ids, space, tmp_path / "x", LayerResults(path, {"n": 1}), progressive=True)
    assert [layers for layers, _ in seen] == [[2], [3]] and again.fingerprint == whole.fingerprint
    # What it knows is what the later layers see, whatever it is.
    marked = LayerResults(tmp_path / "marked.json", {})
    marked.put(0, {"retained": [4, 5, 6, 7], "loss": 0.5, "beta": 0.25})
    seen.clear()
    other = naee(model, ids, space, tmp_path / "x", LayerResults(tmp_path / "marked.json", {}), progressive=True)
    assert [layers for layers, _ in seen] == [[1], [2], [3]] and other.layers[0].retained == (4, 5, 6, 7)
    assert all(under.layers[0].retained == (4, 5, 6, 7) != whole.layers[0].retained for _, under in seen)


@pytest.mark.parametrize("method", ["naee", "naee-progressive", "hc-smoe"])
def test_a_search_that_ends_leaves_no_inputs_of_layers(
    method: str, family_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state = talking_copy(family_checkpoint("qwen3_moe"), tmp_path / "m"), tmp_path / "state"
    command = ["search", str(folder), "--method", method, "--task", "toy-gsm", "--items", "2", "--state", str(state)]
    written: list[Path] = []
    capture = BlockModel.capture

    def counted(self: BlockModel, ids: Any, folder: Path, *rest: Any, **more: Any) -> Captured:
        found = capture(self, ids, folder, *rest, **more)
        written.extend(folder.glob("item-*.safetensors"))
        return found

    monkeypatch.setattr(BlockModel, "capture", counted)
    (state / "inputs").mkdir(parents=True)
    (state / "inputs" / "mine.txt").write_text("not the search's to remove")
    assert main([*command, "--experts", "4", "6", "-o", str(tmp_path / "plans")]) == 0
    left = {path.relative_to(state) for path in state.rglob("*") if path.is_file()}
    assert left == {Path("4/layers.json"), Path("6/layers.json"), Path("inputs/mine.txt")}
    assert len(set(written)) >= 2 and not any(file.exists() for file in written)
    assert not list(state.glob("?/inputs"))


def test_what_cannot_be_searched_is_refused(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = family_checkpoint("qwen3_moe"), tmp_path / "plan.json"
    command = ["search", str(folder), "--method", "naee", "--experts", "4", "-o", str(out)]
    for flags, said in (([], "needs --task"), (["--task", "toy-gsm", "--stop"], "--stop"),
                        (["--task", "toy-gsm", "--on", "p.json"], "--on"),
                        (["--task", "toy-gsm", "--seed", "-1"], "--seed: is -1"),
                        (["--task", "toy-gsm", "--state", __file__], f"--state: {__file__} is a file"),
                        (["--task", "toy-gsm", "--top-k", "0"], "--top-k: is 0"),
                        (["--task", "toy-gsm", "--top-k", "3"], "the model's is 2")):  # fmt: skip
        assert main([*command, *flags]) == 2
        assert said in capsys.readouterr().err and not out.exists()


def test_a_plan_that_could_not_be_written_is_refused_before_the_search(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    folder, out = family_checkpoint("qwen3_moe"), tmp_path / "file" / "plan.json"
    assert main(["search", str(folder), "--method", "magnitude", "--experts", "4", "-o", str(out)]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err


def test_the_ratio_is_of_weights_where_they_multiply_the_input(tmp_path: Path) -> None:
    made = make_checkpoint("llama4_text", tmp_path / "made", num_experts_per_tok=2)
    model = BlockModel(Checkpoint.open(talking_copy(made, tmp_path / "m")))
    data = LayerData.of(model.layers[1], 1, model.capture(model.encode(ITEMS), tmp_path / "x", [1]))
    best = data.z.sigmoid().topk(2, -1).values
    ratios = best[:, 1] / best[:, 0]
    beta = data.beta(LayerPlan(tuple(range(E)), 2))
    assert beta == pytest.approx(float(ratios.quantile(0.5)), rel=1e-4) and beta < 1.0
    assert data.active(LayerPlan(tuple(range(E)), 2), 0.5) == pytest.approx(1 + float((ratios >= 0.5).double().mean()))


def test_every_method_of_search_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from leap_serve.cli.search import ONE_SHOT
    from leap_training.controls import SEARCHES
    from leap_training.methods.registry import CHANNELWISE, LAYERWISE, METHODS, TASKWISE

    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    names = [one.name for one in METHODS]
    assert sorted(names) == sorted([*ONE_SHOT, *CHANNELWISE, *SEARCHES, *LAYERWISE, *TASKWISE, "leap"])
    assert all(name in shown for name in names)


def test_skipping_is_part_of_the_plan_and_its_flops_are_those_of_a_counted_pass(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    ids, every = model.encode(ITEMS), tuple(range(E))
    plan = naee(model, ids, space_of(model, E), tmp_path / "x", LayerResults(None, {}), skip=True)
    assert all(layer.retained == every and layer.skip is not None for layer in plan.layers.values())
    assert {str(i): layer.skip for i, layer in plan.layers.items()} == plan.made_by["dynamic_skipping"]["beta"]
    # β is the median of the ratio, so half of the tokens use one expert of two.
    captured = model.capture(ids, tmp_path / "again", [1])
    x = torch.cat([captured.read(item, 1) for item in range(len(ids))])
    with torch.no_grad():
        best = (x @ model.layers[1].router.weight.T).softmax(-1).topk(2, -1).values
    strong = float((best[:, 1] >= plan.layers[1].skip * best[:, 0]).double().mean())
    active = plan.made_by["dynamic_skipping"]["active_experts"]["1"]
    assert active == pytest.approx(1 + strong, abs=1.5 / len(x)) and 1.4 < active < 1.6

    net, used = model.model, {index: 0 for index in plan.layers}
    net.set_attn_implementation("eager")
    net.set_experts_implementation("eager")
    for index, layer in plan.layers.items():

        def skip(_m: Any, _a: Any, out: Any, index: int = index, beta: float = layer.skip or 0) -> Any:
            keep = out[1] >= beta * out[1].amax(-1, keepdim=True)
            used[index] += int(keep.sum())
            return out[0], out[1], out[2].masked_fill(~keep, E)  # transformers computes nothing for expert E

        model.layers[index].router.register_forward_hook(skip)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.tensor([ids[0][:8]]), use_cache=False)
    attention = 4 * 2 * 2 * 2 * 32 * 8 * 8
    mean = {index: count / 8 for index, count in used.items()}
    assert 8 < sum(used.values()) < 4 * 8 * 2
    assert counter.get_total_flops() - attention == 8 * flops_per_token(model.checkpoint, plan, mean)
    assert flops_per_token(model.checkpoint, plan, mean) < flops_per_token(model.checkpoint, plan)

    llama = open_model(family_checkpoint, "llama4_text", tmp_path).checkpoint.folder
    command = ["search", str(llama), "--method", "naee", "--experts", "8", "--task", "toy-gsm", "--skip"]
    assert main([*command, "-o", str(tmp_path / "p.json")]) == 1
    assert "none to skip" in capsys.readouterr().err
    assert (
        main(["search", str(llama), "--method", "random", "--experts", "8", "--skip", "-o", str(tmp_path / "p.json")])
        == 2
    )
    assert "--skip: means nothing to random" in capsys.readouterr().err and not (tmp_path / "p.json").exists()
