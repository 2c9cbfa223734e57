"""Settings and data of a tuning run, and what of them cannot be run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from leap_serve.encoding import items_sha256
from leap_serve.errors import UsageError
from leap_serve.tasks.base import Item
from leap_training.active_learning import BY_ANSWER, Acquisition
from leap_training.routing_agent import Exploration, RouterConfig

RATE_AT_WIDTH_1 = {"lora": 0.768, "none": 0.768, "full": 0.384}
"""Learning rate times hidden size: Adam's rate falls with the width (Yang et al. 2022); the constants are leap-tiny's best
(H = 128: 6e-3 for adapters, 3e-3 for the weights themselves; dev/LOG.md), and give 3.75e-4 at H = 2,048."""


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """Settings; the defaults of labels and rounds are the paper's.

    Args:
        rounds, labels: batches of active learning, and items in each (B).
        steps: expert steps of the whole run.
        batch, accumulate: items of a step, and in how many parts they pass through the model.
        learning_rate: of the experts, rising over ``lr_warmup`` steps and falling linearly to 0; None takes
            RATE_AT_WIDTH_1 over the model's hidden size.
        experts: "lora" adapters, "full" weights, or "none".
        distill: what an expert step adds to its loss: "none", or what a full model's "logits" or "experts" say.
        teacher: that model's folder.
        rank: of the adapters; alpha equals it.
        adapter_l2: μ of eq. 18, as AdamW's decoupled weight decay.
        rl_router: whether there are router steps.
        supervised_router: whether expert steps also move the routers, by the gradient through their weights (ours; eq. 18
            moves only adapters there). At 8 of leap-tiny's 64 it is worth 1.6 points of exact match.
        router_warmup: router steps before the first expert step.
        router_every: expert steps per router step afterwards.
        patience: rounds without a better validation loss after which the run ends; 0 never ends it early.
        save_every: ticks between two states on disk; the end of a round is always one.
    """

    rounds: int = 10
    labels: int = 1024
    steps: int = 4000
    batch: int = 32
    accumulate: int = 1
    learning_rate: float | None = None
    lr_warmup: int = 50
    experts: Literal["lora", "full", "none"] = "lora"
    distill: Literal["none", "logits", "experts"] = "none"
    teacher: str | None = None
    rank: int = 32
    adapter_l2: float = 0.01
    rl_router: bool = True
    supervised_router: bool = True
    router_warmup: int = 20
    router_every: int = 4
    router: RouterConfig = field(default_factory=RouterConfig)
    exploration: Exploration = field(default_factory=Exploration)
    acquisition: Acquisition = BY_ANSWER
    patience: int = 3
    save_every: int = 100
    dtype: str = "float32"
    checkpointing: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError that lists everything that cannot be run."""
        whole = ("rounds", "labels", "steps", "batch", "accumulate", "rank", "router_every", "save_every")
        wrong = [f"{name} is {getattr(self, name)}, less than 1" for name in whole if getattr(self, name) < 1]
        for of, names in (
            (self, ("lr_warmup", "router_warmup", "patience", "seed", "adapter_l2")),
            (self.router, ("kl_coef", "ent_coef", "latency_coef")),
        ):
            wrong += [f"{name} is {value:g}, not 0 or more" for name in names
                      if not 0 <= (value := getattr(of, name)) < math.inf]  # fmt: skip
        for name, above in (("learning_rate", self.learning_rate), ("router learning_rate", self.router.learning_rate),
                            ("noise", self.exploration.noise)):  # fmt: skip
            if above is not None and not 0 < above < math.inf:
                wrong.append(f"{name} is {above:g}, not above 0")
        if not 0 < self.exploration.epsilon <= 1:
            wrong.append(f"epsilon is {self.exploration.epsilon:g}, not in (0, 1]")
        if self.rounds > 0 and self.steps % self.rounds:
            wrong.append(f"{self.steps} steps do not divide into {self.rounds} rounds")
        if self.experts == "none" and not (self.rl_router or self.supervised_router):
            wrong.append("nothing is left to tune")
        if self.experts == "full" and self.dtype != "float32":
            wrong.append("AdamW on the experts' own weights needs float32")
        if self.distill != "none" and self.teacher is None:
            wrong.append("there is no teacher to distil from")
        if wrong:
            raise UsageError("settings", "; ".join(wrong), "correct them")


@dataclass(frozen=True, slots=True)
class TuneData:
    """Disjoint items: the pool, the test items that it must not hold, and two parts of the validation split."""

    pool: Sequence[Item]
    tests: Sequence[Item]
    stopping: Sequence[Item]
    router: Sequence[Item]

    @property
    def sha256(self) -> str:
        """Identifies all of them."""
        return items_sha256([*self.pool, *self.stopping, *self.router])
