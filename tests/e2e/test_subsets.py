"""Many plans in one running engine: mixed = alone = applied = transformers behind masks = the checkpoint really cut."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from families import SPECIFIC, make_checkpoint
from leap_serve.cut.write import cut
from leap_serve.engine import Score
from leap_serve.engines import vllm_scores
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.engines.vllm_engine import VllmEngine
from leap_serve.engines.vllm_plans import MAX_PLANS, Subset
from leap_serve.errors import LeapError, PlanError, UnsupportedError
from leap_serve.plan import LayerPlan, Plan
from leap_serve.tasks.base import Item
from leap_serve.workload import Workload
from parity import CONTROL, TOLERANCE, uneven_plan
from tiny_tokenizer import add_tokenizer, talking_copy

pytestmark = pytest.mark.e2e
# Shared prefixes, an empty prompt, and lengths that fill neither a block nor a step evenly.
ITEMS = [
    Item("0", "The quick brown fox", " jumps over the lazy dog."),
    Item("1", "The quick brown fox", " sleeps."),
    Item("2", "", "def f(x):\n    return x + 1\n"),
    Item("3", "0123456789 " * 5, "ABC"),
]
SETTINGS: dict[str, Any] = dict(dtype="float32", kv_cache_gib=0.05, max_model_len=128, max_num_batched_tokens=128)


def plans_of(model: Path) -> list[Plan]:
    """Three uneven plans: with τ, without, and of one expert per token everywhere."""
    lone = uneven_plan(model, 3)
    return [
        uneven_plan(model, 1),
        uneven_plan(model, 2, (1.0,) * 4),
        replace(lone, layers={index: replace(layer, top_k=1) for index, layer in lone.layers.items()}),
    ]


def largest(ours: Sequence[Sequence[Score]], theirs: Sequence[Sequence[Score]]) -> float:
    """Largest difference of a summed log-likelihood."""
    assert [[s.tokens for s in row] for row in ours] == [[s.tokens for s in row] for row in theirs]
    return max(
        abs(a.logprob - b.logprob)
        for row, other in zip(ours, theirs, strict=True)
        for a, b in zip(row, other, strict=True)
    )  # fmt: skip


def furthest(ours: Sequence[Sequence[Score]], theirs: Sequence[Sequence[Score]]) -> float:
    """Largest difference of an ESP."""
    pairs = [(a.esp, b.esp) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True)]
    return max(abs(a - b) for a, b in pairs if a is not None and b is not None)


def score_applied(engine: VllmEngine, plan: Plan) -> list[Score]:
    """Scores of the engine whose layers have shrunk to a plan."""
    engine.apply(plan)
    return engine.score(ITEMS)


@pytest.mark.parametrize("family", SPECIFIC)
def test_mixed_is_alone_is_masked_is_cut(family: str, family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = talking_copy(family_checkpoint(family), tmp_path / family)
    plans = plans_of(model)
    reference = TorchEngine(model, dtype="float32", device="cpu")
    stock, masked = reference.score(ITEMS), reference.score_plans(plans, ITEMS, esp=True)
    assert reference.score(ITEMS) == stock, "the reference's hooks are off again"
    reference.close()
    assert min(largest([row], [other]) for at, row in enumerate([stock, *masked]) for other in masked[at:]) > CONTROL

    # 24 tokens of a prompt per step: prompts are prefilled in several chunks, mixed in one batch.
    engine = VllmEngine(model, **SETTINGS, long_prefill_token_threshold=24)
    try:
        before = engine.score(ITEMS)
        seen: list[tuple[int, int]] = []
        mixed = engine.score_plans(plans, ITEMS, lambda done, total: seen.append((done, total)))
        overlapping = engine.score_plans(plans, ITEMS, esp=True)
        alone = [engine.score_plans([plan], ITEMS)[0] for plan in plans]
        applied = [score_applied(engine, plan) for plan in plans]
        engine.restore()
        assert engine.score(ITEMS) == before, "a request without a plan sees stock routing"
    finally:
        engine.close()
    assert seen[-1] == (12, 12)
    assert largest(mixed, alone) <= TOLERANCE
    assert largest(mixed, masked) <= TOLERANCE
    assert largest(mixed, applied) <= TOLERANCE
    assert largest([before], [stock]) <= TOLERANCE
    assert largest(overlapping, masked) <= TOLERANCE
    assert furthest(overlapping, masked) <= TOLERANCE
    assert furthest(overlapping, masked[1:] + masked[:1]) > CONTROL

    for number, plan in enumerate(plans):
        cut(model, plan, tmp_path / f"cut{number}")
        served = VllmEngine(tmp_path / f"cut{number}", **SETTINGS)
        try:
            assert largest([served.score(ITEMS)], [mixed[number]]) <= TOLERANCE
        finally:
            served.close()


@pytest.fixture(scope="module")
def model(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_copy(family_checkpoint("qwen3_moe"), tmp_path_factory.mktemp("subsets") / "qwen3_moe")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[VllmEngine]:
    """One engine, its prefix cache on."""
    engine = VllmEngine(model, **{**SETTINGS, "max_model_len": 256, "enable_prefix_caching": True})
    yield engine
    engine.close()


def ask(engine: VllmEngine, subsets: Sequence[Subset]) -> list[dict[int, float]]:
    """One request per subset, one after the other: the first new token's log-probabilities, all of them."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20, detokenize=False)
    # vLLM's blocks on a CPU hold 128 tokens, and only whole blocks are cached.
    prompt = engine.tokenize(["The quick brown fox jumps over the lazy dog. " * 4])
    answers = []
    for subset in subsets:
        (result,) = engine._run(prompt, params, None, [subset])
        answers.append({token: found.logprob for token, found in result.outputs[0].logprobs[0].items()})
    return answers


def apart(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """Largest difference over the likeliest tokens; infinite where these are others."""
    both = set(ours) & set(theirs)
    return max((abs(ours[t] - theirs[t]) for t in both), default=float("inf")) if len(both) > 10 else float("inf")


def test_without_salts_the_prefix_cache_answers_for_another_plan(engine: VllmEngine, model: Path) -> None:
    plans = plans_of(model)[:2]
    first, second = engine.load_plans(plans)
    right = ask(engine, [second])[0]
    engine._llm.reset_prefix_cache()
    bare = [replace(subset, salt=None) for subset in (first, second)]
    poisoned = ask(engine, bare)[1]
    engine._llm.reset_prefix_cache()
    salted = ask(engine, [first, second, first, second])
    assert apart(poisoned, right) > CONTROL, "keys and values of the first plan's experts should have been found"
    assert apart(salted[1], right) <= TOLERANCE
    assert apart(salted[3], right) <= TOLERANCE, "its own part of the cache serves it"
    assert apart(salted[0], right) > CONTROL


def test_a_plan_keeps_its_cache_when_its_slot_changes(engine: VllmEngine, model: Path) -> None:
    plans = plans_of(model)[:2]
    right = ask(engine, engine.load_plans(plans))
    assert max(map(apart, ask(engine, engine.load_plans(plans[::-1])), right[::-1])) <= TOLERANCE


def test_more_plans_than_slots(engine: VllmEngine, model: Path) -> None:
    base = plans_of(model)[0]
    layers = [
        {index: LayerPlan(tuple(sorted({n % 8, n // 8 % 8, (n + index) % 8, 7})), 1) for index in base.layers}
        for n in range(MAX_PLANS + 6)
    ]
    plans = [replace(base, layers=each) for each in layers]
    found = engine.score_plans(plans, ITEMS[:1])
    assert len(found) == MAX_PLANS + 6
    for number in (0, 5, MAX_PLANS - 1, MAX_PLANS, MAX_PLANS + 5):
        assert largest(found[number : number + 1], engine.score_plans([plans[number]], ITEMS[:1])) <= TOLERANCE
    assert engine.score_plans([], ITEMS) == []
    assert engine.score_plans(plans[:2], []) == [[], []]
    with pytest.raises(LeapError, match="at most 64"):
        engine.load_plans(plans)


def test_esp_in_groups_that_fit_the_memory_given(
    engine: VllmEngine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, items = plans_of(model), [*ITEMS, Item("empty", "no answer", "")]
    together = engine.score_plans(plans, items, esp=True)
    # 160 floats a token: the first two answers fit together, the third is larger than what is given.
    monkeypatch.setattr(vllm_scores, "REFERENCES", 35 * 160 * 4)
    seen: list[tuple[int, int]] = []
    grouped = engine.score_plans(plans, items, lambda done, total: seen.append((done, total)), esp=True)
    assert largest(together, grouped) <= TOLERANCE and furthest(together, grouped) <= TOLERANCE
    assert seen == sorted(seen) and seen[-1] == (20, 20)
    assert engine.score_plans([], items, esp=True) == []
    base = plans[0]
    whole = replace(base, layers=dict.fromkeys(base.layers, LayerPlan(tuple(range(8)), 2)))
    assert [s.esp for s in engine.score_plans([whole], items, esp=True)[0]] == pytest.approx([1.0] * 5, abs=1e-5)
    runner = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    assert "_get_prompt_logprobs_dict" not in vars(runner)


def test_hooks_come_off_and_back(engine: VllmEngine, model: Path) -> None:
    plans = plans_of(model)
    expected, stock = engine.score_plans(plans, ITEMS), engine.score(ITEMS)
    engine.unhook_plans()
    engine.unhook_plans()
    runner = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    assert "_prepare_inputs" not in vars(runner)
    assert engine.score(ITEMS) == stock
    assert engine.score_plans(plans, ITEMS) == expected
    assert "_prepare_inputs" in vars(runner)


def test_generation_in_mixed_company(engine: VllmEngine, model: Path) -> None:
    """Decoding, too: one token of each request per step, requests of four slots in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
    subsets = [Subset(0, None), *engine.load_plans(plans_of(model))]
    prompts = engine.tokenize(["Once upon", "2 + 2 =", "Q"])
    asked = [(prompt, subset) for prompt in prompts for subset in subsets]
    together = engine._run([p for p, _ in asked], params, None, [s for _, s in asked])
    texts = [tuple(result.outputs[0].token_ids) for result in together]
    for (prompt, subset), text in zip(asked, texts, strict=True):
        assert tuple(engine._run([prompt], params, None, [subset])[0].outputs[0].token_ids) == text
    assert len(set(texts)) > 8, "plans should say different things"


def test_layers_shrink_and_grow_back(engine: VllmEngine, model: Path) -> None:
    plan = plans_of(model)[0]
    full, text, cached = engine.score(ITEMS), engine.generate(["Once upon"], 12), ask(engine, [Subset(0, None)])
    masked, whole = engine.score_plans([plan], ITEMS), engine.memory().weights_bytes
    engine.apply(plan)
    assert largest([engine.score(ITEMS)], masked) <= TOLERANCE
    assert largest([full], masked) > CONTROL
    one_expert = 3 * 32 * 64 * 4
    assert engine.memory().weights_bytes == whole - one_expert * sum(8 - count for count in plan.counts)
    found = ask(engine, [Subset(0, None)])[0]
    engine._llm.reset_prefix_cache()
    assert apart(found, ask(engine, [Subset(0, None)])[0]) <= TOLERANCE, "keys of the full model were used"
    assert apart(found, cached[0]) > CONTROL
    measured = engine.measure(Workload("latency", input_tokens=8, output_tokens=4, batch=2), rounds=2, warmup=0)
    assert len(measured.samples) == 2 and measured.memory.weights_bytes == engine.memory().weights_bytes
    assert 0 < measured.summary("tpot_ms").median < measured.summary("e2el_ms").median
    for esp in (False, True):
        with pytest.raises(UnsupportedError, match="restore them first"):
            engine.score_plans([plan], ITEMS, esp=esp)
    with pytest.raises(UnsupportedError, match="restore it first"):
        engine.profile(ITEMS)
    engine.restore()
    engine.restore()
    assert engine.score(ITEMS) == full
    assert engine.generate(["Once upon"], 12) == text
    assert ask(engine, [Subset(0, None)]) == cached
    assert engine.memory().weights_bytes == whole
    assert largest(engine.score_plans([plan], ITEMS), masked) <= TOLERANCE


TENSOR_PARALLEL = """
import json, sys
from pathlib import Path
from leap_serve.plan import Plan
from leap_serve.tasks.base import Item
from leap_serve.engines.vllm_engine import VllmEngine

if __name__ == "__main__":
    plans, items = [Plan.load(Path(path)) for path in sys.argv[2:]], [Item("0", "The quick brown fox", " jumps.")]
    engine = VllmEngine(sys.argv[1], dtype="float32", kv_cache_gib=0.05, max_model_len=128, tensor_parallel_size=2)
    found = [row[0].logprob for row in engine.score_plans(plans, items)]
    engine.apply(plans[0])
    found.append(engine.score(items)[0].logprob)
    engine.restore()
    found.append(engine.score_plans(plans, items)[1][0].logprob)
    engine.close()
    print(json.dumps(found))
"""


def test_tensor_parallel_workers_route_alike(tmp_path: Path) -> None:
    # GPT-OSS since its experts have biases; stock vLLM shares no KV head between workers.
    model = add_tokenizer(make_checkpoint("gpt_oss", tmp_path / "gpt_oss", num_key_value_heads=2))
    plans = plans_of(model)[:2]
    for number, plan in enumerate(plans):
        plan.save(tmp_path / f"{number}.json")
    (tmp_path / "run.py").write_text(TENSOR_PARALLEL)
    command = [sys.executable, str(tmp_path / "run.py"), str(model), str(tmp_path / "0.json"), str(tmp_path / "1.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = TorchEngine(model, dtype="float32", device="cpu")
    first, second = (
        row[0].logprob for row in reference.score_plans(plans, [Item("0", "The quick brown fox", " jumps.")])
    )
    reference.close()
    assert abs(first - second) > CONTROL
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx([first, second, first, second], abs=TOLERANCE)


def test_plans_of_another_model_are_refused(engine: VllmEngine, model: Path) -> None:
    plan = plans_of(model)[0]
    first = min(plan.layers)
    foreign = replace(plan, base=replace(plan.base, sha256="0" * 64))
    greedy = replace(plan, layers={**plan.layers, first: LayerPlan((0, 1, 2), 3)})
    partial = replace(plan, layers={first: plan.layers[first]})
    reference = TorchEngine(model, dtype="float32", device="cpu")
    for either in (engine, reference):
        for wrong, message in (
            (foreign, "was made for"),
            (greedy, "top_k 3, the model's is 2"),
            (partial, "in layers"),
        ):
            with pytest.raises(PlanError, match=rf"plan 1.*{message}"):
                either.score_plans([plan, wrong], ITEMS)
        with pytest.raises(LeapError, match=r"item 0: has .* max_model_len"):
            either.score_plans([plan], [Item("long", "x" * 150, "y" * 150)])
    engine.enforce_eager = False
    with pytest.raises(UnsupportedError, match="enforce_eager"):
        engine.score_plans([plan], ITEMS)
    with pytest.raises(UnsupportedError, match="enforce_eager"):
        engine.apply(plan)
    engine.enforce_eager = True
    assert largest(engine.score_plans([plan], ITEMS), reference.score_plans([plan], ITEMS)) <= TOLERANCE
    reference.close()
