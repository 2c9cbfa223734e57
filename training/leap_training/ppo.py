"""Proximal policy optimisation (Schulman et al. 2017) in one file, in cleanrl's manner; needs torch alone.

Actor and critic are passed in. ``actor(observations, masks)`` returns a :class:`Distribution`,
``critic(observations)`` values. A sample may be one choice (log-probabilities, values, advantages are [M])
or a sequence of T choices ([M, T]); minibatches are drawn over the first dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

METRICS = (
    "policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance", "grad_norm", "updates",
)  # fmt: skip
"""Keys of what :func:`update` returns, always all of them."""


@dataclass(frozen=True, slots=True)
class PPOConfig:
    """Settings, by the paper's names.

    Args:
        learning_rate: of Adam, where the caller builds the optimizer from it.
        gamma: discount.
        gae_lambda: λ of generalised advantage estimation.
        ppo_epochs: passes over a rollout.
        minibatch: samples per gradient step.
        clip_coef: ε of the clipped surrogate.
        clip_value: whether the value loss is clipped by the same ε.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the value loss.
        max_grad_norm: gradients are scaled down to this norm.
        target_kl: an epoch after which the approximate KL exceeds it is the last; None never stops early.
        normalize_advantages: per minibatch, to mean 0 and deviation 1.
    """

    learning_rate: float = 3e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    ppo_epochs: int = 4
    minibatch: int = 256
    clip_coef: float = 0.2
    clip_value: bool = False
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    target_kl: float | None = None
    normalize_advantages: bool = True


class Distribution(Protocol):
    """What an actor returns for M observations."""

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw one action per observation, [M, …]."""
        ...

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the actions, [M] or [M, T]."""
        ...

    def entropy(self, actions: torch.Tensor) -> torch.Tensor:
        """Entropy in nats, [M] or [M, T]; where there is no closed form, the chain rule's terms along the actions."""
        ...


Actor = Callable[[torch.Tensor, torch.Tensor | None], Distribution]
Critic = Callable[[torch.Tensor], torch.Tensor]


class MaskedCategorical:
    """One of n actions; logits [..., n], mask [..., n] bool (True: allowed, at least one per row)."""

    def __init__(self, logits: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        self.allowed = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
        # A finite floor would leave forbidden actions a probability, and -inf - -inf is nan in log_softmax.
        self.logprobs = logits.masked_fill(~self.allowed, -math.inf).log_softmax(-1)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw by the Gumbel trick."""
        return (self.logprobs + gumbel(self.logprobs.shape, generator)).argmax(-1)

    def mode(self) -> torch.Tensor:
        """The likeliest action."""
        return self.logprobs.argmax(-1)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability of actions [...]; -inf for a forbidden one."""
        return self.logprobs.gather(-1, actions[..., None])[..., 0]

    def entropy(self, actions: torch.Tensor | None = None) -> torch.Tensor:
        """Exact entropy [...]; the actions do not matter."""
        logprobs = self.logprobs.masked_fill(~self.allowed, 0.0)
        return -(logprobs.exp() * logprobs * self.allowed).sum(-1)


class PlackettLuce:
    """k of n without replacement, in order; logits [..., n], mask as above with at least k allowed."""

    def __init__(self, logits: torch.Tensor, k: int, mask: torch.Tensor | None = None) -> None:
        self.k = k
        self.logits = logits if mask is None else logits.masked_fill(~mask, -math.inf)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw orders [..., k] by Gumbel-top-k (Kool et al. 2019): the k largest perturbed logits, largest first."""
        return (self.logits + gumbel(self.logits.shape, generator)).topk(self.k, dim=-1).indices

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability [...] of the drawn orders [..., k]."""
        return self.step_log_probs(actions).sum(-1)

    def step_log_probs(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability of each choice given those before it, [..., k]."""
        chosen = self.logits.gather(-1, actions)
        return chosen - self._remaining(actions).logsumexp(-1)

    def entropy(self, actions: torch.Tensor) -> torch.Tensor:
        """Chain-rule estimate [...]: the sum of the conditional entropies along the drawn orders."""
        logprobs = self._remaining(actions).log_softmax(-1)
        finite = logprobs.masked_fill(logprobs == -math.inf, 0.0)
        return -(logprobs.exp() * finite).sum((-2, -1))

    def _remaining(self, actions: torch.Tensor) -> torch.Tensor:
        """Logits of what may still be chosen before each choice, [..., k, n]."""
        taken = torch.nn.functional.one_hot(actions, self.logits.shape[-1]).cumsum(-2)
        before = torch.cat([torch.zeros_like(taken[..., :1, :]), taken[..., :-1, :]], -2).bool()
        return self.logits[..., None, :].expand(before.shape).masked_fill(before, -math.inf)


def gumbel(shape: Iterable[int], generator: torch.Generator | None) -> torch.Tensor:
    """Standard Gumbel noise; drawn in float64, so that no draw is infinite."""
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return (-(-uniform.log()).clamp_min(1e-300).log()).float()


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    ended: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016); returns (advantages, returns).

    Args, each [T, N]:
        rewards: r_t.
        values: V(s_t).
        next_values: V(s_{t+1}) of the true successor: 0 where the episode terminated, the value of its last
            observation where it was only cut off.
        ended: whether the episode ended with step t, for either reason.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[0])
    deltas = rewards + gamma * next_values - values
    for step in reversed(range(len(rewards))):
        following = deltas[step] + gamma * gae_lambda * (~ended[step]) * following
        advantages[step] = following
    return advantages, advantages + values


@dataclass(frozen=True, slots=True)
class Rollout:
    """What the current policy did, M samples: observations and actions [M, …], the rest [M] or [M, T]; masks or None."""

    observations: torch.Tensor
    actions: torch.Tensor
    masks: torch.Tensor | None
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


def joined(rollouts: Sequence[Rollout]) -> Rollout:
    """The samples of several rollouts, one after the other."""
    parts = {field.name: [getattr(one, field.name) for one in rollouts] for field in fields(Rollout)}
    return Rollout(**{name: None if found[0] is None else torch.cat(found) for name, found in parts.items()})


def update(
    actor: Actor,
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    config: PPOConfig,
    generator: torch.Generator | None = None,
    penalty: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Improve the policy on one rollout; return :data:`METRICS`, means over the gradient steps taken.

    ``penalty``, given a minibatch's observations, is added to its loss (a KL target, say).
    """
    total = len(rollout.actions)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    seen: dict[str, list[float]] = {key: [] for key in (*METRICS[:5], "grad_norm")}
    for _ in range(config.ppo_epochs):
        order = torch.randperm(total, generator=generator)
        kls = []
        for part in order.split(config.minibatch):
            loss, metrics = _loss(actor, critic, rollout, part, config)
            if penalty is not None:
                loss = loss + penalty(rollout.observations[part])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            for key, value in {**metrics, "grad_norm": float(norm)}.items():
                seen[key].append(value)
            kls.append(metrics["approx_kl"])
        if config.target_kl is not None and sum(kls) / len(kls) > config.target_kl:
            break
    means = {key: sum(values) / len(values) for key, values in seen.items()}
    variance = float(rollout.returns.var(correction=0))
    residual = float((rollout.returns - rollout.values).var(correction=0))
    # Returns that do not vary leave nothing to explain.
    explained = 1.0 - residual / variance if variance > 0 else 0.0
    return {**means, "explained_variance": explained, "updates": float(len(seen["policy_loss"]))}


def _loss(
    actor: Actor, critic: Critic, rollout: Rollout, part: torch.Tensor, config: PPOConfig
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one minibatch, and its metrics."""
    observations, actions = rollout.observations[part], rollout.actions[part]
    policy = actor(observations, None if rollout.masks is None else rollout.masks[part])
    logratio = policy.log_prob(actions) - rollout.logprobs[part]
    ratio = logratio.exp()
    advantages = rollout.advantages[part]
    if config.normalize_advantages and advantages.numel() > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = ratio.clamp(1 - config.clip_coef, 1 + config.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    values, old, returns = critic(observations), rollout.values[part], rollout.returns[part]
    error = (values - returns).square()
    if config.clip_value:
        bounded = old + (values - old).clamp(-config.clip_coef, config.clip_coef)
        error = torch.max(error, (bounded - returns).square())
    value_loss = 0.5 * error.mean()
    entropy = policy.entropy(actions).mean()
    with torch.no_grad():
        # k3 of Schulman's note «Approximating KL Divergence»: unbiased, never negative.
        kl = (ratio - 1 - logratio).mean()
        clipfrac = ((ratio - 1).abs() > config.clip_coef).float().mean()
    named = zip(METRICS, (policy_loss, value_loss, entropy, kl, clipfrac), strict=False)
    metrics = {key: float(value.detach()) for key, value in named}
    return policy_loss - config.ent_coef * entropy + config.vf_coef * value_loss, metrics


def train(
    envs: Any,
    actor: Actor,
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    config: PPOConfig,
    *,
    total_steps: int,
    horizon: int,
    seed: int,
    anneal: bool = True,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> list[float]:
    """Train on a gymnasium vector environment; return the undiscounted return of every finished episode.

    Args:
        envs: with ``autoreset_mode`` SAME_STEP; ``info["action_mask"]`` [N, n] is honoured where there is one.
        total_steps: environment steps, over all copies.
        horizon: steps per copy and update.
        anneal: let the learning rate fall linearly to 0.
        report: called with (steps done, metrics) after every update.
    """
    generator = torch.Generator().manual_seed(seed)
    observation, info = envs.reset(seed=seed)
    running, episodes = [0.0] * envs.num_envs, []
    rates = [group["lr"] for group in optimizer.param_groups]
    per_update = horizon * envs.num_envs
    for done in range(0, total_steps, per_update):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - done / total_steps) if anneal else rate
        steps: list[tuple[torch.Tensor, ...]] = []
        masks: list[torch.Tensor] = []
        for _ in range(horizon):
            seen = torch.as_tensor(observation, dtype=torch.float32)
            mask = torch.as_tensor(info["action_mask"]).bool() if "action_mask" in info else None
            with torch.no_grad():
                policy = actor(seen, mask)
                action = policy.sample(generator)
                logprob, value = policy.log_prob(action), critic(seen)
            observation, reward, terminated, truncated, info = envs.step(action.numpy())
            ended = torch.as_tensor(terminated | truncated)
            following = torch.as_tensor(observation, dtype=torch.float32).clone()
            for copy in ended.nonzero()[:, 0].tolist():
                following[copy] = torch.as_tensor(info["final_obs"][copy], dtype=torch.float32)
            with torch.no_grad():
                bootstrap = critic(following) * ~torch.as_tensor(terminated)
            steps.append((seen, action, logprob, value, torch.as_tensor(reward).float(), bootstrap, ended))
            if mask is not None:
                masks.append(mask)
            for copy, gained in enumerate(reward):
                running[copy] += float(gained)
                if ended[copy]:
                    episodes.append(running[copy])
                    running[copy] = 0.0
        seen, action, logprob, value, gains, bootstrap, ended = map(torch.stack, zip(*steps, strict=True))
        advantages, returns = gae(gains, value, bootstrap, ended, config.gamma, config.gae_lambda)
        flat = [x.flatten(0, 1) for x in (seen, action, logprob, value, advantages, returns)]
        mask = torch.stack(masks).flatten(0, 1) if masks else None
        rollout = Rollout(flat[0], flat[1], mask, flat[2], flat[3], flat[4], flat[5])
        metrics = update(actor, critic, optimizer, rollout, config, generator)
        if report is not None:
            report(done + per_update, metrics)
    return episodes
