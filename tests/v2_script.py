"""Run by test_v2_runner.py in a process of its own: many plans in an engine with vLLM's V2 model runner.

    python v2_script.py SETTINGS MODEL PLAN PLAN

SETTINGS are VllmEngine's, as JSON. The last line printed is JSON: what came out, for the test to judge.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leap_serve.engines.vllm_engine import VllmEngine
from leap_serve.engines.vllm_plans import Subset
from leap_serve.errors import UnsupportedError
from leap_serve.plan import Plan
from leap_serve.tasks.base import Item

ITEMS = [
    Item("0", "The quick brown fox", " jumps over the lazy dog."),
    Item("1", "The quick brown fox", " sleeps."),
    Item("2", "", "def f(x):\n    return x + 1\n"),
    Item("3", "0123456789 " * 5, "ABC"),
]
LONG = "The quick brown fox jumps over the lazy dog. " * 4
"""More than a block of the KV cache, so that there is something to find in the prefix cache."""


def runner_of(engine: VllmEngine) -> Any:
    return engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def scores(engine: VllmEngine) -> list[float]:
    return [score.logprob for score in engine.score(ITEMS)]


def masked(engine: VllmEngine, plans: Sequence[Plan]) -> list[list[float]]:
    return [[score.logprob for score in row] for row in engine.score_plans(plans, ITEMS)]


def applied(engine: VllmEngine, plan: Plan) -> list[float]:
    engine.apply(plan)
    return scores(engine)


def decoded(engine: VllmEngine, subsets: Sequence[Subset]) -> tuple[list[Any], list[Any]]:
    """Greedy tokens of two prompts under each subset: all in one batch, and one request at a time."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, detokenize=False)
    asked = [(prompt, subset) for prompt in engine.tokenize(["Once upon", "2 + 2 ="]) for subset in subsets]

    def run(part: Sequence[Any]) -> list[list[int]]:
        results = engine._run([p for p, _ in part], params, None, [s for _, s in part])
        return [list(result.outputs[0].token_ids) for result in results]

    return run(asked), [run([one])[0] for one in asked]


def asked(engine: VllmEngine, subsets: Sequence[Subset]) -> list[dict[int, float]]:
    """The first new token's log-probabilities under each subset, one request after the other, from an empty cache."""
    from vllm import SamplingParams

    engine._llm.reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20, detokenize=False)
    results = [engine._run(engine.tokenize([LONG]), params, None, [subset])[0] for subset in subsets]
    return [{token: found.logprob for token, found in result.outputs[0].logprobs[0].items()} for result in results]


def refusals(engine: VllmEngine, plan: Plan) -> list[str]:
    """What the runner answers under settings in which tokens cannot be told apart."""
    runner, found = runner_of(engine), []
    parallel, cache = runner.parallel_config, runner.cache_config
    engine.unhook_plans()
    for name, value in (
        ("parallel_config", dataclasses.replace(parallel, enable_dbo=True)),
        ("parallel_config", dataclasses.replace(parallel, prefill_context_parallel_size=2)),
        ("cache_config", dataclasses.replace(cache, kv_sharing_fast_prefill=True)),
    ):
        stock = getattr(runner, name)
        setattr(runner, name, value)
        try:
            engine.load_plans([plan])
        except UnsupportedError as error:
            found.append(str(error))
        finally:
            setattr(runner, name, stock)
    return found


def main() -> None:
    engine = VllmEngine(sys.argv[2], **json.loads(sys.argv[1]))
    plans = [Plan.load(Path(path)) for path in sys.argv[3:]]
    state = runner_of(engine).model_state
    out: dict[str, Any] = {"runner": type(runner_of(engine)).__module__, "stock": scores(engine)}
    out["mixed"] = masked(engine, plans)
    out["hooked"] = sorted({"add_request", "prepare_inputs"} & set(vars(state)))
    out["alone"] = [masked(engine, [plan])[0] for plan in plans]
    out["unnamed"] = scores(engine)
    first, second = engine.load_plans(plans)
    out["decoded"], out["decoded_alone"] = decoded(engine, [Subset(0, None), first, second])
    out["right"] = asked(engine, [second])[0]
    out["poisoned"] = asked(engine, [Subset(first.slot, None), Subset(second.slot, None)])[1]
    out["salted"] = asked(engine, [first, second, first, second])[3]
    out["applied"] = [applied(engine, plan) for plan in plans]
    out["left"] = sorted({"add_request", "prepare_inputs"} & set(vars(state)))
    engine.restore()
    out["restored"] = scores(engine)
    out["again"] = masked(engine, plans[::-1])[::-1]
    out["esp"] = [[score.esp for score in row] for row in engine.score_plans(plans, ITEMS, esp=True)]
    out["refusals"] = refusals(engine, plans[0])
    if engine.enforce_eager:
        profile = engine.profile(ITEMS[:2])
        out["profile"] = [profile.tokens, [int(layer.n.sum()) for layer in profile.layers.values()]]
    out["graphs"] = len(runner_of(engine).cudagraph_manager.graphs)
    engine.close()
    print(json.dumps(out))


if __name__ == "__main__":
    main()
