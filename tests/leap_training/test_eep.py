"""EEP: candidates against merged models by hand, evolution on a known landscape, files, and resuming."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cut_blocks import ITEMS, open_model
from leap_serve.cli import main
from leap_serve.cut.verify import verify
from leap_serve.cut.write import cut
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.errors import CheckpointError, UnsupportedError, UsageError
from leap_serve.plan import BaseModel, Plan
from leap_training.methods import merged
from leap_training.methods.eep import Candidate, Eep, EepConfig, TaskLoss, plan_of
from leap_training.pruning_space import PruningSpace
from leap_training.saliency import Routing

E, R = 8, 3
ROUTING = Routing(BaseModel("tiny", "0" * 64), E, {0: 2, 2: 2})
SPACE = PruningSpace.of(ROUTING, experts=R)
CONFIG = EepConfig(evaluations=96, population=16)


def one_hot(ids: list[list[int]]) -> Candidate:
    matrix = np.zeros((len(ids), len(ids[0]), E), np.float32)
    for layer, own in zip(matrix, ids, strict=True):
        layer[np.arange(len(own)), own] = 1.0
    return Candidate(matrix, matrix.copy())


def landscape(one: Candidate) -> float:
    """Least where every layer's slots are half expert 1 and half expert 2, 4 and 5, 6 and 7."""
    goal = np.zeros((R, E), np.float32)
    for row, pair in zip(goal, ((1, 2), (4, 5), (6, 7)), strict=True):
        row[list(pair)] = 0.5
    return float(sum(((layer - goal) ** 2).sum() for layer in (*one.experts, *one.router)))


def test_phase_one_prunes_and_phase_two_merges() -> None:
    seen: list[Candidate] = []

    def evaluate(one: Candidate) -> float:
        seen.append(Candidate(one.experts.copy(), one.router.copy()))
        return landscape(one)

    search = Eep(evaluate, SPACE, CONFIG)
    best = search.run()
    assert search.evaluations == len(seen) == 96 and best.loss == min(map(landscape, seen))
    for one in seen[:48]:
        assert np.array_equal(one.experts, one.router) and set(np.unique(one.experts)) == {0.0, 1.0}
        chosen = one.experts.argmax(-1)
        assert (one.experts.sum(-1) == 1).all() and (np.diff(chosen, axis=1) > 0).all()
    assert search.pruned_loss == min(map(landscape, seen[:48]))
    assert all((one.router >= 0).all() for one in seen) and best.loss < search.pruned_loss
    assert any(not np.array_equal(one.experts, one.router) for one in seen[48:])
    with pytest.raises(UsageError, match="two populations of 16"):
        EepConfig(evaluations=31).check()


def test_phase_one_ends_at_the_best_of_all_plans() -> None:
    """Two layers of 56 subsets, 3,136 plans: a loss that no layer has for itself, so that the best is not made of two bests."""
    draw = np.random.default_rng(0)
    own, both = draw.normal(size=(2, E)), draw.normal(size=(E, E))

    def loss(one: Candidate) -> float:
        first, second = (layer.sum(0) for layer in one.experts)
        return float(own[0] @ first + own[1] @ second + first @ both @ second)

    subsets = [list(ids) for ids in itertools.combinations(range(E), R)]
    best = min(loss(one_hot([a, b])) for a in subsets for b in subsets)
    search = Eep(loss, SPACE, EepConfig(evaluations=4000, seed=1))
    search.run()
    assert search.pruned_loss == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(("layers", "kept"), [([1], 3), ([0, 2], 7)])
def test_on_a_real_model_phase_one_ends_at_the_best_of_all_plans_and_phase_two_no_worse(
    layers: list[int], kept: int, family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    space = PruningSpace.of(Routing(model.checkpoint.identity(), E, dict.fromkeys(layers, 2)), experts=kept)
    evaluate = TaskLoss(model, ITEMS[:2], space)
    subsets = [list(ids) for ids in itertools.combinations(range(E), kept)]
    every = [evaluate(one_hot(list(ids))) for ids in itertools.product(subsets, repeat=len(layers))]
    search = Eep(evaluate, space, EepConfig(evaluations=400))
    best = search.run()
    assert search.pruned_loss == pytest.approx(min(every), abs=1e-6) and sorted(every)[1] > min(every) + 1e-6
    assert best.loss <= search.pruned_loss


def test_children_change_as_often_as_the_paper_says() -> None:
    """Of 400 layers with 3 slots: a layer mutates w.p. 0.25 and then a row w.p. 0.15; noise 0.065 w.p. 0.25 an entry; 0.3 crossed."""
    many = PruningSpace.of(Routing(ROUTING.base, E, dict.fromkeys(range(400), 2)), experts=R)
    search = Eep(landscape, many, CONFIG)
    one, other = one_hot([[0, 2, 4]] * 400), one_hot([[1, 3, 5]] * 400)
    changed = rows = 0
    for _ in range(50):
        for layer in search._pruning([one, one]).experts:
            different = len(set(layer.argmax(1)) - {0, 2, 4})
            changed, rows = changed + (different > 0), rows + different
    assert changed / 20_000 == pytest.approx(0.25 * (1 - 0.85**3), abs=0.01)
    assert rows / 60_000 == pytest.approx(0.25 * 0.15, abs=0.004)
    crossed = 0
    for _ in range(500):
        child = search._merging([one, other])
        share = float((child.experts.argmax(-1)[:, 0] % 2).mean())  # of layers that are the other parent's
        # A layer comes from the second parent w.p. a half, in a child that is crossed.
        crossed += 0.3 < share < 0.7
        assert crossed or share in (0.0, 1.0)
    assert crossed / 500 == pytest.approx(0.3, abs=0.07)
    noise = search._noise((400, R, E))
    assert float((noise != 0).mean()) == pytest.approx(0.25, abs=0.02)
    assert float(noise[noise != 0].std()) == pytest.approx(0.065, abs=0.003)


def test_a_search_that_is_killed_ends_as_one_that_is_not(tmp_path: Path) -> None:
    whole = Eep(landscape, SPACE, CONFIG).run()

    class Killed(Exception):
        pass

    for stop in (20, 60):

        def kill(done: int, _total: int, stop: int = stop) -> None:
            if done == stop:
                raise Killed

        with pytest.raises(Killed):
            Eep(landscape, SPACE, CONFIG, tmp_path, {"n": 1}).run(kill)
    asked: list[int] = []
    again = Eep(landscape, SPACE, CONFIG, tmp_path, {"n": 1}).run(lambda done, _: asked.append(done))
    assert asked[0] == 57 and np.array_equal(again.experts, whole.experts) and again.loss == whole.loss
    with pytest.raises(UsageError, match="n is 1 there and 2 now"):
        Eep(landscape, SPACE, CONFIG, tmp_path, {"n": 2}).run()
    (tmp_path / "eep.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError, match="is no state of eep"):
        Eep(landscape, SPACE, CONFIG, tmp_path, {"n": 1}).run()


def test_a_candidate_that_only_prunes_is_an_ordinary_plan_with_the_same_loss(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    space = PruningSpace.of(Routing.of(model.checkpoint), experts=R)
    candidate = one_hot([[0, 2, 5], [1, 3, 7], [2, 4, 6], [5, 6, 7]])
    loss = TaskLoss(model, ITEMS, space)(candidate)
    plan = plan_of(candidate, space, renormalises=True)
    assert plan.is_masking and [layer.retained for layer in plan.layers.values()][1] == (1, 3, 7)
    engine = TorchEngine(model.checkpoint.folder, dtype="float32", device="cpu")
    scores = engine.score_plans([plan], ITEMS)[0]
    engine.close()
    assert loss == pytest.approx(-sum(s.logprob for s in scores) / sum(s.tokens for s in scores), rel=1e-4)
    nothing = "phase 2 found no merge with a lower loss: the experts are pruned, and none is merged"
    assert nothing in plan.made_by["notices"]
    mapped = plan_of(candidate, space, renormalises=False).made_by
    assert mapped["notices"] == ["the router is mapped: served with leap-serve's architecture only", nothing]
    assert mapped["merged"] is plan.made_by["merged"] is False
    assert not plan_of(candidate, space, renormalises=False).is_masking, "without renormalising a mask is another thing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 11), (101,)], ids=["matrix", "bias"])
def test_merging_a_part_at_a_time_gives_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    weights, tensor = torch.randn(R, E, generator=draw), torch.randn(E, *shape, generator=draw).to(dtype)
    whole = (weights.double() @ tensor.flatten(1).double()).to(dtype).view(R, *shape)
    for chunk in (1 << 24, 100, 1):  # all of it, with a rest at the end, a column at a time
        monkeypatch.setattr(merged, "CHUNK", chunk)
        assert torch.equal(merged.merge(weights, tensor), whole)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "gpt_oss"])
def test_merged_experts_and_maps_are_what_the_cut_holds(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    model = open_model(family_checkpoint, family, tmp_path)
    folder = model.checkpoint.folder
    space = PruningSpace.of(Routing.of(model.checkpoint), experts=R)
    draw = np.random.default_rng(0)
    candidate = one_hot([[0, 2, 5], [1, 3, 7], [2, 4, 6], [5, 6, 7]])
    candidate.experts += (draw.normal(size=candidate.experts.shape) * 0.1).astype(np.float32)
    candidate.router += np.abs(draw.normal(size=candidate.router.shape) * 0.1).astype(np.float32)
    candidate.experts[1], candidate.router[1] = candidate.experts[1][[2, 0, 1]], candidate.router[1][[2, 0, 1]]
    loss = TaskLoss(model, ITEMS, space)(candidate)
    plan = plan_of(candidate, space, renormalises=family != "olmoe", task="t")
    assert [layer.retained for layer in plan.layers.values()][1] == (1, 3, 7), "slots stand in the order of their names"
    assert cut(folder, plan, tmp_path / "cut").architecture == model.family.leap_architecture
    verify(tmp_path / "cut", folder)

    # The cut's own experts and leap.json's map in a model of transformers, put there by hand.
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    made, whole = load_file(tmp_path / "cut" / "model.safetensors"), Plan.load(tmp_path / "cut" / "leap.json")
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for index, layer in whole.layers.items():
        block, rm = net.model.layers[index].mlp, torch.zeros(R, E)
        assert layer.merge is not None
        for slot, row in enumerate(layer.merge.router):
            for expert, weight in row:
                rm[slot, expert] = weight
        for name, value in block.experts.named_parameters():
            if family == "gpt_oss":
                value.data = made[f"model.layers.{index}.mlp.experts.{name}"]
                continue
            parts = [[made[f"model.layers.{index}.mlp.experts.{s}.{part}_proj.weight"] for s in range(R)]
                     for part in (("gate", "up") if name == "gate_up_proj" else ("down",))]  # fmt: skip
            value.data = torch.cat([torch.stack(part) for part in parts], 1)
        block.experts.num_experts = R
        router = block.router if family == "gpt_oss" else block.gate

        def hook(
            _m: object, _a: object, out: tuple[torch.Tensor, ...], rm: torch.Tensor = rm
        ) -> tuple[torch.Tensor, ...]:
            mapped = torch.einsum("te,re->tr", out[0].float().softmax(-1), rm)
            weights, slots = mapped.topk(2, -1)
            return out[0], weights if family == "olmoe" else weights / weights.sum(-1, keepdim=True), slots

        router.register_forward_hook(hook)
    total = tokens = 0.0
    end = model.tokenizer.eos_token_id
    with torch.no_grad():
        for item in ITEMS:
            first, answer = (
                model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (item.prompt, item.answer)
            )
            ids = torch.tensor([[*first, *answer, end]])
            rows = net(ids).logits[0].log_softmax(-1)[len(first) - 1 : -1]
            total -= float(rows.gather(1, ids[0, len(first) :, None]).sum())
            tokens += len(rows)
    assert loss == pytest.approx(total / tokens, rel=1e-3)


def test_the_command_and_families_that_have_no_softmax(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    out = tmp_path / "plan.json"
    command = [
        "search",
        str(model.checkpoint.folder),
        "--method",
        "eep",
        "--experts",
        "3",
        "-o",
        str(out),
        "--items",
        "2",
    ]
    assert main([*command, "--task", "toy-gsm", "--episodes", "8"]) == 2 and not out.exists()
    assert main([*command, "--task", "toy-gsm", "--tuned", "x"]) == 2 and not out.exists()
    capsys.readouterr()
    command += ["--task", "toy-gsm", "--state", str(tmp_path / "state"), "--episodes"]
    assert main([*command, "40"]) == 0
    made = Plan.load(out).made_by
    assert made["evaluations"] == 40
    losses = f"loss {made['pruned_loss']:.4f} pruned → {made['search_loss']:.4f}"
    assert f"40 candidates evaluated: {losses}" in " ".join(capsys.readouterr().out.split())
    for flags, said in (
        (["40", "--seed", "1"], "is of another search: its data differs; give the same --task, --items or --seed to"),
        (["41"], "evaluations is 40 there and 41 now; give the same --episodes to resume"),
    ):
        assert main([*command, *flags, "--force"]) == 2
        assert said in capsys.readouterr().err
    llama = open_model(family_checkpoint, "llama4_text", tmp_path)
    with pytest.raises(UnsupportedError, match="has no softmax to map"):
        TaskLoss(llama, ITEMS, PruningSpace.of(Routing.of(llama.checkpoint), experts=3))
