"""Scores a model on a task: the task's own metrics on its completions, held-out loss, perplexity of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from leap_serve.engine import Completion, Model, NoLogprobsError, Progress, Score, mean_loss
from leap_serve.errors import UsageError
from leap_serve.grading.metrics import pass_at_k
from leap_serve.statistics import Interval, bootstrap, paired_bootstrap, proportion
from leap_serve.tasks.base import Detailed, Item, Split, Task
from leap_serve.tasks.text import Text

Outcome = TypeVar("Outcome")
Each = Callable[[int, Outcome], None]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn: greedily once, or ``samples`` times at a temperature for pass@k.

    Args:
        k: the k of pass@k, each at most ``samples``; the first one is the score.
        seed: of the first sample; the next ones count up from it.
    """

    samples: int = 1
    temperature: float = 0.0
    k: tuple[int, ...] = (1,)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or not all(1 <= k <= self.samples for k in self.k) or not self.k:
            ks = " ".join(map(str, self.k))
            raise UsageError("--samples, --k", f"are {self.samples} and {ks}", "draw at least k samples, k at least 1")
        if self.temperature < 0 or (self.samples > 1 and self.temperature == 0):
            what = f"is {self.temperature} for {self.samples} samples"
            raise UsageError("--temperature", what, "give a positive one for more than one sample")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The outcome on one task.

    Args:
        metric: the task's main metric; "perplexity" is the one where less is better.
        score: mean of the metric over the items, in [0, 1]; of a text its perplexity, exp(loss).
        loss: mean negative log-likelihood per answer token over the items, in nats; NaN where ``no_loss`` says why.
        per_item: the metric of every item, in order, for paired comparisons; of a text the loss of every window.
        ids: of the items, in order.
        scores: the likelihood of every item's answer; empty without a loss.
        completions: what the model answered to every item; the first sample of several.
        details: further metrics by name, per item.
        groups: mean score of each group that the task divides its items into.
    """

    task: str
    metric: str
    score: float
    loss: float
    per_item: tuple[float, ...]
    ids: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()
    completions: tuple[Completion, ...] = ()
    details: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    groups: Mapping[str, float] = field(default_factory=dict)
    no_loss: str = ""

    @property
    def of_text(self) -> bool:
        """Whether this is the perplexity of a text."""
        return self.metric == "perplexity"

    @property
    def interval(self) -> Interval:
        """The score with its interval: Wilson's where items are right or wrong, else the bootstrap over items.

        Of a text it is the perplexity, with the bootstrap over windows.
        """
        if not self.of_text:
            return (proportion if set(self.per_item) <= {0.0, 1.0} else bootstrap)(self.per_item)
        found = bootstrap(*_by_token(self.scores))
        low, high = perplexity(found.low), perplexity(found.high)
        return Interval(perplexity(found.mean), low, high, found.confidence, found.n)

    def to_json(self, with_items: bool = False) -> dict[str, Any]:
        """Return the JSON form: means and interval, with ``with_items`` also every item's answer and figures."""
        out: dict[str, Any] = {
            "metric": self.metric, "score": self.score, "loss": None if self.no_loss else self.loss,
            "items": len(self.per_item), "interval": self.interval.to_json(),
        }  # fmt: skip
        if self.no_loss:
            out["no_loss"] = self.no_loss
        if self.details:
            out["details"] = {name: sum(values) / len(values) for name, values in self.details.items()}
        if self.groups:
            out["groups"] = dict(self.groups)
        if with_items:
            out["per_item"] = [self._row(place) for place in range(len(self.per_item))]
        return out

    def _row(self, place: int) -> dict[str, Any]:
        row: dict[str, Any] = {"id": self.ids[place], "score": self.per_item[place]}
        if self.scores:
            row |= {"logprob": self.scores[place].logprob, "tokens": self.scores[place].tokens}
        if self.completions:
            row |= {"text": self.completions[place].text, "finish_reason": self.completions[place].finish_reason}
        return row


def evaluate(
    model: Model, task: Task, items: Sequence[Item], progress: Progress | None = None, sampling: Sampling = GREEDY
) -> Evaluation:
    """Generate, score with the task's metrics, and measure the teacher-forced loss.

    Several samples are for tasks that run code: their score is the unbiased pass@k of the first k, the others are
    among the details. Raises UsageError for other tasks, and where there are no items.
    """
    if not items:
        raise UsageError(f"--task {task.name}", "there are no items to evaluate", "choose another split")
    code = task.metric == "pass@1"
    if sampling.samples > 1 and not code:
        raise UsageError("--samples", f"{task.name} is scored on one answer", "leave it out, or choose a code task")
    phases = sampling.samples + 1
    drawn = []
    for number in range(sampling.samples):
        prompts, part = [item.prompt for item in items], _part(progress, number, phases)
        seed = sampling.seed + number if sampling.temperature else None
        drawn.append(model.generate(prompts, task.max_tokens, task.stop, sampling.temperature, seed, part))
    metric, details = task.metric, _figures(task, items, drawn[0])
    if code:
        passed = [details.pop(task.metric), *(_figures(task, items, more)[task.metric] for more in drawn[1:])]
        counts = [round(sum(column)) for column in zip(*passed, strict=True)]
        metric = f"pass@{sampling.k[0]}"
        details |= {f"pass@{k}": tuple(pass_at_k(sampling.samples, counts, k)) for k in sampling.k}
    per_item = details.pop(metric)
    scores, no_loss = _scores(model, items, _part(progress, sampling.samples, phases))
    return Evaluation(
        task.name, metric, sum(per_item) / len(per_item), mean_loss(scores) if scores else math.nan, per_item,
        tuple(item.id for item in items), scores, tuple(drawn[0]), details, _groups(items, per_item), no_loss,
    )  # fmt: skip


def evaluate_text(
    model: Model, text: Text, split: Split, limit: int | None, progress: Progress | None = None
) -> Evaluation:
    """Measure a text's perplexity over its first ``limit`` windows (leap_serve.tasks.text). Raises NoLogprobsError."""
    windows = text.windows(model.tokenize([text.read(split)], prefix=True)[0])[:limit]
    scores = tuple(model.score_ids(windows, progress))
    loss = mean_loss(scores)
    ids = tuple(f"{text.name}/{text.window}/{text.stride}/{number}" for number in range(len(windows)))
    return Evaluation(text.name, "perplexity", perplexity(loss), loss, tuple(s.loss for s in scores), ids, scores)


def perplexity(loss: float) -> float:
    """Return exp(loss) of a loss in nats per token; infinite where that is no float any more."""
    return math.exp(loss) if loss < 700 else math.inf


def compare(pruned: Evaluation, full: Evaluation) -> dict[str, Interval]:
    """Return the paired differences, pruned less full, of "score" (not of a text), every detail, and "loss"."""
    if (pruned.task, pruned.ids) != (full.task, full.ids):
        raise UsageError("compare", f"{pruned.task} and {full.task} are not of the same items", "evaluate both alike")
    out = {} if pruned.of_text else {"score": paired_bootstrap(pruned.per_item, full.per_item)}
    out |= {name: paired_bootstrap(values, full.details[name]) for name, values in pruned.details.items()}
    if pruned.scores and full.scores:
        (a, tokens), (b, others) = _by_token(pruned.scores), _by_token(full.scores)
        # Another tokenizer's tokens are not comparable.
        if tokens == others:
            out["loss"] = paired_bootstrap(a, b, tokens)
    return out


def _figures(task: Task, items: Sequence[Item], answers: Sequence[Completion]) -> dict[str, tuple[float, ...]]:
    """The main metric and further ones, per item."""
    texts = [answer.text for answer in answers]
    found = task.details(items, texts) if isinstance(task, Detailed) else {task.metric: task.score(items, texts)}
    return {name: tuple(values) for name, values in found.items()}


def _scores(model: Model, items: Sequence[Item], progress: Progress | None) -> tuple[tuple[Score, ...], str]:
    """The answers' likelihoods, or why the model does not tell them."""
    try:
        return tuple(model.score(items, progress)), ""
    except NoLogprobsError as error:
        return (), error.what


def _groups(items: Sequence[Item], per_item: Sequence[float]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for item, value in zip(items, per_item, strict=True):
        if "group" in item.reference:
            found.setdefault(item.reference["group"], []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _by_token(scores: Sequence[Score]) -> tuple[list[float], list[float]]:
    """Negative log-likelihoods and numbers of tokens: Σ of the first over Σ of the second is the loss."""
    return [-score.logprob for score in scores], [float(score.tokens) for score in scores]


def _part(progress: Progress | None, number: int, phases: int) -> Progress | None:
    """Progress of one phase of several over the same items."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, phases * total)
