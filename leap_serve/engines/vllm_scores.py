"""Teacher-forced scores from a running vLLM: log-likelihoods by its own prompt logprobs, ESP by a hook in its workers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from leap_serve import encoding
from leap_serve.engine import Progress, Score
from leap_serve.engines.vllm_plans import MAX_PLANS, load_plans

if TYPE_CHECKING:
    from leap_serve.engines.vllm_engine import VllmEngine
    from leap_serve.engines.vllm_plans import Subset
    from leap_serve.plan import Plan
    from leap_serve.tasks.base import Item

REFERENCES = 256 * 2**20
"""Bytes of full-model distributions that a worker holds at a time: items are scored in groups that keep within it."""


def score(
    engine: VllmEngine,
    sequences: Sequence[encoding.Encoded],
    progress: Progress | None,
    subsets: Sequence[Subset | None] = (None,),
    each: Callable[[int, Score], None] | None = None,
) -> list[list[Score]]:
    """Score all sequences under each subset (None: under no plan), all in one batch; ``each`` counts through."""
    ids, firsts = _checked(engine, sequences)

    def scored(place: int, result: Any) -> Score:
        return _score_of(firsts[place % len(ids)], ids[place % len(ids)], result)

    # prompt_logprobs=0: of each prompt token its own logprob, nothing else.
    params = _params(prompt_logprobs=0)
    one = None if each is None else lambda place, result: each(place, scored(place, result))
    with _uncompiled_helpers():
        results = engine._run(ids * len(subsets), params, progress, [s for s in subsets for _ in ids], each=one)
    found = [scored(place, result) for place, result in enumerate(results)]
    return [found[turn * len(ids) : (turn + 1) * len(ids)] for turn in range(len(subsets))]


def score_plans(
    engine: VllmEngine, plans: Sequence[Plan], items: Sequence[Item], progress: Progress | None
) -> list[list[Score]]:
    """Score all items under every plan, as many plans at a time as there are slots."""
    found: list[list[Score]] = []
    sequences = encoding.with_end(engine.tokenizer, items)
    for start in range(0, len(plans), MAX_PLANS):
        subsets = load_plans(engine, plans[start : start + MAX_PLANS])
        found += score(engine, sequences, _counted(progress, start * len(items), len(plans) * len(items)), subsets)
    return found


def score_plans_esp(
    engine: VllmEngine, plans: Sequence[Plan], items: Sequence[Item], progress: Progress | None
) -> list[list[Score]]:
    """Score with ESP: of each group of items the full model's distributions first, then all plans against them."""
    load_plans(engine, plans[:MAX_PLANS])  # refuses before any work
    ids, firsts = _checked(engine, encoding.with_end(engine.tokenizer, items))
    lengths = [len(whole) - first for whole, first in zip(ids, firsts, strict=True)]
    found: list[list[Score]] = [[] for _ in plans]
    done, total = 0, (len(plans) + 1) * len(items)
    for group in _groups(lengths, REFERENCES // (4 * engine._llm.model_config.get_vocab_size())):
        engine._rpc("leap_start_esp")
        try:
            for start in range(-MAX_PLANS, len(plans), MAX_PLANS):
                # The first turn is the full model's, and kept.
                full = start < 0
                subsets = [None] if full else load_plans(engine, plans[start : start + MAX_PLANS])
                asked = [(subset, item) for subset in subsets for item in group]
                extras = [{"leap_esp": (tag, item, firsts[item], full)} for tag, (_, item) in enumerate(asked)]
                counted = _counted(progress, done, total)
                engine._run([ids[item] for _, item in asked], _params(), counted, [s for s, _ in asked], extras)
                read: dict[int, tuple[float, float]] = next(filter(None, engine._rpc("leap_read_esp")), {})
                done += len(asked)
                if full:
                    continue
                for tag, (_, item) in enumerate(asked):
                    # An answer without a token loses nothing.
                    logprob, esp = read[tag] if lengths[item] else (0.0, 1.0)
                    found[start + tag // len(group)].append(Score(logprob, lengths[item], esp))
        finally:
            engine._rpc("leap_stop_esp")
    return found


def _checked(engine: VllmEngine, sequences: Sequence[encoding.Encoded]) -> tuple[list[list[int]], list[int]]:
    """Return of each sequence all its token ids, and where its answer begins: nothing precedes the very first token."""
    ids = [e.prompt + e.answer for e in sequences]
    encoding.check_lengths([len(i) for i in ids], engine.max_model_len - 1, "item")
    return ids, [max(1, len(e.prompt)) for e in sequences]


def _params(**more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, skip_reading_prefix_cache=True, **more)


def _score_of(first: int, whole: Sequence[int], result: Any) -> Score:
    """Sum the logprobs of whole[first:]."""
    places = range(first, len(whole))
    return Score(sum(result.prompt_logprobs[at][whole[at]].logprob for at in places), len(places))


def _groups(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Deal out items in their order, each group of at most ``limit`` answer tokens or of one item."""
    group: list[int] = []
    for item, length in enumerate(lengths):
        if group and sum(lengths[i] for i in group) + length > limit:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _counted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of a part within the whole."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


@contextlib.contextmanager
def _uncompiled_helpers() -> Iterator[None]:
    """Keep vLLM on CPU from compiling one line of C++ (the rank of a token) at the first prompt logprobs."""
    import torch

    if torch.cuda.is_available():
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield
