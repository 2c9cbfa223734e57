"""Look-ahead: a model narrowed in memory is the cut, its tuning is finetune's, and nothing of it is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from families import SPECIFIC, make_checkpoint
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cut.write import cut
from leap_serve.engine import mean_loss
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.errors import PlanError, UsageError
from leap_serve.plan import BaseModel, LayerPlan, Plan
from leap_serve.tasks.registry import load_task
from leap_training.finetune import FinetuneConfig, finetune
from leap_training.lookahead import LookAhead, finalists, jaccard, narrowed, second_stage
from leap_training.pruning_agent import AgentConfig, search
from leap_training.saliency import scores
from parity import uneven_plan
from pruning_oracle import Oracle, all_subsets, ledger, profile
from reference import reference_logprobs

TASK = load_task("toy-gsm")
TRAIN, HELD_OUT = TASK.items("train", 24), TASK.items("validation", 8)
SHORT = FinetuneConfig(items=24, steps=4, batch=8)


def tiny_plan(*first: int) -> Plan:
    """16 experts of every layer of leap-tiny, from a different one on in each."""
    model = Checkpoint.open(resolve_model("leap-tiny"))
    layers = {
        layer: LayerPlan(tuple(range(at, at + 16)), model.top_k)
        for layer, at in zip(model.moe_layers, first, strict=True)
    }  # fmt: skip
    return Plan(model.identity(), model.num_experts, layers)


PLANS = [tiny_plan(0, 16, 32, 48), tiny_plan(8, 0, 8, 0)]


@pytest.fixture(scope="module")
def look() -> LookAhead:
    return LookAhead("leap-tiny", TRAIN, HELD_OUT, SHORT)


@pytest.mark.parametrize("family", SPECIFIC)
def test_a_narrowed_model_answers_as_the_masked_one_and_is_whole_again(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(family, tmp_path / family)
    model, plan = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False), uneven_plan(folder)
    ids = torch.arange(3, 40)[None]
    whole = model(input_ids=ids, use_cache=False).logits
    with narrowed(model, Checkpoint.open(folder).family, plan) as tuned:
        own = model(input_ids=ids, use_cache=False).logits
        own.square().mean().backward()
        assert all(parameter.grad is not None for parameter in tuned)
        with torch.no_grad():
            for parameter in tuned:
                parameter.mul_(2.0)
    layers = {index: (one.retained, one.top_k, one.temperature) for index, one in plan.layers.items()}
    (expected,) = reference_logprobs(folder, layers, [ids[0].tolist()])
    torch.testing.assert_close(own[0].log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(own, whole, atol=1e-3)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_few_steps_are_those_of_finetune(look: LookAhead, tmp_path: Path) -> None:
    cut(resolve_model("leap-tiny"), PLANS[0], tmp_path / "cut")
    expected = finetune(tmp_path / "cut", TASK.name, tmp_path / "tuned", SHORT)
    with narrowed(look.model, look.checkpoint.family, PLANS[0]) as tuned:
        losses = look.tune(tuned)
    assert losses == pytest.approx(expected, abs=1e-4)
    engine = TorchEngine(tmp_path / "cut", dtype="float32", device="cpu")
    before = mean_loss(engine.score(HELD_OUT))
    assert look.untuned(PLANS[0]) == pytest.approx(before, abs=1e-4)
    assert look(PLANS[:1])[0] < before - 0.2


def test_every_plan_starts_alike_whatever_came_before(look: LookAhead) -> None:
    # Sums of several threads differ in the last bits; a leftover of the plan before would differ in the first.
    assert look(PLANS) == pytest.approx([look(PLANS[1:])[0], look(PLANS[:1])[0]][::-1], rel=1e-5)


def test_what_cannot_be_looked_at_is_refused(look: LookAhead) -> None:
    with pytest.raises(PlanError, match="was made for"):
        look([Plan(BaseModel("other", "0" * 64), 64, PLANS[0].layers)])
    with pytest.raises(UsageError, match="scored on 0"):
        LookAhead("leap-tiny", TRAIN, [], SHORT)


def test_finalists_are_the_best_that_differ() -> None:
    book = ledger(Oracle())
    book(all_subsets(book.space))
    chosen = finalists(book, 4, overlap=0.5)
    rewards = [book.rewards[one.tobytes()] for one in chosen]
    assert rewards == sorted(rewards, reverse=True) and rewards[0] == book.best()[1]
    assert all(jaccard(a, b) <= 0.5 for i, a in enumerate(chosen) for b in chosen[:i])
    # None that is better than the last one was left out, but for its likeness to one that is in.
    for key, reward in book.rewards.items():
        subset = book.subset(key)
        assert reward <= rewards[-1] or max(jaccard(subset, one) for one in chosen) > 0.5
    assert len(finalists(book, 3, overlap=1.0)) == 3
    assert [np.array_equal(one, book.best()[0]) for one in finalists(book, 1)] == [True]


class Tuned(Oracle):
    """Another order of the plans, as tuning makes it, which ends the process at its n-th call."""

    def __init__(self, calls: int = -1) -> None:
        super().__init__(seed=7)
        self.left = calls

    def __call__(self, plans: object) -> list[float]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().__call__(plans)  # type: ignore[arg-type]


def test_the_second_stage_goes_on_from_the_policy_and_resumes_to_the_same(tmp_path: Path) -> None:
    own = profile()
    prior, config = scores(own, "reap"), AgentConfig(episodes=24, batch=8, dreams=0)
    first = ledger(Oracle())
    search(own, prior, first, config, state=tmp_path / "one")
    search(own, prior, ledger(Oracle()), config, state=tmp_path / "two")

    def stage(oracle: Tuned, state: Path) -> dict[bytes, float]:
        book = ledger(oracle)
        book(finalists(first, 4, overlap=0.7))
        second_stage(own, prior, book, AgentConfig(episodes=44, batch=8, dreams=0), state)
        return book.losses

    whole = stage(Tuned(), tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        stage(Tuned(3), tmp_path / "two")
    oracle = Tuned()
    assert stage(oracle, tmp_path / "two") == whole
    assert len(whole) == 44 and oracle.asked < 44
    assert min(whole.values()) < min(Tuned().loss(one) for one in finalists(first, 4, overlap=0.7))
