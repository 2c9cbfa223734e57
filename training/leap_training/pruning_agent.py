"""The pruning agent (LEAP §3.1): PPO over whole subsets, started at a saliency ranking, on real evaluations.

One episode picks every retained expert, one after the other; its reward is one plan evaluation. Between batches of
evaluations the policy also trains on a model of what was evaluated so far, and of many episodes it draws, the model
chooses which to evaluate (DyNA-PPO, Angermueller et al. 2020): evaluations are dear, draws are not. Picks and features
are in :mod:`leap_training.pruning_policy`, rewards and counting in :mod:`leap_training.pruning_space`, the model in
:mod:`leap_training.surrogate`, the state on disk in :mod:`leap_training.search_state`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leap_serve.errors import UsageError
from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_training import ppo
from leap_training.pruning_policy import (
    Critic,
    Episodes,
    PruningPolicy,
    expert_features,
    prior_logits,
    similarity,
)
from leap_training.pruning_space import Chosen, Ledger
from leap_training.saliency import OBSERVED, Scores, scores
from leap_training.search_state import StateFolder, below, fingerprint, load_policy
from leap_training.search_state import save_policy as write_policy
from leap_training.surrogate import Surrogate

HEATING = 1.15
IDLE = 40
"""Updates without a single new plan, ever hotter, after which the space counts as exhausted."""


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Settings of a search.

    Args:
        episodes: plan evaluations to spend (repeated plans are free).
        batch: plans per update, evaluated in one call.
        reward: "terminal" (R of the finished plan) or "dense" (R of every step that is a plan; LEAP's algorithm 1).
        shaping: c of the potential-based shaping c·(Φ(s') − Φ(s)), Φ = the prior's saliency that is chosen.
        prior_strength: see :func:`leap_training.pruning_policy.prior_logits`.
        learning_rate: of the shared weights.
        offset_rate: of the offsets of single experts, on evaluated plans.
        ppo_epochs, clip_coef, gae_lambda, ent_coef, target_kl: PPO's; gamma is 1, an episode has a fixed length.
        screening: episodes drawn for each one that the model chooses to be evaluated; 0 evaluates what is drawn.
        optimism: the model's standard deviations added to its prediction, so that the unknown is tried.
        trust_after: evaluations before the model is used, unless it knows plans of another budget.
        trust_r2: leave-one-out R² below which it is not.
        dreams: updates on the model between two batches of evaluations; 0 for none.
        dream_episodes, dream_epochs, dream_rate: of these updates; dream_rate replaces offset_rate.
        patience: stop after so many updates without a better plan; 0 never does.
        seed: of everything that is drawn.
    """

    episodes: int = 500
    batch: int = 16
    reward: str = "terminal"
    shaping: float = 0.0
    prior_strength: float = 3.0
    learning_rate: float = 3e-4
    offset_rate: float = 0.3
    ppo_epochs: int = 4
    clip_coef: float = 0.2
    gae_lambda: float = 0.5
    ent_coef: float = 0.0
    target_kl: float | None = None
    screening: int = 16
    optimism: float = 1.0
    trust_after: int = 32
    trust_r2: float = 0.2
    dreams: int = 8
    dream_episodes: int = 64
    dream_epochs: int = 2
    dream_rate: float = 0.1
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reward not in ("terminal", "dense"):
            raise UsageError("--reward", f"there is no {self.reward!r}", "choose terminal or dense")


class Agent:
    """A search in progress."""

    def __init__(self, profile: Profile, prior: Scores, ledger: Ledger, config: AgentConfig) -> None:
        self.config, self.ledger, self.space = config, ledger, ledger.space
        self.prior = prior
        features = expert_features(profile, self.space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.policy = PruningPolicy(
                features, similarity(profile, self.space), prior_logits(prior, self.space, config.prior_strength),
                self.space,
            )  # fmt: skip
        self.critic = Critic(self.policy)
        self.surrogate = Surrogate(features, self.space.width)
        self.optimizer = torch.optim.Adam(
            [{"params": self.policy.shared(), "lr": config.learning_rate},
             {"params": [self.policy.offset], "lr": config.offset_rate}]
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(config.seed)
        self.updates = self.since_better = self.idle = 0
        self._saliency = self._shares()

    def _shares(self) -> torch.Tensor:
        """The share of a layer's saliency that each choice adds, over layers, [L·W + 1]."""
        found = np.stack([np.asarray(self.prior[layer], np.float64) for layer in self.space.layers])
        share = found / np.maximum(found.sum(1, keepdims=True), 1e-300) / len(found)
        wide = np.pad(share, ((0, 0), (0, self.space.width - share.shape[1])))
        return torch.from_numpy(np.append(wide.ravel(), 0.0)).float()

    def encode(self, picks: torch.Tensor) -> torch.Tensor:
        """Episodes [N, T] as choices [N, L·W] bool."""
        chosen = torch.zeros(len(picks), len(self.policy.prior) * self.space.width + 1, dtype=torch.bool)
        return chosen.scatter_(1, picks, True)[:, :-1]

    def subsets(self, picks: torch.Tensor) -> list[Chosen]:
        """The choices [L, W] of episodes [N, T]."""
        return list(self.encode(picks).unflatten(1, (-1, self.space.width)).numpy())

    def step(self) -> dict[str, float]:
        """Draw a batch, evaluate it together with the policy's mode, and improve the policy."""
        config, ledger = self.config, self.ledger
        asked, before = ledger.evaluations, ledger.curve[-1] if ledger.curve else -math.inf
        screened = (config.batch - 1) // 2 if self._trusted and config.screening and config.reward == "terminal" else 0
        drawn = self.policy.draw(config.batch - 1 - screened, self.generator)
        # The ranking's own plan is the first evaluation: no search returns a worse one.
        first = self.subsets(self.policy.draw(1, None))[0] if self.updates else self.space.best_of(self.prior)
        chosen = self._screen(screened) if screened else []
        gains, known = self._evaluate(drawn, [first, *chosen])
        metrics: dict[str, float] = {}
        if ledger.evaluations > 1:
            self._model()
            if len(known) > 1:
                metrics = {
                    "mean_reward": float(gains[known].sum(1).mean()),
                    **self._improve(drawn[known], gains[known]),
                }
            if self._trusted:
                self._dream()
        self.updates += 1
        self._regulate(ledger.evaluations - asked)
        best = ledger.curve[-1]
        self.since_better = 0 if best > before else self.since_better + 1
        return {"best_reward": best, "evaluations": float(ledger.evaluations), "heat": self.policy.heat,
                "surrogate_r2": self.surrogate.r2, **metrics}  # fmt: skip

    def _evaluate(self, picks: torch.Tensor, more: Sequence[Chosen]) -> tuple[torch.Tensor, list[int]]:
        """Evaluate episodes, and further plans before them, in one call; rewards [N, T], and which are known in full."""
        ends = self._ends(picks)
        steps = [
            (row, step)
            for row, end in enumerate(ends)
            for step in (range(end + 1) if self.config.reward == "dense" else (end,))
        ]
        prefixes = [self._prefix(picks[row], step) for row, step in steps]
        whole = [(at, chosen) for at, chosen in zip(steps, prefixes, strict=True) if self.space.complete(chosen)]
        rewards = self.ledger([*more, *(chosen for _, chosen in whole)], self.config.episodes)[len(more) :]
        gains, missing = torch.zeros(picks.shape), set()
        for ((row, step), _), reward in zip(whole, rewards, strict=True):
            if reward is None:
                missing.add(row)
            else:
                gains[row, step] += reward
        if self.config.shaping:
            gained = self._saliency[picks]
            # Φ is 0 in terminal states, so the last step gives back what was lent.
            gained[torch.arange(len(picks)), torch.tensor(ends)] -= gained.sum(1)
            gains += self.config.shaping * gained
        return gains, [row for row in range(len(picks)) if row not in missing]

    def _ends(self, picks: torch.Tensor) -> list[int]:
        """The step that completes each episode: the last that is not made after «stop»."""
        if not self.space.may_stop or self.space.picks > self.space.budget:
            return [picks.shape[1] - 1] * len(picks)
        stop = picks == len(self.policy.prior) * self.space.width
        return [int(row.float().argmax()) if row.any() else picks.shape[1] - 1 for row in stop]

    def _prefix(self, picks: torch.Tensor, step: int) -> Chosen:
        return self.subsets(picks[None, : step + 1])[0]

    def _screen(self, count: int) -> list[Chosen]:
        """Of many drawn episodes, the new plans that the model, optimistically, thinks most of."""
        drawn = self.encode(self.policy.draw(count * self.config.screening, self.generator)).unique(dim=0)
        mean, deviation = self.surrogate.predict(drawn)
        order = (mean + self.config.optimism * deviation).argsort(descending=True, stable=True)
        plans = (row.reshape(-1, self.space.width) for row in drawn[order].numpy())
        new = [plan for plan in plans if plan.tobytes() not in self.ledger.rewards]
        return new[:count]

    def _model(self) -> None:
        """Fit the surrogate, and with it the critic, to everything that was evaluated."""
        known = torch.from_numpy(np.stack([self.ledger.subset(key) for key in self.ledger.rewards])).flatten(1)
        self.surrogate.fit(known, torch.tensor(list(self.ledger.rewards.values()), dtype=torch.float64))
        self.critic.worth, self.critic.constant = self.surrogate.linear()

    def _dream(self) -> None:
        """Improve the policy on episodes that only the model has judged."""
        config = self.config
        for _ in range(config.dreams):
            picks = self.policy.draw(config.dream_episodes, self.generator)
            mean, deviation = self.surrogate.predict(self.encode(picks))
            gains = torch.zeros(picks.shape)
            gains[torch.arange(len(picks)), torch.tensor(self._ends(picks))] = mean + config.optimism * deviation
            self._improve(picks, gains, config.dream_rate, config.dream_epochs)

    def _improve(
        self, picks: torch.Tensor, gains: torch.Tensor, rate: float | None = None, epochs: int | None = None
    ) -> dict[str, float]:
        """PPO on episodes [N, T] and what each of their steps earned."""
        config = self.config
        self.optimizer.param_groups[1]["lr"] = config.offset_rate if rate is None else rate
        with torch.no_grad():
            episodes = Episodes(self.policy, picks)
            values, logprobs = self.critic.values(episodes), episodes.log_prob(picks)
        following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], 1)
        ended = torch.zeros_like(values, dtype=torch.bool)
        ended[:, -1] = True
        advantages, returns = ppo.gae(gains.T, values.T, following.T, ended.T, 1.0, config.gae_lambda)
        rollout = ppo.Rollout(picks, picks, None, logprobs, values, advantages.T.contiguous(), returns.T.contiguous())
        settings = ppo.PPOConfig(
            gamma=1.0, gae_lambda=config.gae_lambda, ppo_epochs=epochs or config.ppo_epochs, minibatch=len(picks),
            clip_coef=config.clip_coef, ent_coef=config.ent_coef, target_kl=config.target_kl, max_grad_norm=1e9,
        )  # fmt: skip
        return ppo.update(
            lambda seen, masks: Episodes(self.policy, seen), self.critic, self.optimizer, rollout, settings,
            self.generator,
        )  # fmt: skip

    def _regulate(self, new: int) -> None:
        """Keep the policy from repeating itself: draw hotter while less than half of a batch was new."""
        self.idle = 0 if new else self.idle + 1
        heat = self.policy.heat
        self.policy.heat = heat * HEATING if 2 * new < self.config.batch else max(1.0, heat / HEATING)

    @property
    def _trusted(self) -> bool:
        """Whether the model knows enough, from here or from another search, to be listened to."""
        enough = self.surrogate.carried is not None or self.ledger.evaluations >= self.config.trust_after
        return enough and self.surrogate.r2 >= self.config.trust_r2

    @property
    def finished(self) -> bool:
        """Whether the evaluations are spent, nothing better came for ``patience`` updates, or nothing new is left."""
        stale = self.config.patience and self.since_better >= self.config.patience
        return bool(stale) or self.idle >= IDLE or self.ledger.evaluations >= self.config.episodes

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that decides how the search goes on."""
        tensors = {f"policy.{name}": value.detach().clone() for name, value in self.policy.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{key}": torch.as_tensor(value) for key, value in state.items()}
        known = [self.ledger.subset(key) for key in self.ledger.rewards]
        empty = torch.zeros(0, len(self.policy.prior), self.space.width).bool()
        tensors["plans"] = torch.from_numpy(np.stack(known)) if known else empty
        tensors["losses"] = torch.tensor(list(self.ledger.losses.values()), dtype=torch.float64)
        tensors["rewards"] = torch.tensor(list(self.ledger.rewards.values()), dtype=torch.float64)
        tensors["generator"] = self.generator.get_state()
        tensors["counters"] = torch.tensor([self.updates, self.since_better, self.idle])
        tensors["heat"] = torch.tensor(self.policy.heat, dtype=torch.float64)
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue where :meth:`state` was taken."""
        self.policy.load_state_dict(below(tensors, "policy."))
        own = self.optimizer.state_dict()
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in below(tensors, "adam.").items():
            number, _, key = name.partition(".")
            moments.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": own["param_groups"]})
        subsets = [plan.numpy() for plan in tensors["plans"]]
        self.ledger.restore(subsets, tensors["losses"].tolist(), tensors["rewards"].tolist())
        self.generator.set_state(tensors["generator"])
        self.updates, self.since_better, self.idle = tensors["counters"].tolist()
        self.policy.heat = tensors["heat"].item()
        if self.ledger.evaluations > 1:
            self._model()


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search.

    Args:
        plan: the best plan, with the prior's scores.
        reward, loss: of that plan on the search's items.
        evaluations: distinct plans evaluated.
        curve: best reward after each evaluation.
        history: what every update reported, since the last start of the process.
    """

    plan: Plan
    reward: float
    loss: float
    evaluations: int
    curve: tuple[float, ...]
    history: tuple[dict[str, float], ...]


def best_ranking(profile: Profile, ledger: Ledger) -> tuple[str, Scores]:
    """The observed criterion whose own plan earns most, and its scores; each criterion costs one evaluation."""
    found = {name: scores(profile, name) for name in OBSERVED}
    rewards = ledger([ledger.space.best_of(one) for one in found.values()])
    earned = {name: reward for name, reward in zip(found, rewards, strict=True) if reward is not None}
    best = max(earned, key=lambda name: earned[name])
    return best, found[best]


def search(
    profile: Profile,
    prior: Scores,
    ledger: Ledger,
    config: AgentConfig = AgentConfig(),
    *,
    state: Path | None = None,
    data_sha256: str = "",
    losses_of: Mapping[str, Any] | None = None,
    warm: Path | None = None,
    save_policy: Path | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    **provenance: Any,
) -> Found:
    """Search until the evaluations are spent, and return the best plan.

    Args:
        profile: of the model, on training data of the task.
        prior: the saliency that the policy starts at.
        ledger: evaluates plans, on validation data; may hold nothing yet.
        state: folder that is written after every update and continued from, to the same result.
        data_sha256: identifies the ledger's items.
        losses_of: what else the ledger's losses and rewards hang on (engine, dtype, workload), as JSON.
        warm: policy of an earlier search.
        save_policy: where to write the policy at the end.
        report: called with the metrics of every update.
        provenance: what else the plan's ``made_by`` shall record.

    Raises UsageError where ``state`` belongs to another search, CheckpointError where it is damaged.
    """
    agent = Agent(profile, prior, ledger, config)
    if warm is not None:
        load_policy(agent, profile, warm)
    disk = StateFolder(state, fingerprint(agent, profile, data_sha256, losses_of)) if state is not None else None
    if disk is not None:
        disk.resume(agent)
    history = []
    while not agent.finished:
        metrics = agent.step()
        history.append(metrics)
        if disk is not None:
            disk.save(agent)
        if report is not None:
            report(metrics)
    if save_policy is not None:
        write_policy(agent, profile, save_policy)
    chosen, reward, loss = ledger.best()
    kept = {layer: tuple(map(float, prior[layer])) for layer in ledger.space.layers}
    plan = ledger.space.plan(
        chosen, kept, method="leap", settings=asdict(config), reward=asdict(ledger.reward), search_loss=loss,
        search_reward=reward, evaluations=ledger.evaluations, improvements=ledger.improvements(),
        search_data_sha256=data_sha256, **provenance,
    )  # fmt: skip
    return Found(plan, reward, loss, ledger.evaluations, tuple(ledger.curve), tuple(history))
