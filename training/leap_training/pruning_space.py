"""What the agent, its environment and the controls share: legal plans, their reward, and who counts evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from leap_serve.engine import Engine, mean_loss
from leap_serve.errors import LeapError, UnsupportedError, UsageError
from leap_serve.plan import LayerPlan, Plan
from leap_serve.provenance import made_by
from leap_serve.tasks.base import Item
from leap_training.saliency import Routing, Scores, check_top_k, lowered_notice

Chosen = npt.NDArray[np.bool_]
"""What a plan chooses, [L, W]: the experts [L, E], then, where τ is searched, which of G temperatures [L, G]."""
Evaluator = Callable[[Sequence[Plan]], Sequence[float]]
"""Plans → the mean teacher-forced loss of each, in nats per answer token, on items held out of training."""
Latency = Callable[[Plan], float]
"""A plan → its latency over the full model's."""


def engine_evaluator(engine: Engine, items: Sequence[Item]) -> Evaluator:
    """Losses by the engine's score_plans over these items, per answer token."""

    def evaluate(plans: Sequence[Plan]) -> list[float]:
        return [mean_loss(scores) for scores in engine.score_plans(plans, items)]

    return evaluate


@dataclass(frozen=True, slots=True)
class PruningSpace:
    """The plans a search may return.

    Args:
        routing: of the full model.
        budget: experts to retain, over all layers (B).
        cap: the most a layer may retain.
        top_k: by layer, in order: experts per token, and the fewest a layer may retain.
        uniform: whether every layer retains ``cap``.
        temperatures: router temperatures τ that a layer may have; with more than one they are searched too.
        may_stop: whether a plan may retain fewer than the budget; never in uniform spaces.
        lowered: layers whose top_k is below the one asked for, since they retain no more experts.
    """

    routing: Routing
    budget: int
    cap: int
    top_k: tuple[int, ...]
    uniform: bool
    temperatures: tuple[float, ...] = (1.0,)
    may_stop: bool = False
    lowered: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        routing: Routing,
        *,
        experts: int | None = None,
        budget: float | None = None,
        allocation: str = "uniform",
        top_k: int | None = None,
        temperature: float | Sequence[float] = 1.0,
        may_stop: bool = False,
    ) -> PruningSpace:
        """Read the same flags as :func:`leap_training.saliency.allocate`; UsageError where they cannot be met.

        Several values of ``temperature`` are searched, a layer at a time.
        """
        if routing.groups > 1:
            raise UnsupportedError(
                "--method", f"searches cannot keep the model's {routing.groups} routing groups equal",
                "choose a one-shot --method",
            )  # fmt: skip
        if (experts is None) == (budget is None):
            raise UsageError("--budget, --experts", "exactly one is needed", "give one of them")
        if allocation not in ("uniform", "global"):
            raise UsageError("--allocation", f"there is no {allocation!r}", "choose uniform or global")
        if may_stop and allocation == "uniform":
            raise UsageError("--stop", "every layer retains equally many", "choose --allocation global")
        temperatures = tuple(map(float, temperature if isinstance(temperature, Sequence) else [temperature]))
        if not temperatures or len(set(temperatures)) < len(temperatures) or not all(t > 0 for t in temperatures):
            raise UsageError("--temperature", f"is {list(temperatures)}", "give different values above 0")
        check_top_k(top_k, routing)
        layers, all_experts = len(routing.top_k), routing.num_experts
        uniform = allocation == "uniform"
        share = budget if budget is not None else (experts or 0) / all_experts
        if not 0.0 < share <= 1.0:
            raise UsageError("--budget, --experts", f"keeps {share:g} of the experts", "keep more than none, up to all")
        per_layer = max(1, math.floor(share * all_experts + 0.5))
        total = per_layer * layers if uniform else max(1, math.floor(share * all_experts * layers + 0.5))
        wanted = tuple(min(top_k or own, all_experts) for own in routing.top_k.values())
        lowered: tuple[int, ...] = ()
        if uniform:
            lowered = tuple(layer for layer, k in zip(routing.top_k, wanted, strict=True) if k > per_layer)
            wanted = tuple(min(k, per_layer) for k in wanted)
        if total < sum(wanted):
            raise UsageError("--budget", f"keeps {total} experts, the layers' top_k need {sum(wanted)}", "keep more")
        cap = per_layer if uniform else all_experts
        return cls(routing, total, cap, wanted, uniform, temperatures, may_stop, lowered)

    @property
    def layers(self) -> tuple[int, ...]:
        """MoE layers of the model, in order."""
        return tuple(self.routing.top_k)

    @property
    def notices(self) -> tuple[str, ...]:
        """What ``made_by["notices"]`` of a plan of this space says, whatever found it."""
        return (lowered_notice(self.lowered),) if self.lowered else ()

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return len(self.routing.top_k), self.routing.num_experts

    @property
    def width(self) -> int:
        """W: the experts of a layer, and its temperatures where these are searched."""
        return self.routing.num_experts + (len(self.temperatures) if len(self.temperatures) > 1 else 0)

    @property
    def schedule(self) -> tuple[int | None, ...]:
        """The layer (by position) each pick of an expert is for, None for any; round robin, the floors first."""
        positions = range(len(self.top_k))
        if self.uniform:
            return tuple(layer for _ in range(self.cap) for layer in positions)
        floors = tuple(layer for turn in range(max(self.top_k)) for layer in positions if turn < self.top_k[layer])
        return floors + (None,) * (self.budget - len(floors))

    @property
    def picks(self) -> int:
        """Picks of an episode (T): the experts of the schedule, then a temperature per layer where it is searched."""
        return self.budget + (len(self.top_k) if len(self.temperatures) > 1 else 0)

    def experts(self, chosen: Chosen) -> Chosen:
        """The experts of a choice, [L, E]."""
        return chosen[:, : self.routing.num_experts]

    def allowed(self, chosen: Chosen) -> Chosen:
        """Which experts may be added, [L, E]: what is left of the budget must still fill every layer's floor."""
        experts = self.experts(chosen)
        counts = experts.sum(1)
        missing = np.maximum(np.array(self.top_k) - counts, 0)
        spare = self.budget - int(counts.sum()) - int(missing.sum())
        room = (counts < self.cap) & ((missing > 0) | (spare > 0))
        return ~experts & room[:, None]

    def complete(self, chosen: Chosen) -> bool:
        """Whether every layer has its floor, so that the choice can be evaluated."""
        return bool((self.experts(chosen).sum(1) >= np.array(self.top_k)).all())

    def legal(self, chosen: Chosen) -> bool:
        """Whether the search may return the choice: complete, and of the size that is wanted."""
        counts = self.experts(chosen).sum(1)
        spent = bool((counts == self.cap).all()) if self.uniform else self.may_stop or counts.sum() == self.budget
        return spent and self.complete(chosen)

    def plan(self, chosen: Chosen, scores: Mapping[int, tuple[float, ...]] | None = None, **provenance: Any) -> Plan:
        """Make the plan of a complete choice."""
        layers = {
            index: LayerPlan(tuple(np.flatnonzero(row).tolist()), k, temperature)
            for index, row, k, temperature in zip(
                self.layers, self.experts(chosen), self.top_k, self._temperatures_of(chosen), strict=True
            )
        }
        if provenance:
            provenance["notices"] = [*provenance.get("notices", ()), *self.notices]
        record = made_by(**provenance) if provenance else {}
        return Plan(self.routing.base, self.routing.num_experts, layers, scores or {}, record)

    def _temperatures_of(self, chosen: Chosen) -> list[float]:
        """τ by layer; the one nearest to 1 where a layer has not chosen yet."""
        if len(self.temperatures) == 1:
            return [self.temperatures[0]] * len(self.top_k)
        own = chosen[:, self.routing.num_experts :]
        return [self.temperatures[row.argmax() if row.any() else self._neutral] for row in own]

    @property
    def temperature(self) -> float:
        """The τ nearest to 1."""
        return self.temperatures[self._neutral]

    @property
    def _neutral(self) -> int:
        return int(np.abs(np.log(self.temperatures)).argmin())

    def best_of(self, found: Scores) -> Chosen:
        """Fill the schedule greedily by scores: exactly what a one-shot criterion keeps, at the τ nearest to 1."""
        score = np.stack([np.asarray(found[layer], np.float64) for layer in self.layers])
        share = score / np.maximum(score.sum(1, keepdims=True), 1e-300)
        chosen = np.zeros((len(self.top_k), self.width), bool)
        for layer in self.schedule:
            open_ = self.allowed(chosen)
            if layer is not None:
                open_[np.arange(len(chosen)) != layer] = False
            best = np.unravel_index(np.where(open_, share, -np.inf).argmax(), share.shape)
            chosen[best] = True
        if len(self.temperatures) > 1:
            chosen[:, self.routing.num_experts + self._neutral] = True
        return chosen


@dataclass(frozen=True, slots=True)
class Reward:
    """R = alpha·Perf − size_coef·Σ|I|/(L·E) − latency_coef·Latency/Latency_full (LEAP eq. 4, and latency).

    Perf = 1/(1 + loss), in (0, 1]: monotone in the loss and, unlike exp(−loss), not flat where pruning is hard.
    """

    alpha: float = 1.0
    size_coef: float = 0.0
    latency_coef: float = 0.0

    def __call__(self, loss: float, retained: float, latency: float = 0.0) -> float:
        """Reward of a plan that retains this fraction of the experts, at this latency over the full model's."""
        return self.alpha / (1.0 + loss) - self.size_coef * retained - self.latency_coef * latency


class Ledger:
    """Evaluates plans once each, in whole batches, and counts what was really evaluated.

    Args:
        evaluate: plans → losses.
        space: of the plans.
        reward: of a loss.
        latency: needed where ``reward.latency_coef`` is not 0.
    """

    def __init__(
        self, evaluate: Evaluator, space: PruningSpace, reward: Reward = Reward(), latency: Latency | None = None
    ) -> None:
        if reward.latency_coef and latency is None:
            raise LeapError("latency_coef", "is set, but nothing measures latency", "give a latency, or set it to 0")
        self.space, self.reward = space, reward
        self._evaluate, self._latency = evaluate, latency
        self.losses: dict[bytes, float] = {}
        self.rewards: dict[bytes, float] = {}
        self.curve: list[float] = []
        """Best reward after each evaluation; −inf while nothing that may be returned was evaluated."""
        self._best = b""

    @property
    def evaluations(self) -> int:
        """Distinct plans evaluated so far."""
        return len(self.losses)

    def restore(self, subsets: Sequence[Chosen], losses: Sequence[float], rewards: Sequence[float]) -> None:
        """Take over what an earlier process evaluated, in its order, in place of what is known."""
        self.losses, self.rewards, self.curve, self._best = {}, {}, [], b""
        for chosen, loss, reward in zip(subsets, losses, rewards, strict=True):
            self._record(chosen.tobytes(), loss, reward)

    def __call__(self, subsets: Sequence[Chosen], limit: int | None = None) -> list[float | None]:
        """Rewards of complete subsets; None for those that would be evaluations beyond ``limit`` in all."""
        left = None if limit is None else max(0, limit - self.evaluations)
        new = {s.tobytes(): s for s in subsets if s.tobytes() not in self.losses}
        ask = dict(list(new.items())[:left])
        plans = [self.space.plan(chosen) for chosen in ask.values()]
        losses = [float(loss) for loss in self._evaluate(plans)] if plans else []
        if len(losses) != len(plans) or not all(math.isfinite(loss) for loss in losses):
            raise LeapError("score_plans", f"gave {losses} for {len(plans)} plans", "check the engine")
        for key, plan, loss in zip(ask, plans, losses, strict=True):
            latency = self._latency(plan) if self._latency is not None and self.reward.latency_coef else 0.0
            self._record(key, loss, self.reward(loss, sum(plan.counts) / math.prod(self.space.shape), latency))
        return [self.rewards.get(s.tobytes()) for s in subsets]

    def _record(self, key: bytes, loss: float, reward: float) -> None:
        self.losses[key], self.rewards[key] = loss, reward
        before = self.curve[-1] if self.curve else -math.inf
        better = reward > before and self.space.legal(self.subset(key))
        self._best = key if better else self._best
        self.curve.append(reward if better else before)

    def improvements(self, marks: Sequence[float] = ()) -> list[list[float]]:
        """The learning curve: [evaluation, reward, loss] whenever a better plan that may be returned was found.

        ``marks`` says what each plan counts as, where evaluations are not what a method spends.
        """
        found: list[list[float]] = []
        for place, (reward, loss) in enumerate(zip(self.curve, self.losses.values(), strict=True)):
            if reward > (found[-1][1] if found else -math.inf):
                found.append([marks[place] if marks else place + 1, reward, loss])
        return found

    def subset(self, key: bytes) -> Chosen:
        """The choice [L, W] behind a key."""
        return np.frombuffer(key, bool).reshape(-1, self.space.width)

    def best(self) -> tuple[Chosen, float, float]:
        """The best choice so far that may be returned, its reward and its loss; the earliest of equals."""
        if not self._best:
            raise LeapError("search", "no plan of the wanted size was evaluated", "allow more --episodes")
        return self.subset(self._best), self.rewards[self._best], self.losses[self._best]
