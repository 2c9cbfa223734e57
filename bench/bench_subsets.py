"""What it costs that requests carry plans of their own, and what it saves over cutting and loading each plan.

    python bench/bench_subsets.py                # leap-tiny and a random 150M-parameter model, 20 pairs
    python bench/bench_subsets.py --model leap-tiny --rounds 5

One engine, one process. Every round decodes the same batch under each setting, the order alternating:
`stock` with the hooks taken off, `hooked` with plans loaded but none named by a request, `mixed` with the
requests dealt over 8 plans. Pairs are compared as ratios of time per round. Then: plans scored per minute
by `score_plans`, 64 in one call, and per minute by cutting, loading, scoring and closing one plan after the
other in a warm process (which favours the latter: the 5 s of importing vLLM are not counted).
Rows go to bench/results/subsets.jsonl.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from leap_serve.bench.contenders import stamped
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import table
from leap_serve.cut.write import cut
from leap_serve.engines.vllm_engine import VllmEngine
from leap_serve.engines.vllm_plans import MAX_PLANS, Subset
from leap_serve.files import append_jsonl
from leap_serve.measure import ratio, summary
from leap_serve.plan import LayerPlan, Plan
from leap_serve.tasks.registry import TASKS, load_task

RESULTS = Path(__file__).parent / "results" / "subsets.jsonl"
SETTINGS = ("stock", "hooked", "mixed")
REQUESTS, PROMPT, OUTPUT, PLANS = 32, 64, 32, 8


def synthetic(folder: Path) -> Path:
    """A random Qwen3-MoE of about 150M parameters: hidden 512, 8 layers, 32 experts of 256, top-4."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=32000, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256,
        num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64, num_experts=32,
        num_experts_per_tok=4, norm_topk_prob=True, max_position_embeddings=512, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def random_plans(model: Path, number: int, seed: int = 0) -> list[Plan]:
    """Plans of a quarter of the experts each, drawn per layer."""
    source, draw = Checkpoint.open(model), random.Random(seed)
    experts, top_k = source.num_experts, source.top_k
    identity = source.identity()
    return [
        Plan(
            identity, experts,
            {
                layer: LayerPlan(tuple(sorted(draw.sample(range(experts), max(top_k, experts // 4)))), top_k)
                for layer in source.moe_layers
            },
        )
        for _ in range(number)
    ]  # fmt: skip


class Rounds:
    """One batch of requests, decoded under each of the settings."""

    def __init__(self, engine: VllmEngine, plans: list[Plan]) -> None:
        from vllm import SamplingParams

        draw = random.Random(0)
        vocabulary = engine.checkpoint.config["vocab_size"]
        self.engine, self.plans = engine, plans
        self.prompts = [[draw.randrange(3, vocabulary) for _ in range(PROMPT)] for _ in range(REQUESTS)]
        self.params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False)

    def run(self, setting: str) -> tuple[float, float]:
        """Return the seconds of one round: by the clock, and of processor time (in which others on the machine count less)."""
        subsets: list[Subset | None] = [None] * REQUESTS
        if setting == "stock":
            self.engine.unhook_plans()
        else:
            loaded = self.engine.load_plans(self.plans)
            if setting == "mixed":
                subsets = [loaded[number % len(loaded)] for number in range(REQUESTS)]
        began, worked = time.perf_counter(), time.process_time()
        self.engine._run(self.prompts, self.params, None, subsets)
        return time.perf_counter() - began, time.process_time() - worked


def cost(engine: VllmEngine, plans: list[Plan], rounds: int) -> dict[str, Any]:
    """Seconds per round and the ratios to stock, pair by pair, by the clock and of processor time."""
    bench = Rounds(engine, plans)
    seconds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    worked: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for setting in SETTINGS:
        bench.run(setting)
    for number in range(rounds):
        for setting in SETTINGS if number % 2 == 0 else SETTINGS[::-1]:
            by_clock, of_processor = bench.run(setting)
            seconds[setting].append(by_clock)
            worked[setting].append(of_processor)
    engine.unhook_plans()
    return {
        "seconds": {setting: summary(values).to_json() for setting, values in seconds.items()},
        "over_stock": {setting: ratio(seconds[setting], seconds["stock"]).to_json() for setting in SETTINGS[1:]},
        "processor_over_stock": {
            setting: ratio(worked[setting], worked["stock"]).to_json() for setting in SETTINGS[1:]
        },
    }


def threads() -> int:
    """Threads that torch computes with."""
    import torch

    return torch.get_num_threads()


def plans_per_minute(model: Path, engine: VllmEngine, reloads: int, items: int, dtype: str) -> dict[str, Any]:
    """Plans scored per minute in the running engine, and by cutting and loading; closes the engine."""
    asked = load_task(next(iter(TASKS))).items("validation", items)
    plans = random_plans(model, MAX_PLANS, seed=1)
    engine.score_plans(plans[:2], asked)
    began = time.perf_counter()
    masked = engine.score_plans(plans, asked)
    together = 60 * len(plans) / (time.perf_counter() - began)
    engine.close()
    began, largest = time.perf_counter(), 0.0
    for number in range(reloads):
        with tempfile.TemporaryDirectory() as folder:
            cut(model, plans[number], Path(folder, "cut"))
            served = VllmEngine(Path(folder, "cut"), dtype=dtype, kv_cache_gib=0.5)
            try:
                scores = served.score(asked)
            finally:
                served.close()
        gaps = [abs(a.logprob - b.logprob) for a, b in zip(scores, masked[number], strict=True)]
        largest = max(largest, *gaps)
    alone = 60 * reloads / (time.perf_counter() - began)
    return {
        "items": items, "plans": len(plans), "reloads": reloads, "in_engine": together, "cut_and_load": alone,
        "factor": together / alone, "largest_difference_of_a_score": largest,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="default: leap-tiny and a random 150M-parameter model")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--items", type=int, default=16, help="that each plan is scored on")
    parser.add_argument("--reloads", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.model or ["leap-tiny", "random-150m"]:
            made = name == "random-150m"
            model = synthetic(Path(folder, name)) if made else resolve_model(name)
            engine = VllmEngine(model, dtype=args.dtype, kv_cache_gib=0.5)
            row: dict[str, Any] = {
                "bench": "subsets", "model": name, "dtype": args.dtype, "requests": REQUESTS, "prompt_tokens": PROMPT,
                "output_tokens": OUTPUT, "plans_mixed": PLANS, "rounds": args.rounds, "threads": threads(),
                **cost(engine, random_plans(model, PLANS), args.rounds),
            }  # fmt: skip
            if made:  # no tokenizer, so there are no items to score
                engine.close()
            else:
                row["plans_per_minute"] = plans_per_minute(model, engine, args.reloads, args.items, args.dtype)
            append_jsonl(RESULTS, stamped(row))
            rows.append(row)
    table(
        f"{REQUESTS} requests, {PROMPT}+{OUTPUT} tokens, {args.rounds} interleaved rounds: time over stock",
        ["model", "stock s", "hooked / stock", "mixed / stock", "plans/min in engine", "by cut and load"],
        [
            [
                row["model"], f"{row['seconds']['stock']['median']:.3f}",
                *(
                    f"{r['median']:.4f} [{r['low']:.4f}, {r['high']:.4f}]"
                    for r in (row["over_stock"][setting] for setting in SETTINGS[1:])
                ),
                *(f"{row['plans_per_minute'][k]:.1f}" if "plans_per_minute" in row else "" for k in ("in_engine", "cut_and_load")),
            ]
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
