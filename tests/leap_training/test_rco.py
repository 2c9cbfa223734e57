"""RCO: its relaxed mask and its gated routers by definition, and its find on a model small enough to try every plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from families import make_checkpoint
from leap_serve.checkpoint import Checkpoint
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.engines.torch_subsets import masked_routers
from leap_serve.errors import UnsupportedError
from leap_serve.plan import Plan
from leap_serve.tasks.base import Item
from leap_training.batches import collate
from leap_training.pruning_space import Ledger, PruningSpace
from leap_training.rco import RcoConfig, Student, hardest, rco, relaxed, start, straight_through
from leap_training.saliency import Routing
from pruning_oracle import all_subsets, subset_of
from tiny_tokenizer import add_tokenizer, talking_copy

ITEMS = [Item(str(n), f"What is {n} and {n * n % 7}?", f" It is {n * 31 % 97}, of course.") for n in range(6)]
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
    ranks, reported = [], []
    for seed in range(3):
        book = Ledger(lambda plans: [known[subset_of(plan).tobytes()] for plan in plans], space)
        # It starts at the worst plan of all.
        worst = subsets[int(np.argmax(losses))]
        prior = {layer: 1.0 + row for layer, row in zip(space.layers, worst, strict=True)}
        cost = rco(folder, book, prior, ITEMS, 40, seed, lambda ledger: reported.append(ledger.evaluations))
        assert cost.backward_items == cost.forward_items - len(ITEMS)
        assert len(cost.marks) == book.evaluations == reported[-1]
        assert cost.marks[0] == 2.0 and cost.marks[-1] <= 40 and cost.forward_items / len(ITEMS) > 30
        ranks.append(sorted(losses).index(book.best()[2]))
    # Of 100 plans.
    assert max(ranks) < 8, ranks


def test_routers_without_a_useful_gradient_are_refused(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family_checkpoint("llama4_text")
    with pytest.raises(UnsupportedError, match="weighs its experts' inputs"):
        Student(folder, ITEMS, space_of(folder, 4), RcoConfig())
