"""What the tests of `leap tune`'s runs share: small settings, random items, and a run to its end."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from leap_serve.tasks.base import Item
from leap_training.active_learning import BY_ANSWER
from leap_training.routing_agent import RouterConfig
from leap_training.tune import Tuner
from leap_training.tune_config import TuneConfig, TuneData

SMALL = TuneConfig(
    rounds=2, labels=12, steps=6, batch=4, rank=2, router_warmup=1, router_every=2, save_every=1, patience=0,
    router=RouterConfig(tokens=64, minibatch=32, ppo_epochs=2), learning_rate=1e-2, lr_warmup=2,
    acquisition=replace(BY_ANSWER, answer_tokens=4),
)  # fmt: skip


def some_items(count: int, seed: int) -> list[Item]:
    draw = random.Random(seed)
    texts = ["".join(draw.choices("abcdefgh", k=draw.randint(3, 7))) for _ in range(count)]
    return [Item(f"{seed}/{n}", text, f" {text[::-1]}") for n, text in enumerate(texts)]


DATA = TuneData(some_items(40, 0), some_items(5, 9), some_items(8, 1), some_items(30, 2))


def tuned(folder: Path, config: TuneConfig = SMALL, state: Path | None = None) -> Tuner:
    tuner = Tuner(folder, DATA, config, state)
    tuner.run()
    return tuner
