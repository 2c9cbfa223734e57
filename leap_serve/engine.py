"""The engine protocol: what search, eval and bench ask of a running model, whoever runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from leap_serve.plan import Plan
    from leap_serve.profile import Profile
    from leap_serve.tasks.base import Item

Progress = Callable[[int, int], None]
"""Called with (done, total) as work proceeds."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A generated text: without the stop string, with the reason it ended ("stop" or "length")."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Score:
    """Teacher-forced log-likelihood of an answer: natural log, summed over its tokens (end of text included)."""

    logprob: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per answer token, in nats."""
        return -self.logprob / max(1, self.tokens)


def mean_loss(scores: Sequence[Score]) -> float:
    """Mean negative log-likelihood per answer token over all items together, in nats."""
    return -sum(score.logprob for score in scores) / max(1, sum(score.tokens for score in scores))


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """When the output tokens of one request arrived, in seconds after the batch was submitted."""

    token_times_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes held by the engine: parameters, KV cache, and the process's peak resident set or GPU memory."""

    weights_bytes: int
    kv_cache_bytes: int
    peak_bytes: int


class Engine(Protocol):
    """A model that is loaded and answers. Not thread-safe; close() frees it."""

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts without adding special tokens."""
        ...

    def generate(
        self,
        prompts: Sequence[str],
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int | None = None,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Complete each prompt; greedy at temperature 0."""
        ...

    def score(self, items: Sequence[Item], progress: Progress | None = None) -> list[Score]:
        """Score each item's answer after its prompt, teacher-forced, followed by the end-of-text token."""
        ...

    def score_plans(
        self, plans: Sequence[Plan], items: Sequence[Item], progress: Progress | None = None
    ) -> list[list[Score]]:
        """For each plan, the Score of every item when only that plan's experts may be chosen (its top_k, its τ).

        The model that is loaded must be the full one that the plans speak of. Nothing is cut: the routers
        are masked, and the answers are those of the checkpoint cut to that plan.
        """
        ...

    def profile(self, items: Sequence[Item], progress: Progress | None = None) -> Profile:
        """Collect the experts' statistics over prompt + answer of every item (methods: §0)."""
        ...

    def generate_timed(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[RequestTiming]:
        """Submit all token-id prompts at once, decode exactly ``output_tokens`` each, and time every token."""
        ...

    def memory(self) -> Memory:
        """Report what the engine holds now."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...
