"""The engine protocol: what search, eval and bench ask of a running model, whoever runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from leap_serve.errors import UnsupportedError

if TYPE_CHECKING:
    from leap_serve.encoding import Encoded
    from leap_serve.measure import Measurement
    from leap_serve.plan import Plan
    from leap_serve.profile import Profile
    from leap_serve.tasks.base import Item
    from leap_serve.workload import Workload

Progress = Callable[[int, int], None]
"""Called with (done, total) as work proceeds."""


class NoLogprobsError(UnsupportedError):
    """A model that answers but does not say how likely a given text is, as many servers."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A generated text: without the stop string, with the reason it ended ("stop" or "length")."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Score:
    """How an answer fares, teacher-forced.

    Args:
        logprob: natural log-likelihood, summed over its tokens (end of text included).
        tokens: how many those are.
        esp: expected speculative acceptance against the full model, Σ_v min(p_full(v), p_plan(v)), mean over
            the same tokens, in [0, 1] (EvoESAP); None where it was not asked for.
    """

    logprob: float
    tokens: int
    esp: float | None = None

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per answer token, in nats."""
        return -self.logprob / max(1, self.tokens)


def mean_loss(scores: Sequence[Score]) -> float:
    """Mean negative log-likelihood per answer token over all items together, in nats."""
    return -sum(score.logprob for score in scores) / max(1, sum(score.tokens for score in scores))


def mean_esp(scores: Sequence[Score]) -> float:
    """Mean ESP per answer token over all items together, in [0, 1]; they must have been scored with ``esp=True``."""
    assert all(score.esp is not None for score in scores), "scored without esp=True"
    return sum((score.esp or 0.0) * score.tokens for score in scores) / max(1, sum(score.tokens for score in scores))


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


class Model(Protocol):
    """What can be asked of a model, wherever it runs: in this process or behind an HTTP endpoint.

    ``each`` is called with the number of a prompt or item and its outcome as soon as that one is known.
    """

    def tokenize(self, texts: Sequence[str], *, prefix: bool = False) -> list[list[int]]:
        """Encode texts without special tokens; with ``prefix`` what the tokenizer puts before a text (BOS) comes first."""
        ...

    def generate(
        self,
        prompts: Sequence[str],
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int | None = None,
        progress: Progress | None = None,
        each: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete each prompt; greedy at temperature 0."""
        ...

    def score(
        self,
        items: Sequence[Item],
        progress: Progress | None = None,
        each: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:
        """Score each item's answer after its prompt, teacher-forced, followed by the end-of-text token.

        An endpoint leaves out the end of text where it does not tell its token. Raises NoLogprobsError where it tells
        no likelihoods either.
        """
        ...

    def score_ids(
        self,
        sequences: Sequence[Encoded],
        progress: Progress | None = None,
        each: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:
        """Score each answer's token ids after the prompt's, as they stand: nothing is put before or after them."""
        ...

    def close(self) -> None:
        """Free the model, or the connections to it."""
        ...


class Engine(Model, Protocol):
    """A model that is loaded and answers. Not thread-safe; close() frees it.

    Scores decide between plans by hundredths of a nat, so search in float32: in bfloat16 on a CPU two exact
    ways of computing the same plan (other batches, masked or cut) differ by up to 0.3 nats per item.
    """

    @property
    def vocabulary(self) -> Sequence[int]:
        """The token ids that a workload's prompts are drawn from."""
        ...

    def score_plans(
        self, plans: Sequence[Plan], items: Sequence[Item], progress: Progress | None = None, *, esp: bool = False
    ) -> list[list[Score]]:
        """For each plan, the Score of every item when only that plan's experts may be chosen (its top_k, its τ).

        The model that is loaded must be the full one that the plans speak of. Nothing is cut: the routers
        are masked, and the answers are those of the checkpoint cut to that plan. With ``esp`` the full model
        answers first, for the price of one more plan, and every Score carries its ESP.
        """
        ...

    def apply(self, plan: Plan) -> None:
        """Shrink the layers to a plan until ``restore``, in place of one before; all that is asked sees the pruned model.

        Raises LeapError where the plan does not fit the model; then nothing has changed.
        """
        ...

    def restore(self) -> None:
        """Make the layers whole again, bit for bit; harmless when they are."""
        ...

    def profile(self, items: Sequence[Item], progress: Progress | None = None, *, channels: bool = False) -> Profile:
        """Collect the experts' statistics over prompt + answer of every item (methods: §0), channel sums if asked."""
        ...

    def generate_timed(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[RequestTiming]:
        """Submit all token-id prompts at once, decode exactly ``output_tokens`` each, and time every token."""
        ...

    def measure(self, workload: Workload, rounds: int = 5, warmup: int = 1) -> Measurement:
        """Run a workload in the state the engine is in, full or under an applied plan (see leap_serve.measure)."""
        ...

    def memory(self) -> Memory:
        """Report what the engine holds now."""
        ...
