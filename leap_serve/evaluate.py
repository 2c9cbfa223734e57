"""Scores a model on a task: held-out loss and the task's own metric on greedy completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from leap_serve.engine import Engine, Progress, mean_loss
from leap_serve.tasks.base import Item, Task


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The outcome on one task.

    Args:
        score: mean of the task's metric over the items, in [0, 1].
        loss: mean negative log-likelihood per answer token over the items, in nats.
        per_item: the metric of every item, in order, for paired comparisons.
    """

    task: str
    metric: str
    score: float
    loss: float
    per_item: tuple[float, ...]


def evaluate(engine: Engine, task: Task, items: Sequence[Item], progress: Progress | None = None) -> Evaluation:
    """Generate greedily, score with the task's metric, and measure the teacher-forced loss."""
    completions = engine.generate([i.prompt for i in items], task.max_tokens, stop=task.stop, progress=progress)
    per_item = task.score(items, [completion.text for completion in completions])
    loss = mean_loss(engine.score(items))
    return Evaluation(task.name, task.metric, sum(per_item) / len(per_item), loss, tuple(per_item))
