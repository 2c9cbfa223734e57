"""The pruning agent (LEAP §3.1): PPO over whole subsets, started at a saliency ranking, on real evaluations.

One episode picks every retained expert, one after the other; its reward is one plan evaluation. Picks, features
and baseline are in :mod:`leap_training.pruning_policy`, rewards and counting in :mod:`leap_training.pruning_space`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from leap_serve.errors import CheckpointError, UsageError
from leap_serve.files import read_json, sha256_of, write_bytes, write_json
from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_training import ppo
from leap_training.pruning_policy import (
    AdditiveCritic,
    Episodes,
    PruningPolicy,
    expert_features,
    prior_logits,
    similarity,
)
from leap_training.pruning_space import Chosen, Ledger
from leap_training.saliency import OBSERVED, Scores, scores

HEATING = 1.15
IDLE = 40
"""Updates without a single new plan, ever hotter, after which the space counts as exhausted."""


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Settings of a search.

    Args:
        episodes: plan evaluations to spend (repeated plans are free).
        batch: episodes per update, evaluated in one call.
        prior_strength: see :func:`leap_training.pruning_policy.prior_logits`.
        learning_rate: of the shared weights.
        offset_rate: of the offsets of single experts.
        ppo_epochs, clip_coef, gae_lambda, ent_coef, target_kl: PPO's; gamma is 1, an episode has a fixed length.
        ridge, half_life: of the value baseline; half_life in plans.
        patience: stop after so many updates without a better plan; 0 never does.
        seed: of everything that is drawn.
    """

    episodes: int = 500
    batch: int = 16
    prior_strength: float = 3.0
    learning_rate: float = 3e-4
    offset_rate: float = 0.3
    ppo_epochs: int = 4
    clip_coef: float = 0.2
    gae_lambda: float = 0.5
    ent_coef: float = 0.0
    target_kl: float | None = None
    ridge: float = 1.0
    half_life: float = 200.0
    patience: int = 0
    seed: int = 0


class Agent:
    """A search in progress."""

    def __init__(self, profile: Profile, prior: Scores, ledger: Ledger, config: AgentConfig) -> None:
        self.config, self.ledger, self.space = config, ledger, ledger.space
        self.prior = prior
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.policy = PruningPolicy(
                expert_features(profile, self.space), similarity(profile, self.space),
                prior_logits(prior, self.space, config.prior_strength), self.space,
            )  # fmt: skip
        self.critic = AdditiveCritic(self.policy, config.ridge, config.half_life)
        self.optimizer = torch.optim.Adam(
            [{"params": self.policy.shared(), "lr": config.learning_rate},
             {"params": [self.policy.offset], "lr": config.offset_rate}]
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(config.seed)
        self.updates = self.since_better = self.idle = 0

    def subsets(self, picks: torch.Tensor) -> list[Chosen]:
        """The subsets [L, E] of episodes [N, T]."""
        chosen = torch.zeros(len(picks), math.prod(self.space.shape), dtype=torch.bool)
        chosen.scatter_(1, picks, True)
        return list(chosen.view(-1, *self.space.shape).numpy())

    def step(self) -> dict[str, float]:
        """Draw a batch, evaluate it together with the policy's mode, and improve the policy."""
        config, before = self.config, self.ledger.curve[-1] if self.ledger.curve else -math.inf
        mode = self.policy.draw(1, None) if self.updates else None
        picks = self.policy.draw(config.batch - (mode is not None), self.generator)
        wanted = self.subsets(picks if mode is None else torch.cat([mode, picks]))
        if not self.updates:
            # The ranking's own plan is the first evaluation: no search returns a worse one.
            wanted = [self.space.best_of(self.prior), *wanted[1:]]
            picks = picks[1:]
        asked = self.ledger.evaluations
        rewards = self.ledger(wanted, config.episodes)[1:]
        known = [row for row, reward in enumerate(rewards) if reward is not None]
        metrics = self._improve(picks[known], torch.tensor([rewards[row] for row in known])) if len(known) > 1 else {}
        self.updates += 1
        self._regulate(self.ledger.evaluations - asked)
        best = self.ledger.curve[-1]
        self.since_better = 0 if best > before else self.since_better + 1
        return {"best_reward": best, "evaluations": float(self.ledger.evaluations), "heat": self.policy.heat,
                **metrics}  # fmt: skip

    def _regulate(self, new: int) -> None:
        """Keep the policy from repeating itself: draw hotter while less than half of a batch was new."""
        self.idle = 0 if new else self.idle + 1
        heat = self.policy.heat
        self.policy.heat = heat * HEATING if 2 * new < self.config.batch else max(1.0, heat / HEATING)

    def _improve(self, picks: torch.Tensor, rewards: torch.Tensor) -> dict[str, float]:
        config, ledger = self.config, self.ledger
        known = torch.from_numpy(np.stack([ledger.subset(key) for key in ledger.rewards])).flatten(1)
        self.critic.fit(known, torch.tensor(list(ledger.rewards.values())))
        with torch.no_grad():
            episodes = Episodes(self.policy, picks)
            values, logprobs = self.critic.values(episodes), episodes.log_prob(picks)
        gains = torch.zeros_like(values)
        gains[:, -1] = rewards
        following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], 1)
        ended = torch.zeros_like(values, dtype=torch.bool)
        ended[:, -1] = True
        advantages, returns = ppo.gae(gains.T, values.T, following.T, ended.T, 1.0, config.gae_lambda)
        rollout = ppo.Rollout(picks, picks, None, logprobs, values, advantages.T.contiguous(), returns.T.contiguous())
        settings = ppo.PPOConfig(
            gamma=1.0, gae_lambda=config.gae_lambda, ppo_epochs=config.ppo_epochs, minibatch=len(picks),
            clip_coef=config.clip_coef, ent_coef=config.ent_coef, target_kl=config.target_kl, max_grad_norm=1e9,
        )  # fmt: skip
        metrics = ppo.update(
            lambda seen, masks: Episodes(self.policy, seen), self.critic, self.optimizer, rollout, settings,
            self.generator,
        )  # fmt: skip
        return {"mean_reward": float(rewards.mean()), **metrics}

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
        tensors["plans"] = torch.from_numpy(np.stack(known)) if known else torch.zeros(0, *self.space.shape).bool()
        tensors["losses"] = torch.tensor(list(self.ledger.losses.values()), dtype=torch.float64)
        tensors["rewards"] = torch.tensor(list(self.ledger.rewards.values()), dtype=torch.float64)
        tensors["generator"] = self.generator.get_state()
        tensors["counters"] = torch.tensor([self.updates, self.since_better, self.idle])
        tensors["heat"] = torch.tensor(self.policy.heat, dtype=torch.float64)
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue where :meth:`state` was taken."""
        self.policy.load_state_dict(_below(tensors, "policy."))
        own = self.optimizer.state_dict()
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _below(tensors, "adam.").items():
            number, _, key = name.partition(".")
            moments.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": own["param_groups"]})
        subsets = [plan.numpy() for plan in tensors["plans"]]
        self.ledger.restore(subsets, tensors["losses"].tolist(), tensors["rewards"].tolist())
        self.generator.set_state(tensors["generator"])
        self.updates, self.since_better, self.idle = tensors["counters"].tolist()
        self.policy.heat = tensors["heat"].item()

    def save_policy(self, path: Path) -> None:
        """Write the shared weights, for a warm start on another task, budget or model."""
        write_bytes(path, save({f"shared.{i}": p.detach().contiguous() for i, p in enumerate(self.policy.shared())}))

    def warm_start(self, path: Path) -> None:
        """Begin with the shared weights of :meth:`save_policy`; CheckpointError where they do not fit."""
        tensors = _read(path)
        own = self.policy.shared()
        named = [tensors.get(f"shared.{i}") for i in range(len(own))]
        if any(t is None or t.shape != p.shape for t, p in zip(named, own, strict=True)):
            raise CheckpointError(path, "is not a policy of this version", "train one with leap search --method leap")
        with torch.no_grad():
            for parameter, value in zip(own, named, strict=True):
                parameter.copy_(value)


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(path, f"not a readable safetensors file ({error})", "start anew") from None
    return tensors


def fingerprint(agent: Agent, profile: Profile, data_sha256: str) -> dict[str, Any]:
    """What must be the same for a search to be continued: model, data, space, prior, reward and settings."""
    space, digest = agent.space, hashlib.sha256()
    for layer in space.layers:
        digest.update(np.ascontiguousarray(agent.prior[layer], np.float64).tobytes())
    for parameter in agent.policy.shared():
        digest.update(parameter.detach().numpy().tobytes())
    return {
        "model": profile.base.sha256, "profile_data": profile.data_sha256, "search_data": data_sha256,
        "prior_and_start": digest.hexdigest(), "budget": space.budget, "cap": space.cap, "top_k": list(space.top_k),
        "uniform": space.uniform, "temperature": space.temperature, "reward": asdict(agent.ledger.reward),
        "settings": asdict(agent.config),
    }  # fmt: skip


class StateFolder:
    """A search on disk: ``search.json`` names the tensors that belong to it, and is replaced last.

    A kill at any instant leaves the state after one update or the next, whole.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.header = folder / "search.json"

    def save(self, agent: Agent) -> None:
        """Write the state after an update."""
        content = save({name: value.contiguous() for name, value in agent.state().items()})
        digest = hashlib.sha256(content).hexdigest()
        name = f"search-{agent.updates}-{digest[:12]}.safetensors"
        write_bytes(self.folder / name, content)
        best = agent.ledger.best()
        progress = {"updates": agent.updates, "evaluations": agent.ledger.evaluations, "best_reward": best[1],
                    "best_loss": best[2]}  # fmt: skip
        write_json(self.header, {**self.identity, "tensors": name, "sha256": digest, "progress": progress})
        for old in self.folder.glob("search-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def resume(self, agent: Agent) -> bool:
        """Continue what is there; False where nothing is. Raises where it is damaged, or of another search."""
        if not self.header.exists():
            return False
        found = read_json(self.header)
        if not isinstance(found, dict):
            raise CheckpointError(self.header, "is not the state of a search", "start anew")
        for key, value in self.identity.items():
            if found.get(key) != value:
                raise UsageError(
                    self.header, f"{key} is {_short(found.get(key))} there and {_short(value)} now",
                    "repeat the same command to resume, or choose another state folder",
                )  # fmt: skip
        path = self.folder / str(found.get("tensors"))
        if not path.is_file() or sha256_of(path) != found.get("sha256"):
            raise CheckpointError(path, f"is not the file that {self.header.name} describes", "start anew")
        agent.load_state(_read(path))
        return True


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 160 else text[:157] + "…"


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
        warm: shared weights of an earlier search.
        save_policy: where to write the shared weights at the end.
        report: called with the metrics of every update.
        provenance: what else the plan's ``made_by`` shall record.

    Raises UsageError where ``state`` belongs to another search, CheckpointError where it is damaged.
    """
    agent = Agent(profile, prior, ledger, config)
    if warm is not None:
        agent.warm_start(warm)
    disk = StateFolder(state, fingerprint(agent, profile, data_sha256)) if state is not None else None
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
        agent.save_policy(save_policy)
    chosen, reward, loss = ledger.best()
    kept = {layer: tuple(map(float, prior[layer])) for layer in ledger.space.layers}
    plan = ledger.space.plan(
        chosen, kept, method="leap", settings=asdict(config), reward=asdict(ledger.reward), search_loss=loss,
        search_reward=reward, evaluations=ledger.evaluations, search_data_sha256=data_sha256, **provenance,
    )  # fmt: skip
    return Found(plan, reward, loss, ledger.evaluations, tuple(ledger.curve), tuple(history))
