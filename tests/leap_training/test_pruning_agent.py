"""The pruning agent against an exact oracle: its distribution, its search, and its state on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from leap_serve.errors import CheckpointError, LeapError, UsageError
from leap_serve.plan import Plan
from leap_training.controls import Given, evolution
from leap_training.pruning_agent import Agent, AgentConfig, search
from leap_training.pruning_policy import Episodes, PruningPolicy
from leap_training.pruning_space import Ledger, PruningSpace, Reward
from leap_training.saliency import Routing, allocate, scores
from leap_training.search_state import CARRIED, load_policy
from pruning_oracle import EXPERTS, KEEP, LAYERS, Oracle, all_subsets, ledger, profile

PROFILE = profile()
SCORES = scores(PROFILE, "reap")
# Few updates on the model: these tests are of the machinery, not of what it finds.
QUICK = AgentConfig(episodes=72, batch=12, dreams=2, dream_episodes=16)


def agent(allocation: str = "uniform", oracle: Oracle | None = None, config: AgentConfig = QUICK) -> Agent:
    return Agent(PROFILE, SCORES, ledger(oracle or Oracle(), allocation), config)


def stirred(allocation: str) -> Agent:
    """An agent whose every weight matters."""
    made = agent(allocation)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.policy.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_draws_follow_the_log_probabilities(allocation: str) -> None:
    made = stirred(allocation)
    picks = made.policy.draw(20_000, torch.Generator().manual_seed(0))
    distribution = Episodes(made.policy, picks[:2000])
    total = distribution.logprobs.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    # Importance weights of a uniform-by-pick draw average to 1 only if sampling and log_prob are the same policy.
    first = picks[:, 0]
    logprob = Episodes(made.policy, picks[:1]).logprobs[0, 0].exp()
    seen = torch.bincount(made.policy.candidate(first), minlength=len(logprob)) / len(first)
    torch.testing.assert_close(seen, logprob, atol=0.015, rtol=0)
    # The same of a later pick, among the episodes that share what was picked before it.
    prefix, step = picks[picks[:, :2].eq(picks[:, :2].mode(0).values).all(1)], 2
    logprob = Episodes(made.policy, prefix[:1]).logprobs[0, step].exp()
    seen = torch.bincount(made.policy.candidate(prefix[:, step]), minlength=len(logprob)) / len(prefix)
    torch.testing.assert_close(seen, logprob, atol=4 / math.sqrt(len(prefix)), rtol=0)
    legal = {subset.tobytes() for subset in all_subsets(made.space)}
    assert {subset.tobytes() for subset in made.subsets(picks[:500])} <= legal


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_search_begins_at_the_ranking(allocation: str) -> None:
    made = agent(allocation)
    plan = allocate(SCORES, Routing.of(PROFILE), experts=KEEP, allocation=allocation)
    (mode,) = made.subsets(made.policy.draw(1, None))
    if allocation == "uniform":
        np.testing.assert_array_equal(mode, made.space.best_of(SCORES))
    assert made.space.plan(made.space.best_of(SCORES)).fingerprint == plan.fingerprint
    made.step()
    assert next(iter(made.ledger.rewards)) == made.space.best_of(SCORES).tobytes()


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_agent_comes_close_to_the_best_of_all_subsets(allocation: str, seed: int) -> None:
    oracle = Oracle(seed=seed)
    book = ledger(oracle, allocation)
    losses = sorted(oracle.loss(subset) for subset in all_subsets(book.space))
    found = search(PROFILE, SCORES, book, AgentConfig(episodes=120, batch=12, seed=seed))
    rank = int(np.searchsorted(losses, found.loss - 1e-9))
    # A third of the uniform subsets, a seventh of the global ones, are evaluated at all.
    assert rank < 0.01 * len(losses) + 1, f"rank {rank} of {len(losses)}"
    assert found.loss == pytest.approx(oracle.loss(found_subset(found.plan)))


def found_subset(plan: Plan) -> np.ndarray:
    chosen = np.zeros((LAYERS, EXPERTS), bool)
    for row, layer in enumerate(plan.layers.values()):
        chosen[row, list(layer.retained)] = True
    return chosen


def test_evaluations_are_counted_once_in_whole_batches_and_never_exceed_the_limit() -> None:
    oracle = Oracle()
    found = search(PROFILE, SCORES, ledger(oracle), AgentConfig(episodes=50, batch=16))
    assert found.evaluations == oracle.asked == sum(oracle.calls) == len(found.curve) == 50
    assert 1 < len(oracle.calls) <= len(found.history) and max(oracle.calls) <= 16
    assert list(found.curve) == sorted(found.curve) and found.reward == found.curve[-1]


def test_a_search_ends_on_a_plateau() -> None:
    found = search(PROFILE, SCORES, ledger(Oracle()), AgentConfig(episodes=400, batch=16, patience=3))
    assert found.evaluations < 400 and len(set(found.curve[-3:])) == 1


def test_a_space_smaller_than_the_budget_is_searched_to_its_end() -> None:
    book = ledger(Oracle(), experts=EXPERTS)
    assert search(PROFILE, SCORES, book, AgentConfig(episodes=50)).evaluations == 1


class Killed(Exception):
    """Stands for the end of the process."""


class Mortal(Oracle):
    """An oracle that dies at its n-th call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def __call__(self, plans: Sequence[Plan]) -> list[float]:
        if not self.left:
            raise Killed
        self.left -= 1
        return super().__call__(plans)


@pytest.mark.parametrize("calls", [1, 4])
def test_a_resumed_search_gives_the_same_result(tmp_path: Path, calls: int) -> None:
    whole = search(PROFILE, SCORES, ledger(Oracle()), QUICK, save_policy=tmp_path / "whole.safetensors")
    with pytest.raises(Killed):
        search(PROFILE, SCORES, ledger(Mortal(calls)), QUICK, state=tmp_path / "state")
    oracle = Oracle()
    again = search(
        PROFILE, SCORES, ledger(oracle), QUICK, state=tmp_path / "state", save_policy=tmp_path / "again.safetensors"
    )
    assert again.curve == whole.curve and again.plan.fingerprint == whole.plan.fingerprint
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert oracle.asked < whole.evaluations
    # Finished: asks nothing more.
    done = Oracle()
    assert search(PROFILE, SCORES, ledger(done), QUICK, state=tmp_path / "state").curve == whole.curve
    assert done.asked == 0


def test_state_of_another_search_is_refused_and_left_alone(tmp_path: Path) -> None:
    search(PROFILE, SCORES, ledger(Oracle()), QUICK, state=tmp_path, data_sha256="a")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other_prior = scores(PROFILE, "frequency")
    with pytest.raises(UsageError, match="settings"):
        search(PROFILE, SCORES, ledger(Oracle()), AgentConfig(episodes=121), state=tmp_path, data_sha256="a")
    with pytest.raises(UsageError, match="search_data"):
        search(PROFILE, SCORES, ledger(Oracle()), QUICK, state=tmp_path, data_sha256="b")
    with pytest.raises(UsageError, match="prior"):
        search(PROFILE, other_prior, ledger(Oracle()), QUICK, state=tmp_path, data_sha256="a")
    with pytest.raises(UsageError, match="reward"):
        book = ledger(Oracle(), reward=Reward(alpha=2.0))
        search(PROFILE, SCORES, book, QUICK, state=tmp_path, data_sha256="a")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_damaged_state_is_refused(tmp_path: Path) -> None:
    search(PROFILE, SCORES, ledger(Oracle()), QUICK, state=tmp_path)
    (tensors,) = tmp_path.glob("search-*.safetensors")
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is not the file"):
        search(PROFILE, SCORES, ledger(Oracle()), QUICK, state=tmp_path)
    header = tmp_path / "search.json"
    header.write_text(header.read_text()[:-20])
    with pytest.raises(CheckpointError, match="JSON"):
        search(PROFILE, SCORES, ledger(Oracle()), QUICK, state=tmp_path)


def test_a_policy_carries_over_to_another_budget_and_less_of_it_to_another_task(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    search(PROFILE, SCORES, ledger(Oracle()), QUICK, save_policy=path)
    warm = Agent(PROFILE, SCORES, ledger(Oracle(), "global", experts=2), QUICK)
    cold = warm.policy.static().detach().clone()
    other = replace(PROFILE, data_sha256="0" * 64)
    load_policy(warm, other, path)
    assert not torch.equal(warm.policy.static(), cold) and not warm.policy.offset.any()
    assert warm.surrogate.carried is None
    load_policy(warm, PROFILE, path)
    assert warm.surrogate.carried is not None and len(warm.surrogate.carried[0]) == QUICK.episodes
    assert warm.policy.offset.any() and warm.policy.offset.abs().max() <= CARRIED
    search(PROFILE, SCORES, ledger(Oracle(), "global", experts=2), AgentConfig(episodes=20), warm=path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError):
        load_policy(warm, PROFILE, path)


def test_the_reward_weighs_quality_size_and_latency() -> None:
    oracle = Oracle()
    book = Ledger(oracle, ledger(oracle).space, Reward(2.0, 0.5, 0.25), latency=lambda plan: 0.8)
    chosen = book.space.best_of(SCORES)
    expected = 2 / (1 + oracle.loss(chosen)) - 0.5 * KEEP / EXPERTS - 0.25 * 0.8
    assert book([chosen]) == [pytest.approx(expected)]


def test_losses_that_are_no_numbers_are_refused() -> None:
    space = ledger(Oracle()).space
    for answer in ([math.nan], [], [1.0, 2.0]):
        with pytest.raises(LeapError, match="score_plans"):
            Ledger(lambda plans, answer=answer: answer, space)([space.best_of(SCORES)])  # type: ignore[misc]


def test_the_plan_says_what_made_it(tmp_path: Path) -> None:
    found = search(PROFILE, SCORES, ledger(Oracle()), QUICK, data_sha256="c" * 64, task="toy-gsm")
    found.plan.save(tmp_path / "plan.json")
    made = json.loads((tmp_path / "plan.json").read_text())["made_by"]
    assert made["method"] == "leap" and made["evaluations"] == QUICK.episodes and made["task"] == "toy-gsm"
    assert Plan.load(tmp_path / "plan.json").fingerprint == found.plan.fingerprint


class Warm(Oracle):
    """An oracle whose loss also depends on each layer's temperature: it is best at the second of three."""

    def __call__(self, plans: Sequence[Plan]) -> list[float]:
        losses = super().__call__(plans)
        return [
            loss + sum(abs(math.log(layer.temperature / 0.7)) for layer in plan.layers.values())
            for loss, plan in zip(losses, plans, strict=True)
        ]


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_temperatures_are_searched_per_layer(allocation: str) -> None:
    space = PruningSpace.of(
        Routing.of(PROFILE), experts=KEEP, allocation=allocation, temperature=(0.5, 0.7, 1.0), may_stop=False
    )
    book = Ledger(Warm(), space)
    found = search(PROFILE, SCORES, book, AgentConfig(episodes=120, batch=12, dreams=3))
    assert {layer.temperature for layer in found.plan.layers.values()} == {0.7}
    first = book.space.plan(book.subset(next(iter(book.rewards))))
    assert {layer.temperature for layer in first.layers.values()} == {1.0}
    made = Agent(PROFILE, SCORES, Ledger(Warm(), space), QUICK)
    picks = made.policy.draw(300, torch.Generator().manual_seed(0))
    assert all(space.legal(chosen) for chosen in made.subsets(picks))
    total = Episodes(made.policy, picks).logprobs.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize(("size_coef", "full"), [(0.0, True), (6.0, False)])
def test_an_episode_stops_early_where_size_costs_more_than_it_brings(size_coef: float, full: bool) -> None:
    oracle = Oracle()
    oracle.synergy[:] = 0.0
    space = PruningSpace.of(Routing.of(PROFILE), experts=4, allocation="global", may_stop=True)
    found = search(
        PROFILE, SCORES, Ledger(oracle, space, Reward(size_coef=size_coef)), AgentConfig(episodes=150, dreams=3)
    )
    assert (sum(found.plan.counts) == space.budget) is full
    if not full:
        assert found.plan.counts == list(space.top_k), "every further expert costs more than it brings"
    picks = stirred_to_stop(space).draw(2000, torch.Generator().manual_seed(0))
    logprobs = Episodes(stirred_to_stop(space), picks[:1]).logprobs[0]
    step = len(space.schedule) - space.schedule.count(None)
    same = picks[picks[:, :step].eq(picks[0, :step]).all(1)]
    seen = torch.bincount(same[:, step], minlength=logprobs.shape[1]) / len(same)
    torch.testing.assert_close(seen, logprobs[step].exp(), atol=4 / math.sqrt(len(same)), rtol=0)
    stop = logprobs.shape[1] - 1
    assert all((row[(row == stop).int().argmax() :] == stop).all() for row in picks if (row == stop).any())


def stirred_to_stop(space: PruningSpace) -> PruningPolicy:
    """A policy that stops now and then, and hardly varies before it may."""
    made = Agent(PROFILE, SCORES, Ledger(Oracle(), space), QUICK).policy
    with torch.no_grad():
        made.halt.copy_(torch.tensor([-1.0, 0.5]))
        made.offset[:, :2] += 6.0
    return made


def test_dense_rewards_evaluate_every_step_that_is_a_plan() -> None:
    oracle = Oracle()
    config = AgentConfig(episodes=100, batch=8, reward="dense")
    found = search(PROFILE, SCORES, ledger(oracle), config)
    sizes = set(oracle.sizes)
    floor, whole = LAYERS * 2, LAYERS * KEEP
    assert sizes == set(range(floor, whole + 1)), "the floors' plan, the whole one, and all between"
    assert sum(found.plan.counts) == whole and found.evaluations == 100
    made = Agent(PROFILE, SCORES, ledger(Oracle()), config)
    picks = made.policy.draw(3, made.generator)
    gains, known = made._evaluate(picks, [])
    assert known == [0, 1, 2] and (gains[:, : floor - 1] == 0).all() and (gains[:, floor - 1 :] > 0).all()


def test_shaping_sums_to_nothing_over_an_episode() -> None:
    plain, shaped = (Agent(PROFILE, SCORES, ledger(Oracle()), AgentConfig(shaping=shaping)) for shaping in (0.0, 0.7))
    picks = plain.policy.draw(5, torch.Generator().manual_seed(0))
    bare, lent = plain._evaluate(picks, [])[0], shaped._evaluate(picks, [])[0]
    torch.testing.assert_close(lent.sum(1), bare.sum(1))
    assert (lent[:, 0] > bare[:, 0]).all()


class Distant(Oracle):
    """An oracle whose losses stay well above 0."""

    def loss(self, chosen: np.ndarray) -> float:
        return 14.0 + super().loss(chosen)


def test_the_model_spares_evaluations() -> None:
    """As many evaluations with the model, without it, and by evolution, in a space too large to try."""
    layers, experts, found = 3, 24, {"model": 0.0, "none": 0.0, "evolution": 0.0}
    prior = scores(profile(layers, experts), "reap")
    for seed in range(2):
        for name, more in (("model", {}), ("none", {"screening": 0, "dreams": 0})):
            book = ledger(Distant(layers, experts, seed), experts=6)
            config = AgentConfig(episodes=160, seed=seed, **more)
            found[name] += search(profile(layers, experts), prior, book, config).loss
        book = ledger(Distant(layers, experts, seed), experts=6)
        evolution(book, Given(prior, 160, seed))
        found["evolution"] += book.best()[2]
    assert found["model"] < found["none"] < found["evolution"]
