"""The engine that serves, against transformers and against its own promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from leap_serve.checkpoint import Checkpoint
from leap_serve.encoding import Encoded
from leap_serve.engine import Engine
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.engines.vllm_engine import VllmEngine
from leap_serve.errors import LeapError, UnsupportedError
from leap_serve.tasks.base import Item
from tiny_tokenizer import talking_copy

pytestmark = pytest.mark.e2e
PROMPTS = ["Once upon", "2 + 2 =", "the the the the", "Q"]
ITEMS = [Item(str(number), prompt, f" {prompt[::-1]}") for number, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def model(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_copy(family_checkpoint("qwen3_moe"), tmp_path_factory.mktemp("engine") / "qwen3_moe", with_bos=True)


@pytest.fixture(scope="module")
def reference(model: Path) -> Iterator[TorchEngine]:
    engine = TorchEngine(model, dtype="float32", device="cpu", max_model_len=64)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(model, dtype="float32", kv_cache_gib=0.05, max_model_len=64, max_num_seqs=8)
    yield engine
    engine.close()


@pytest.fixture(params=["vllm", "torch"])
def either(request: pytest.FixtureRequest) -> Engine:
    found: Engine = request.getfixturevalue("engine" if request.param == "vllm" else "reference")
    return found


def test_greedy_text_is_the_reference_s(engine: VllmEngine, reference: TorchEngine) -> None:
    assert engine.generate(PROMPTS, 12) == reference.generate(PROMPTS, 12)


def test_progress_counts_up_to_the_end(either: Engine) -> None:
    seen: list[tuple[int, int]] = []
    either.generate(PROMPTS, 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (4, 4)


def test_each_outcome_is_told_as_it_comes(either: Engine) -> None:
    told: tuple[dict[int, object], ...] = ({}, {}, {})
    answers = either.generate(PROMPTS, 6, each=told[0].__setitem__)
    scores = either.score(ITEMS, each=told[1].__setitem__)
    assert [[one[place] for place in range(4)] for one in told[:2]] == [answers, scores]
    # The same by token ids: <s> prompt, answer </s>.
    prompts = either.tokenize([item.prompt for item in ITEMS], prefix=True)
    answered = either.tokenize([item.answer for item in ITEMS])
    assert [ids[0] for ids in prompts] == [1] * 4 and all(1 not in ids for ids in answered)
    pairs = [Encoded(one, [*other, 2]) for one, other in zip(prompts, answered, strict=True)]
    assert either.score_ids(pairs, each=told[2].__setitem__) == scores == [told[2][place] for place in range(4)]


def test_a_stop_string_ends_the_text_before_it(either: Engine) -> None:
    whole = either.generate(PROMPTS[:1], 24)[0]
    stop = whole.text[2:4]
    assert len(stop) == 2
    cut = either.generate(PROMPTS[:1], 24, stop=[stop])[0]
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert (whole.finish_reason, len(whole.token_ids)) == ("length", 24)


def test_sampling_repeats_for_a_seed(either: Engine) -> None:
    first, again, other = (either.generate(PROMPTS, 8, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_scores_are_likelihoods_of_answer_and_end(engine: VllmEngine, reference: TorchEngine) -> None:
    import torch

    found, expected = engine.score(ITEMS), reference.score(ITEMS)
    np.testing.assert_allclose([s.logprob for s in found], [s.logprob for s in expected], rtol=1e-5)
    assert [s.tokens for s in found] == [len(item.answer) + 1 for item in ITEMS]
    assert engine.score(ITEMS[:1]) == found[:1], "a score does not depend on its company, or on what was asked before"
    # By hand, for the first item: <s> prompt answer </s>.
    ids = [1, *engine.tokenize([ITEMS[0].prompt + ITEMS[0].answer])[0], 2]
    with torch.inference_mode():
        logprobs = reference._model(torch.tensor([ids])).logits[0].log_softmax(-1)
    first = 1 + len(ITEMS[0].prompt)
    by_hand = sum(float(logprobs[at - 1, ids[at]]) for at in range(first, len(ids)))
    assert found[0].logprob == pytest.approx(by_hand, rel=1e-5)


def test_timed_generation_gives_every_token_a_time(either: Engine) -> None:
    timings = either.generate_timed([[5, 6, 7], [8], [9] * 20], 9)
    assert len(timings) == 3
    for timing in timings:
        assert len(timing.token_times_s) == 9
        assert timing.token_times_s[0] > 0 and list(timing.token_times_s) == sorted(timing.token_times_s)


def test_timed_generation_ignores_the_end_of_text(engine: VllmEngine) -> None:
    """Random weights end early for some prompt: without ignore_eos that request would lack tokens."""
    texts = [chr(33 + number) for number in range(90)]
    early = [text for text, out in zip(texts, engine.generate(texts, 12), strict=True) if out.finish_reason == "stop"]
    assert early, "no prompt ends early, so this test shows nothing"
    timings = engine.generate_timed([[1, *ids] for ids in engine.tokenize(early)], 12)
    assert {len(timing.token_times_s) for timing in timings} == {12}


def test_memory_counts_what_was_loaded(model: Path, engine: VllmEngine, reference: TorchEngine) -> None:
    files = Checkpoint.open(model).weight_bytes
    assert reference.memory().weights_bytes == files
    found = engine.memory()
    # vLLM pads the vocabulary of embedding and head from 160 to 192 rows.
    assert found.weights_bytes == files + 2 * 32 * 64 * 4
    assert 0.9 * 0.05 * 2**30 < found.kv_cache_bytes <= 0.05 * 2**30
    assert found.peak_bytes > found.weights_bytes + found.kv_cache_bytes


def test_too_long_and_empty_inputs_are_refused_before_any_work(either: Engine) -> None:
    for ask in (
        lambda: either.generate(["short", "x" * 64], 4),
        lambda: either.score([ITEMS[0], Item("long", "x" * 40, "y" * 40)]),
        lambda: either.profile([ITEMS[0], Item("long", "x" * 40, "y" * 40)]),
        lambda: either.generate_timed([[5], [5] * 60], 9),
    ):
        with pytest.raises(LeapError, match=r"1: has .* max_model_len"):
            ask()
    with pytest.raises(LeapError, match="holds no tokens"):
        either.generate_timed([[]], 4)
    assert len(either.generate(PROMPTS, 2)) == 4


def test_what_vllm_refuses_is_a_leap_error(model: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ({"dtype": "float13"}, "float13"),
        ({"max_model_len": 100_000}, "max_model_len|max_position_embeddings"),
        ({"kv_cache_gib": 0}, "kv_cache_gib"),
        ({"no_such_argument": 1}, "no_such_argument"),
    ):
        with pytest.raises(LeapError, match=message):
            VllmEngine(model, **wrong)  # type: ignore[arg-type]
    with pytest.raises(LeapError, match="no such folder"):
        VllmEngine(tmp_path / "nowhere")
    with pytest.raises(LeapError, match="float13"):
        TorchEngine(model, dtype="float13")


def test_a_model_without_tokenizer_is_timed_but_not_asked(family_checkpoint: Callable[[str], Path]) -> None:
    mute = TorchEngine(family_checkpoint("qwen3_moe"), dtype="float32", device="cpu")
    assert len(mute.generate_timed([[5, 6]], 2)[0].token_times_s) == 2
    with pytest.raises(LeapError, match="holds none"):
        mute.generate(["text"], 2)
    mute.close()


def test_profiling_needs_an_engine_that_can_be_watched(engine: VllmEngine) -> None:
    engine.enforce_eager = False
    with pytest.raises(UnsupportedError, match="enforce_eager"):
        engine.profile(ITEMS)
    engine.enforce_eager = True
    with pytest.raises(LeapError, match="no items"):
        engine.profile([])


def test_a_second_engine_after_the_first_is_closed(engine: VllmEngine, model: Path) -> None:
    expected = engine.generate(PROMPTS, 8)
    engine.close()
    engine.close()
    second = VllmEngine(model, dtype="float32", kv_cache_gib=0.05, max_model_len=64)
    try:
        assert second.generate(PROMPTS, 8) == expected
    finally:
        second.close()
