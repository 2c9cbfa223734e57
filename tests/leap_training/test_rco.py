"""RCO: its relaxed mask and its gated routers by definition, and its find on a model small enough to try every plan."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from families import make_checkpoint
from leap_serve.checkpoint import Checkpoint
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.engines.torch_subsets import masked_routers
from leap_serve.errors import CheckpointError, UnsupportedError, UsageError
from leap_serve.plan import Plan
from leap_serve.tasks.base import Item
from leap_training.batches import collate
from leap_training.pruning_space import Ledger, PruningSpace
from leap_training.rco import STATE, Cost, RcoConfig, Student, hardest, rco, relaxed, start, straight_through
from leap_training.saliency import Routing
from pruning_oracle import all_subsets, subset_of
from tiny_tokenizer import add_tokenizer, talking_copy

ITEMS = [Item(str(n), f"What is {n} and {n * n % 7}?", f" It is {n * 31 % 97}, of course.") for n in range(6)]
SEVEN = [*ITEMS, Item("6", "What is six?", " It is 89, of course.")]
"""In steps of two, a pass over them ends between two steps, and no check at the end of a pass."""
GATED = ["qwen3_moe", "olmoe", "gpt_oss", "glm4_moe"]


def space_of(folder: Path, experts: int, allocation: str = "uniform", temperature: float = 1.0) -> PruningSpace:
    routing = Routing.of(Checkpoint.open(folder))
    return PruningSpace.of(routing, experts=experts, allocation=allocation, temperature=temperature)


def random_subset(space: PruningSpace, seed: int = 0) -> torch.Tensor:
    return hardest(torch.randn(space.shape, generator=torch.Generator().manual_seed(seed)), space)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_the_relaxed_mask_spends_the_budget_and_so_does_its_gradient(temperature: float) -> None:
    values = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = relaxed(values, 4, temperature)
    torch.testing.assert_close(mask.sum(1), torch.full((3,), 4.0, dtype=torch.float64))
    assert (mask.argsort(1) == values.argsort(1)).all()
    assert torch.autograd.gradcheck(lambda v: relaxed(v, 4, temperature), values, atol=1e-5)
    (gradient,) = torch.autograd.grad(mask.sum(), values)
    torch.testing.assert_close(gradient, torch.zeros_like(values), atol=1e-9, rtol=0)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_hard_subset_is_legal_and_the_best(family_checkpoint: Callable[[str], Path], allocation: str) -> None:
    space = space_of(family_checkpoint("qwen3_moe"), 3, allocation)
    values = torch.randn(space.shape, generator=torch.Generator().manual_seed(1))
    values[0] -= 5  # in a global space this layer keeps its floor and no more
    chosen = hardest(values, space).numpy()
    assert chosen.sum() == space.budget and space.complete(chosen)
    assert (chosen.sum(1) == 3).all() if allocation == "uniform" else chosen[0].sum() == 2
    for row, kept in zip(values.numpy(), chosen, strict=True):
        assert row[kept].min() > row[~kept].max()
    mask = straight_through(values.requires_grad_(), space, 1.0)
    np.testing.assert_allclose(mask.detach().numpy(), chosen, atol=1e-6)
    (gradient,) = torch.autograd.grad((mask * torch.arange(mask.numel()).view_as(mask)).sum(), values)
    assert (gradient != 0).all()


def test_it_starts_at_the_ranking(family_checkpoint: Callable[[str], Path]) -> None:
    for allocation in ("uniform", "global"):
        space = space_of(family_checkpoint("qwen3_moe"), 3, allocation)
        random = np.random.default_rng(0)
        scores = {layer: random.random(8) * (1 + layer) for layer in space.layers}
        np.testing.assert_array_equal(hardest(start(scores, space, 1.0), space).numpy(), space.best_of(scores))


def reference_loss(folder: Path, plans: Sequence[Plan]) -> list[float]:
    """KL(full ‖ plan) per answer token by TorchEngine's masks."""
    engine = TorchEngine(folder, dtype="float32", device="cpu")
    batch = collate(engine.tokenizer, ITEMS, prompt_weight=0.0)
    answered = batch.weights[:, 1:] > 0

    def logprobs() -> torch.Tensor:
        logits = engine._model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        return logits[:, :-1][answered].log_softmax(-1)

    with torch.no_grad():
        full, losses = logprobs(), []
        with masked_routers(engine._model, engine.checkpoint.family) as routers:
            for plan in plans:
                routers.assign([plan] * len(ITEMS))
                losses.append(float((full.exp() * (full - logprobs())).sum(-1).mean()))
    engine.close()
    return losses


@pytest.mark.parametrize("family", GATED)
def test_gated_routers_are_the_masked_ones_and_know_what_an_expert_would_do(
    family: str, family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = talking_copy(family_checkpoint(family), tmp_path / family)
    space = space_of(folder, 4, temperature=1.3)
    student = Student(folder, ITEMS, space, RcoConfig())
    chosen = random_subset(space)
    mask = chosen.float().requires_grad_()
    everything = list(range(len(ITEMS)))
    loss = student.divergence(everything, mask)
    assert loss.item() == pytest.approx(reference_loss(folder, [space.plan(chosen.numpy())])[0], abs=1e-4)
    # Its derivative by finite differences, for kept and dropped experts of the last layer: nothing after it is routed.
    (gradient,) = torch.autograd.grad(loss, mask)
    assert (gradient[~chosen] != 0).any() and (gradient[chosen] != 0).any()
    for expert in range(space.shape[1]):
        moved = [chosen.float() for _ in range(2)]
        for sign, one in zip((1, -1), moved, strict=True):
            one[-1, expert] += sign * 1e-2
        high, low = (student.divergence(everything, one).item() for one in moved)
        assert (high - low) / 2e-2 == pytest.approx(gradient[-1, expert].item(), rel=2e-2, abs=1e-3)


def test_it_finds_one_of_the_best_of_all_plans(tmp_path: Path) -> None:
    folder = add_tokenizer(make_checkpoint("qwen3_moe", tmp_path / "m", num_hidden_layers=2, num_experts=5))
    space = space_of(folder, 3)
    subsets = all_subsets(space)
    losses = reference_loss(folder, [space.plan(subset) for subset in subsets])
    known = {subset.tobytes(): loss for subset, loss in zip(subsets, losses, strict=True)}
    ranks: list[int] = []
    reported: list[float] = []
    for seed in range(3):
        book = Ledger(lambda plans: [known[subset_of(plan).tobytes()] for plan in plans], space)
        # It starts at the worst plan of all.
        worst = subsets[int(np.argmax(losses))]
        prior = {layer: 1.0 + row for layer, row in zip(space.layers, worst, strict=True)}
        cost = rco(folder, book, prior, ITEMS, 40, seed, reported.append)
        assert cost.backward_items == cost.forward_items - len(ITEMS)
        assert len(cost.marks) == book.evaluations < 40 and reported[-1] == 40
        assert cost.marks[0] == 2.0 and cost.marks[-1] <= 40 and cost.forward_items / len(ITEMS) > 30
        ranks.append(sorted(losses).index(book.best()[2]))
    # Of 100 plans.
    assert max(ranks) < 8, ranks


class Killed(Exception):
    pass


@dataclass
class Runs:
    """Searches that differ only in what a test says, and what the last of them did."""

    folder: Path
    space: PruningSpace
    steps: list[Sequence[int]] = field(default_factory=list)
    """Items of every training step."""
    told: list[float] = field(default_factory=list)
    asked: list[bytes] = field(default_factory=list)
    """Plans that were evaluated."""

    def __call__(self, state: Path, stop: float = math.inf, **other: Any) -> tuple[Cost, Ledger]:
        """Search; killed once ``stop`` evaluations' worth are spent."""
        del self.steps[:], self.told[:], self.asked[:]
        worth = np.random.default_rng(7).random(self.space.shape)

        def evaluate(plans: Sequence[Plan]) -> list[float]:
            self.asked += [subset_of(plan).tobytes() for plan in plans]
            return [float((worth * subset_of(plan)).sum()) for plan in plans]

        def tell(spent: float) -> None:
            self.told.append(spent)
            if spent >= stop:
                raise Killed

        book = Ledger(evaluate, self.space)
        # Evaluated before the search begins, as rankings are.
        book([random_subset(self.space, number).numpy() for number in range(2)])
        given: dict[str, Any] = {
            "model": self.folder, "scores": {layer: row for layer, row in zip(self.space.layers, worth, strict=True)},
            "items": SEVEN, "evaluations": 20, "seed": 0, "config": RcoConfig(batch=2, check=4), **other,
        }  # fmt: skip
        return rco(ledger=book, report=tell, state=state, **given), book


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    folder = add_tokenizer(make_checkpoint("qwen3_moe", tmp_path / "m", num_hidden_layers=2, num_experts=5))
    made = Runs(folder, space_of(folder, 3))
    divergence = Student.divergence

    def counted(self: Student, numbers: Sequence[int], mask: torch.Tensor) -> torch.Tensor:
        made.steps.append(list(numbers))
        return divergence(self, numbers, mask)

    monkeypatch.setattr(Student, "divergence", counted)
    return made


def kept(state: Path) -> dict[str, Any]:
    """What a state says of itself."""
    with safe_open(state / STATE, "pt") as file:
        return dict(json.loads(file.metadata()["rco"]))


def test_a_search_that_is_killed_goes_on_to_the_same_bits(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, book = runs(tmp_path / "whole")
    steps, state = list(runs.steps), tmp_path / "killed"
    assert len(steps) == whole.backward_items / 2 > 30
    # Every whole evaluation spent is told, the two before the search and the full model's pass among them.
    assert [int(spent) for spent in runs.told] == sorted({int(spent) for spent in runs.told})
    assert runs.told[0] == 4 and runs.told[-1] == 20 and len(runs.told) > 10
    state.mkdir()
    (state / "mine.txt").write_text("mine")
    done: list[int] = [0]
    for stop in (9, 15):
        with pytest.raises(Killed):
            runs(state, stop)
        # It went on where the last state was written, in the midst of a pass over the items.
        assert runs.steps == steps[done[-1] : done[-1] + len(runs.steps)]
        done.append(kept(state)["backward"] // 2)
    known = len(kept(state)["losses"])
    assert 0 < done[1] < done[2] < len(steps) and all(at % 3 for at in done[1:])
    cost, again = runs(state)
    assert runs.steps == steps[done[-1] :] and cost == whole
    assert list(again.rewards.items()) == list(book.rewards.items()) and again.curve == book.curve
    # What the test's ledger evaluates before, and what is new.
    assert len(runs.asked) == 2 + len(again.losses) - known
    # α, Adam's moments, the generator, the items' order, what was spent.
    assert (state / STATE).read_bytes() == (tmp_path / "whole" / STATE).read_bytes()
    assert sorted(path.name for path in state.iterdir()) == ["mine.txt", STATE]

    # What is finished is not begun again: the model is not even loaded.
    monkeypatch.setattr(Student, "__init__", lambda *_: pytest.fail("the model is loaded"))
    cost, again = runs(state)
    assert cost == whole and again.best()[1:] == book.best()[1:] and runs.told == [20] and len(runs.asked) == 2


def test_a_state_of_another_search_is_refused_before_the_model_is_loaded(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    runs(state, evaluations=8, identity={"engine": "torch"})
    content = (state / STATE).read_bytes()
    monkeypatch.setattr(Student, "__init__", lambda *_: pytest.fail("the model is loaded"))
    same: dict[str, Any] = {"evaluations": 8, "identity": {"engine": "torch"}}
    other = add_tokenizer(make_checkpoint("qwen3_moe", tmp_path / "n", seed=1, num_hidden_layers=2, num_experts=5))
    flat = {layer: np.ones(5) for layer in runs.space.layers}
    for name, change in (
        ("model", {"model": other}), ("search_data", {"items": SEVEN[:6]}), ("seed", {"seed": 1}),
        ("evaluations", {"evaluations": 9}), ("prior_and_start", {"scores": flat}),
        ("settings", {"config": RcoConfig(batch=2, check=5)}), ("engine", {"identity": {"engine": "vllm"}}),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"{name} is .* there and .* now"):
            runs(state, **{**same, **change})
    runs.space = replace(runs.space, temperatures=(0.5,))
    with pytest.raises(UsageError, match="temperatures is"):
        runs(state, **same)
    assert (state / STATE).read_bytes() == content
    for damaged in (b"x" * 20, content[: len(content) // 2], save({"alpha": torch.zeros(2, 5)})):
        (state / STATE).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is no state of rco"):
            runs(state, **same)


def test_routers_without_a_useful_gradient_are_refused(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family_checkpoint("llama4_text")
    with pytest.raises(UnsupportedError, match="weighs its experts' inputs"):
        Student(folder, ITEMS, space_of(folder, 4), RcoConfig())
