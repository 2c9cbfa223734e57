"""PPO: its parts against brute force, and CartPole solved."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from leap_training.ppo import METRICS, MaskedCategorical, PlackettLuce, PPOConfig, Rollout, gae, train, update


def solve_cartpole(seed: int) -> float:
    """Train for 100,000 steps; mean return of 30 greedy episodes with unseen starts."""
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium comes with the extra `train`")
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    torch.set_num_threads(1)
    torch.manual_seed(seed)

    def head(outputs: int, last: float) -> torch.nn.Sequential:
        layers = [torch.nn.Linear(4, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, outputs)]
        for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), last), strict=True):
            torch.nn.init.orthogonal_(layer.weight, gain)
            torch.nn.init.zeros_(layer.bias)
        return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])

    policy, value = head(2, 0.01), head(1, 1.0)
    config = PPOConfig(learning_rate=1e-3, gamma=0.98, gae_lambda=0.8, ppo_epochs=10, minibatch=256, max_grad_norm=0.5)
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=config.learning_rate)
    envs = SyncVectorEnv(
        [lambda: gymnasium.make("CartPole-v1") for _ in range(8)], autoreset_mode=AutoresetMode.SAME_STEP
    )
    train(
        envs, lambda seen, mask: MaskedCategorical(policy(seen), mask), lambda seen: value(seen)[:, 0], optimizer,
        config, total_steps=100_000, horizon=64, seed=seed,
    )  # fmt: skip
    env, returns = gymnasium.make("CartPole-v1"), []
    for episode in range(30):
        seen, _ = env.reset(seed=10_000 + episode)
        total, over = 0.0, False
        while not over:
            with torch.no_grad():
                action = int(policy(torch.as_tensor(seen)).argmax())
            seen, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            over = terminated or truncated
        returns.append(total)
    return sum(returns) / len(returns)


@pytest.mark.e2e
def test_cartpole_is_solved() -> None:
    assert solve_cartpole(1) >= 475


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_cartpole_is_solved_with_any_seed(seed: int) -> None:
    assert solve_cartpole(seed) >= 475


def test_gae_is_the_sum_of_discounted_deltas() -> None:
    random = torch.Generator().manual_seed(0)
    rewards, values, following = torch.randn(3, 6, 2, generator=random)
    ended = torch.zeros(6, 2, dtype=torch.bool)
    ended[2, 0] = ended[5] = True
    advantages, returns = gae(rewards, values, following, ended, 0.9, 0.7)
    for copy, step in itertools.product(range(2), range(6)):
        expected, weight = 0.0, 1.0
        for later in range(step, 6):
            expected += weight * float(rewards[later, copy] + 0.9 * following[later, copy] - values[later, copy])
            if ended[later, copy]:
                break
            weight *= 0.9 * 0.7
        assert float(advantages[step, copy]) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(returns, advantages + values)


def test_forbidden_actions_are_never_drawn_and_carry_no_gradient() -> None:
    logits = torch.tensor([[1.0, 2.0, 50.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False, True]])
    policy = MaskedCategorical(logits, mask)
    drawn = {int(policy.sample(torch.Generator().manual_seed(seed))) for seed in range(200)}
    assert drawn == {0, 1, 3}
    (policy.log_prob(torch.tensor([1])) + policy.entropy()).sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and logits.grad[0, 2] == 0
    probabilities = torch.tensor([1.0, 2.0, 0.0]).softmax(0)
    assert policy.entropy().item() == pytest.approx(float(-(probabilities * probabilities.log()).sum()), abs=1e-6)


def test_plackett_luce_probabilities_sum_to_one_and_match_the_draws() -> None:
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, 5.0])
    mask = torch.tensor([True, True, True, True, False])
    orders = torch.tensor(list(itertools.permutations(range(4), 2)))
    policy = PlackettLuce(logits.expand(len(orders), 5), 2, mask.expand(len(orders), 5))
    probabilities = policy.log_prob(orders).exp()
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-6)
    many = PlackettLuce(logits.expand(40_000, 5), 2, mask.expand(40_000, 5)).sample(torch.Generator().manual_seed(0))
    seen = (many[:, None] == orders).all(-1).float().mean(0)
    torch.testing.assert_close(seen, probabilities, atol=0.01, rtol=0)
    exact = float(-(probabilities * probabilities.log()).sum())
    assert float(PlackettLuce(logits[None], 2, mask[None]).entropy(many).mean()) == pytest.approx(exact, abs=0.01)


def bandit(advantages: torch.Tensor) -> tuple[torch.Tensor, Rollout]:
    """A policy over three actions, and a rollout of each of them."""
    logits = torch.zeros(3, requires_grad=True)
    zeros = torch.zeros(3)
    logprobs = torch.full((3,), -math.log(3.0))
    return logits, Rollout(torch.zeros(3, 1), torch.arange(3), None, logprobs, zeros, advantages, advantages)


def test_an_update_prefers_what_paid_and_reports_the_fixed_keys() -> None:
    logits, rollout = bandit(torch.tensor([0.0, 0.0, 1.0]))
    optimizer = torch.optim.SGD([logits], lr=1.0)
    metrics = update(
        lambda seen, mask: MaskedCategorical(logits.expand(len(seen), 3), mask), lambda seen: torch.zeros(len(seen)),
        optimizer, rollout, PPOConfig(ppo_epochs=2),
    )  # fmt: skip
    assert set(metrics) == set(METRICS)
    assert logits[2] > logits[0] and metrics["updates"] == 2


def test_updates_stop_at_the_kl_target_and_at_the_clip() -> None:
    def run(config: PPOConfig) -> tuple[dict[str, float], torch.Tensor]:
        logits, rollout = bandit(torch.tensor([-1.0, 0.0, 1.0]))
        metrics = update(
            lambda seen, mask: MaskedCategorical(logits.expand(len(seen), 3), mask),
            lambda seen: torch.zeros(len(seen)), torch.optim.SGD([logits], lr=3.0), rollout, config,
        )  # fmt: skip
        return metrics, logits.detach()

    free, moved = run(PPOConfig(ppo_epochs=50, max_grad_norm=100.0))
    held, _ = run(PPOConfig(ppo_epochs=50, max_grad_norm=100.0, target_kl=0.01))
    assert free["updates"] == 50 and held["updates"] < 50
    # Without the clip fifty steps of this size would leave nothing of the other actions.
    assert moved.softmax(0)[2] < 0.9
    loose, further = run(PPOConfig(ppo_epochs=50, max_grad_norm=100.0, clip_coef=1e9))
    assert further.softmax(0)[2] > moved.softmax(0)[2] and loose["clipfrac"] == 0.0


def test_sequences_of_choices_are_samples_too() -> None:
    logits = torch.zeros(4, requires_grad=True)

    class Steps(PlackettLuce):
        """Log-probabilities and entropies per choice."""

        def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
            return self.step_log_probs(actions)

        def entropy(self, actions: torch.Tensor) -> torch.Tensor:
            return super().entropy(actions)[:, None].expand(actions.shape)

    drawn = PlackettLuce(torch.zeros(64, 4), 2).sample(torch.Generator().manual_seed(0))
    old = PlackettLuce(torch.zeros(64, 4), 2).step_log_probs(drawn)
    gain = (drawn == 3).float()
    rollout = Rollout(drawn, drawn, None, old, torch.zeros(64, 2), gain, gain)
    update(
        lambda seen, mask: Steps(logits.expand(len(seen), 4), 2), lambda seen: torch.zeros(len(seen), 2),
        torch.optim.Adam([logits], lr=0.05), rollout, PPOConfig(minibatch=16),
    )  # fmt: skip
    assert int(logits.argmax()) == 3
