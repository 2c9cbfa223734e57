"""Expected speculative acceptance inside vLLM: how much of the full model's next-token distribution a plan keeps.

ESP = mean over answer tokens of Σ_v min(p_full(v), p_plan(v)), teacher-forced (EvoESAP; methods: §2). It needs
both distributions whole, [A, V] for A answer tokens and a vocabulary of V, so they stay in the worker: the full
model's are kept, a plan's are compared as they come and forgotten. A request says what it wants in
``SamplingParams.extra_args["leap_esp"] = (tag, item, first, keep)``: its own number, that of its item, the
position of the answer's first token, and whether to keep its distributions as the item's reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from leap_vllm.compat_prompts import Prefilled, observe_prompts

REQUEST_KEY = "leap_esp"
"""Key in a request's extra_args."""
LOGITS = 1 << 26
"""Logits computed at a time, in elements: 256 MiB in float32, or one request's."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Answer tokens of a request whose predictions lie in this step.

    Args:
        tag, item, keep: as the request has it.
        at: of the first of these tokens, counted from the answer's first.
        rows: of the step's hidden states, one per token.
        targets: the tokens themselves.
        answer: how many tokens the whole answer has.
    """

    tag: int
    item: int
    keep: bool
    at: int
    rows: range
    targets: list[int]
    answer: int


class EspProbe:
    """A hook on a runner, from construction to :meth:`remove`; UnsupportedError where prompts cannot be scored.

    ``found``: tag → [2, A] float32, log-likelihood and ESP of each answer token; written by place, since a request
    may be preempted and prefilled again.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.reference: dict[int, torch.Tensor] = {}
        self.found: dict[int, torch.Tensor] = {}
        self._undo: Callable[[], None] = observe_prompts(runner, self._see)

    def remove(self) -> None:
        """Take the hook off and forget everything."""
        self._undo()
        self.reference.clear()
        self.found.clear()

    def read(self) -> dict[int, tuple[float, float]]:
        """Return tag → (summed log-likelihood, mean ESP) of what was asked since the last call, and forget it."""
        sums = {tag: (row[0].double().sum(), row[1].double().mean()) for tag, row in self.found.items()}
        self.found = {}
        return {tag: (float(logprob), float(esp)) for tag, (logprob, esp) in sums.items()}

    def _see(self, hidden_states: torch.Tensor, step: Iterable[Prefilled]) -> None:
        """Look at one step: hidden states [T, H], and the requests that are prefilled in it."""
        wanted = [one for prefilled in step if (one := wanted_of(prefilled)) is not None]
        limit = LOGITS // self._runner.model_config.get_vocab_size()
        # Tensor-parallel workers compute logits together: all of them make the same groups.
        for group in packed(wanted, limit):
            rows = torch.tensor([row for one in group for row in one.rows], device=hidden_states.device)
            logits = self._runner.model.compute_logits(hidden_states.index_select(0, rows))
            if logits is None:  # not the rank that gathers them
                continue
            logprobs = logits.float().log_softmax(-1)
            for one, part in zip(group, logprobs.split([len(one.rows) for one in group]), strict=True):
                self._take(one, part)

    def _take(self, one: Wanted, logprobs: torch.Tensor) -> None:
        """Keep or compare the log-probabilities [n, V] of some of a request's answer tokens."""
        n, size = logprobs.shape
        place = slice(one.at, one.at + n)
        if one.tag not in self.found:
            self.found[one.tag] = torch.zeros(2, one.answer, device=logprobs.device)
        targets = torch.tensor(one.targets, device=logprobs.device)
        self.found[one.tag][0, place] = logprobs.gather(1, targets[:, None])[:, 0]
        probabilities = logprobs.exp()
        if one.keep:
            if one.item not in self.reference:
                self.reference[one.item] = torch.zeros(one.answer, size, device=logprobs.device)
            self.reference[one.item][place] = probabilities
        self.found[one.tag][1, place] = torch.minimum(probabilities, self.reference[one.item][place]).sum(-1)


def wanted_of(prefilled: Prefilled) -> Wanted | None:
    """Read a request's wish: the answer tokens that this step predicts, None where it wants none of them."""
    asked = prefilled.extra.get(REQUEST_KEY)
    if asked is None:
        return None
    tag, item, first, keep = asked
    # Position p predicts token p + 1; the last prompt token predicts the answer to the whole, which is not scored.
    begin = max(prefilled.start, first - 1)
    end = min(prefilled.start + prefilled.tokens, len(prefilled.prompt) - 1)
    if begin >= end:
        return None
    shift = prefilled.row - prefilled.start
    return Wanted(
        tag, item, keep, begin + 1 - first, range(begin + shift, end + shift), prefilled.prompt[begin + 1 : end + 1],
        len(prefilled.prompt) - first,
    )  # fmt: skip


def packed(wanted: Iterable[Wanted], limit: int) -> Iterator[list[Wanted]]:
    """Group wishes in their order, each group of at most ``limit`` rows or of one wish."""
    group: list[Wanted] = []
    rows = 0
    for one in wanted:
        if group and rows + len(one.rows) > limit:
            yield group
            group, rows = [], 0
        group.append(one)
        rows += len(one.rows)
    if group:
        yield group


class EspWorker:
    """What the engine asks of a worker about ESP; a part of LeapWorker."""

    model_runner: Any
    leap_esp: EspProbe | None = None

    def leap_start_esp(self) -> None:
        """Begin to answer requests that ask for it; UnsupportedError where that cannot be."""
        self.leap_stop_esp()
        self.leap_esp = EspProbe(self.model_runner)

    def leap_read_esp(self) -> dict[int, tuple[float, float]]:
        """Return tag → (summed log-likelihood, mean ESP) since the last call; empty but on the rank that has logits."""
        assert self.leap_esp is not None, "leap_start_esp comes first"
        return self.leap_esp.read()

    def leap_stop_esp(self) -> None:
        """Take the hook off and forget the references; harmless without one."""
        if self.leap_esp is not None:
            self.leap_esp.remove()
            self.leap_esp = None
