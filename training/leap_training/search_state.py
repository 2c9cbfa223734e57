"""A search on disk: what identifies it, its state after every update, and the weights that carry over to another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from leap_serve.errors import CheckpointError, UsageError
from leap_serve.evaluation.journal import Journal
from leap_serve.files import read_json, sha256_of, write_bytes, write_json
from leap_serve.plan import Plan
from leap_serve.profile import Profile

if TYPE_CHECKING:
    from leap_training.pruning_agent import Agent
    from leap_training.pruning_space import Evaluator


CARRIED = 8.0
"""Largest offset that is carried over. A finished search is sure of itself (offsets of 30 and more), and a policy that
starts so sharp hardly tries anything: on leap-tiny it ended behind a cold one, this one starts and ends level or ahead."""


def remembered(evaluate: Evaluator, journal: Journal, identity: str) -> Evaluator:
    """Losses of plans, of which the journal keeps every one: what it knows is not evaluated again, even after a kill.

    A search that is a function of its seed and of these losses so goes on where it was killed, by running once more.

    Args:
        evaluate: plans → losses.
        journal: where they are kept.
        identity: of all that decides a loss beside the plan: model, items, engine.
    """

    def ask(plans: Sequence[Plan]) -> list[float]:
        keys = [f"{identity} {plan.fingerprint}" for plan in plans]
        new = {key: plan for key, plan in zip(keys, plans, strict=True) if key not in journal.known}
        for key, loss in zip(new, evaluate(list(new.values())) if new else (), strict=True):
            journal.add(key, {"loss": float(loss)})
        return [journal.known[key]["loss"] for key in keys]

    return ask


def save_policy(agent: Agent, profile: Profile, path: Path) -> None:
    """Write what carries over to another search: the shared weights; and of this model and data the offsets of single
    experts, the evaluated subsets and their rewards.
    """
    policy, experts = agent.policy, agent.policy.similar.shape[1]
    tensors = {f"shared.{i}": p.detach().contiguous() for i, p in enumerate(policy.shared())}
    known = np.stack([agent.ledger.subset(key)[:, :experts] for key in agent.ledger.rewards])
    tensors["offset"] = policy.offset.detach()[:, :experts].contiguous()
    tensors["plans"] = torch.from_numpy(np.ascontiguousarray(known))
    tensors["rewards"] = torch.tensor(list(agent.ledger.rewards.values()), dtype=torch.float64)
    write_bytes(path, save(tensors, {"origin": _origin(profile)}))


def load_policy(agent: Agent, profile: Profile, path: Path) -> None:
    """Begin with what :func:`save_policy` wrote; CheckpointError where it does not fit.

    The shared weights fit any model. What is known of single experts is taken over only where model and profiled data
    are the same, as they are at another budget: the offsets, scaled down to ``CARRIED``, and the evaluated subsets, for
    the agent's model of the reward.
    """
    tensors, policy = _read(path), agent.policy
    own = policy.shared()
    named = [tensors.get(f"shared.{i}") for i in range(len(own))]
    experts = policy.offset[:, : policy.similar.shape[1]]
    offset, plans, rewards = (tensors.get(name) for name in ("offset", "plans", "rewards"))
    same = _metadata(path).get("origin") == _origin(profile)
    fits = all(t is not None and t.shape == p.shape for t, p in zip(named, own, strict=True))
    if offset is None or plans is None or rewards is None or not fits or (same and offset.shape != experts.shape):
        raise CheckpointError(path, "is not a policy of this version", "train one with leap search --method leap")
    with torch.no_grad():
        for parameter, value in zip(own, named, strict=True):
            assert value is not None
            parameter.copy_(value)
        if same:
            experts.copy_(offset * min(1.0, CARRIED / max(1e-9, float(offset.abs().max()))))
    if same and len(plans) > 1:
        wide = torch.nn.functional.pad(plans, (0, agent.space.width - plans.shape[-1]))
        agent.surrogate.carry(wide.flatten(1), rewards)


def _origin(profile: Profile) -> str:
    # One value: several would be written in any order, and equal policies are equal files.
    return f"model {profile.base.sha256}, profiled data {profile.data_sha256}"


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(path, f"not a readable safetensors file ({error})", "start anew") from None
    return tensors


def fingerprint(
    agent: Agent, profile: Profile, data_sha256: str, losses_of: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What must be the same for a search to be continued: model, data, space, prior, reward, settings, and what evaluates."""
    space, digest = agent.space, hashlib.sha256()
    for layer in space.layers:
        digest.update(np.ascontiguousarray(agent.prior[layer], np.float64).tobytes())
    for tensor in (*agent.policy.shared(), agent.policy.offset, *(agent.surrogate.carried or ())):
        digest.update(tensor.detach().numpy().tobytes())
    return {
        "model": profile.base.sha256, "profile_data": profile.data_sha256, "search_data": data_sha256,
        "prior_and_start": digest.hexdigest(), "budget": space.budget, "cap": space.cap, "top_k": list(space.top_k),
        "uniform": space.uniform, "temperatures": list(space.temperatures), "may_stop": space.may_stop,
        "reward": asdict(agent.ledger.reward), "settings": asdict(agent.config),
        "losses_of": dict(losses_of or {}),
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
