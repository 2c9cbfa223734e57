"""The gymnasium environment of the search: its checker, its masks, its rewards."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest

from leap_serve.errors import LeapError
from leap_training.pruning_space import PruningSpace, Reward
from leap_training.saliency import Routing, scores
from pruning_oracle import EXPERTS, LAYERS, Oracle, all_subsets, ledger, profile

pytest.importorskip("gymnasium", reason="gymnasium comes with the extra `train`")
from gymnasium.utils.env_checker import check_env

from leap_training.pruning_env import PruningEnv


def make(oracle: Oracle | None = None, allocation: str = "uniform", **settings: object) -> PruningEnv:
    return PruningEnv(ledger(oracle or Oracle(), allocation), scores(profile(), "reap"), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("reward", ["terminal", "dense"])
def test_gymnasium_s_checker_is_satisfied(reward: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(infinity|unwrapped|spec).*")
        check_env(make(reward=reward, shaping=0.5), skip_render_check=True)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_masked_random_play_always_ends_in_a_legal_plan(allocation: str) -> None:
    env, random, seen = make(allocation=allocation), np.random.default_rng(0), set()
    for _ in range(200):
        _, info = env.reset(seed=0)
        over = False
        while not over:
            # Never stop early, so that every episode spends the budget.
            mask = info["action_mask"][:-1] if info["action_mask"][:-1].any() else info["action_mask"]
            _, _, over, truncated, info = env.step(random.choice(np.flatnonzero(mask)))
            assert not truncated and info["valid"]
        seen.add(env.chosen.tobytes())
    legal = {subset.tobytes() for subset in all_subsets(env.space)}
    assert seen <= legal and len(seen) > 0.4 * min(len(legal), 200)


def test_masks_forbid_repeats_full_layers_early_stops_and_starved_floors() -> None:
    env = make(allocation="global")
    _, info = env.reset()
    stop = LAYERS * EXPERTS
    assert not info["action_mask"][stop]
    for action in range(4):
        _, _, _, _, info = env.step(np.int64(action))
    # Four of six are in the first layer; the other two belong to the second layer's floor of top_k = 2.
    assert not info["action_mask"][:EXPERTS].any() and info["action_mask"][EXPERTS:stop].all()
    observation, reward, over, _, info = env.step(np.int64(4))
    assert (reward, over, info["valid"]) == (-0.1, False, False) and observation["chosen"].sum() == 4
    env.step(np.int64(EXPERTS))
    _, reward, over, _, _ = env.step(np.int64(EXPERTS + 1))
    assert over and reward > 0


def test_stopping_early_is_a_choice_once_the_floors_are_filled() -> None:
    env = make(allocation="global")
    env.reset()
    for action in (0, 1, EXPERTS, EXPERTS + 1):
        _, _, over, _, _ = env.step(np.int64(action))
        assert not over
    _, reward, over, _, _ = env.step(np.int64(LAYERS * EXPERTS))
    assert over and reward == pytest.approx(1 / (1 + Oracle().loss(env.chosen)))


def play(env: PruningEnv, actions: list[int]) -> list[float]:
    env.reset()
    return [env.step(np.int64(action))[1] for action in actions]


def test_rewards_are_of_the_plan_and_dense_evaluates_every_complete_one() -> None:
    actions = [0, 1, 2, EXPERTS, EXPERTS + 1, EXPERTS + 2]
    sparse, full = Oracle(), Oracle()
    assert play(make(sparse), actions)[:-1] == [0.0] * 5 and sparse.asked == 1
    dense = play(make(full, reward="dense"), actions)
    # Complete once the second layer has its top_k = 2.
    assert [value > 0 for value in dense] == [False] * 4 + [True] * 2 and full.asked == 2
    assert dense[-1] == play(make(), actions)[-1]


def test_shaping_leaves_the_return_of_whole_episodes_unchanged() -> None:
    plain, shaped = make(), make(shaping=2.0)
    orders = itertools.permutations([0, 1, 2, EXPERTS, EXPERTS + 1, EXPERTS + 2])
    for actions in itertools.islice(orders, 0, 720, 45):
        without, rewards = play(plain, list(actions)), play(shaped, list(actions))
        assert sum(rewards) == pytest.approx(sum(without))
        assert any(abs(a - b) > 0.01 for a, b in zip(without, rewards, strict=True))


def test_endless_invalid_play_is_truncated() -> None:
    env = make()
    env.reset()
    ends = [env.step(np.int64(LAYERS * EXPERTS))[2:4] for _ in range(env.max_steps)]
    assert ends[-1] == (False, True) and not any(cut for _, cut in ends[:-1])


def test_what_cannot_be_searched_is_refused() -> None:
    routing = Routing.of(profile())
    for flags in ({"experts": 7}, {"budget": 0.0}, {}, {"experts": 1, "allocation": "global"}, {"allocation": "odd"}):
        with pytest.raises(LeapError):
            PruningSpace.of(routing, **flags)  # type: ignore[arg-type]
    with pytest.raises(LeapError, match="latency"):
        type(ledger(Oracle()))(Oracle(), ledger(Oracle()).space, Reward(latency_coef=1.0))
    with pytest.raises(LeapError, match="terminal"):
        make(reward="sometimes")
