"""Does λ buy latency? Plans searched with and without a latency term, at the same budget, timed in the engine that serves.

    python bench/bench_latency_reward.py                     # a random model of 4 uneven layers, about ten minutes
    python bench/bench_latency_reward.py --model leap-tiny   # the same on the bundled model

What can differ at one budget is the allocation: D(c) distinct experts of c are read per step, and D is concave, so
few experts in many layers and many in few are read faster than the same number everywhere. The random model's layers
contribute unequally, so that quality (ESP against the full model) asks for an allocation of its own. Reported: the
physical range (even against concentrated), the calibration's error on held-out plans, then for every seed the plan of
λ > 0 over that of λ = 0, in interleaved rounds of one engine; a plan's figures are measured, never predicted.
Appends a row to bench/results/latency_reward.jsonl.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from leap_serve.bench.contenders import stamped
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import progress_bar, table
from leap_serve.engine import mean_esp
from leap_serve.engines.vllm_engine import VllmEngine
from leap_serve.files import append_jsonl
from leap_serve.measure import ratio, summary
from leap_serve.plan import LayerPlan, Plan
from leap_serve.profile import Profile
from leap_serve.tasks.base import Item
from leap_serve.tasks.registry import TASKS, load_task
from leap_serve.workload import Workload
from leap_training.latency import LatencyModel, calibrate, compare, sample_plans
from leap_training.pruning_agent import AgentConfig, search
from leap_training.pruning_space import Ledger, PruningSpace, Reward
from leap_training.saliency import Routing, scores

RESULTS = Path(__file__).parent / "results" / "latency_reward.jsonl"
CONTRIBUTIONS = (0.05, 0.02, 0.04, 0.03)
"""Spread of the layers' down projections: what their experts add to the residual stream."""


def make_model(folder: Path, seed: int = 0) -> Path:
    """A random Qwen3-MoE whose weights are nearly all experts: 4 layers of 32, top-2, hidden 512, 768 wide; leap-tiny's tokenizer."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=512, moe_intermediate_size=768, num_experts=32, num_experts_per_tok=2,
        num_hidden_layers=len(CONTRIBUTIONS), num_attention_heads=4, num_key_value_heads=1, head_dim=64,
        norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=1024, bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                # Wide routers, so that every token has its own experts; embeddings no larger than what layers add.
                wide = {"embed": 0.2, "lm_head": 1.0, ".mlp.gate.": 0.2}
                parameter.normal_(0.0, next((spread for part, spread in wide.items() if part in name), 0.03))
        for layer, spread in zip(model.model.layers, CONTRIBUTIONS, strict=True):
            layer.mlp.experts.down_proj.normal_(0.0, spread)
        # Logits of a spread near 3, as trained models have them.
        model.model.norm.weight.fill_(3.0 / math.sqrt(512))
    model.save_pretrained(folder)
    for file in resolve_model("leap-tiny").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def even_and_concentrated(space: PruningSpace) -> tuple[Plan, Plan]:
    """The budget spread over all layers, and the same budget with one layer after the other filled up."""
    layers, experts = space.shape
    rest = space.budget - sum(space.top_k)
    counts = [[k + rest // layers + (at < rest % layers) for at, k in enumerate(space.top_k)], list(space.top_k)]
    for at, k in enumerate(space.top_k):
        counts[1][at] += min(rest, experts - k)
        rest -= min(rest, experts - k)
    even, concentrated = (
        Plan(
            space.routing.base, experts,
            {layer: LayerPlan(tuple(range(count)), k) for layer, count, k in zip(space.layers, each, space.top_k, strict=True)},
        )
        for each in counts
    )  # fmt: skip
    return even, concentrated


def searched(
    engine: VllmEngine, profile: Profile, items: Sequence[Item], space: PruningSpace, latency: LatencyModel,
    latency_coef: float, args: argparse.Namespace, seed: int,
) -> tuple[Plan, float]:  # fmt: skip
    """The plan of one search, and its loss −log ESP."""

    def evaluate(plans: Sequence[Plan]) -> list[float]:
        return [-math.log(mean_esp(row)) for row in engine.score_plans(plans, items, esp=True)]

    ledger = Ledger(evaluate, space, Reward(latency_coef=latency_coef), latency)
    found = search(profile, scores(profile, "gate-mass"), ledger, AgentConfig(episodes=args.episodes, seed=seed))
    return found.plan, found.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random-uneven-4x32")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--latency-coef", type=float, default=4.0)
    parser.add_argument("--episodes", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--items", type=int, default=4)
    parser.add_argument("--plans", type=int, default=20, help="measured to calibrate on, a quarter of them held out")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    load = Workload("decode", input_tokens=16, output_tokens=32, batch=args.batch)
    items = load_task(next(iter(TASKS))).items("validation", args.items)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder, "model")) if args.model == "random-uneven-4x32" else resolve_model(args.model)
        engine = VllmEngine(model, dtype="float32", kv_cache_gib=0.25, max_model_len=256)
        space = PruningSpace.of(Routing.of(Checkpoint.open(model)), budget=args.budget, allocation="global")
        profile = engine.profile(items)
        with progress_bar("physical range") as progress:
            even, concentrated = compare(engine, even_and_concentrated(space), load, args.rounds, progress)
        with progress_bar("calibrate") as progress:
            latency = calibrate(engine, sample_plans(space, args.plans), load, progress=progress)
        plans, losses = [], []
        for seed in range(args.seeds):
            for coefficient in (args.latency_coef, 0.0):
                plan, loss = searched(engine, profile, items, space, latency, coefficient, args, seed)
                plans.append(plan)
                losses.append(loss)
        with progress_bar("measure") as progress:
            found = compare(engine, [*plans, None], load, args.rounds, progress)
        engine.close()
    with_term, without = found[:-1:2], found[1:-1:2]
    row: dict[str, Any] = {
        "bench": "latency_reward", "model": args.model, "budget": args.budget, "latency_coef": args.latency_coef,
        "episodes": args.episodes, "workload": load.to_json(), "items": args.items, "rounds": args.rounds,
        "concentrated_over_even": ratio(concentrated, even).to_json(),
        "latency_model": {"form": latency.form, "coefficients": latency.coefficients, "held_out_mape": dict(latency.mape),
                          "calibrated": latency.calibrated, "held_out": latency.held_out},
        "full_tpot_ms": summary(found[-1]).to_json(),
        "pairs": [
            {
                "seed": seed,
                **{
                    name: {"counts": plans[at].counts, "predicted": latency(plans[at]),
                           "measured": ratio(found[at], found[-1]).to_json(), "esp": math.exp(-losses[at])}
                    for name, at in (("with", 2 * seed), ("without", 2 * seed + 1))
                },
                "with_over_without": ratio(with_term[seed], without[seed]).to_json(),
            }
            for seed in range(args.seeds)
        ],
        "with_over_without": ratio([*chain(*with_term)], [*chain(*without)]).to_json(),
    }  # fmt: skip
    append_jsonl(RESULTS, stamped(row))
    show(row)


def show(row: dict[str, Any]) -> None:
    """Print what the row says."""

    def interval(found: dict[str, Any]) -> str:
        return f"{found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"

    table(
        f"TPOT at batch {row['workload']['batch']}; concentrated / even allocation {interval(row['concentrated_over_even'])}; "
        f"held-out MAPE {row['latency_model']['held_out_mape'][row['latency_model']['form']]:.1%} ({row['latency_model']['form']})",
        ["seed", "λ > 0: counts", "over full", "predicted", "ESP", "λ = 0: counts", "over full", "predicted", "ESP", "λ > 0 / λ = 0"],
        [
            [
                pair["seed"],
                *(
                    cell
                    for side in (pair["with"], pair["without"])
                    for cell in (
                        " ".join(map(str, side["counts"])), interval(side["measured"]), f"{side['predicted']:.3f}",
                        f"{side['esp']:.3f}",
                    )
                ),
                interval(pair["with_over_without"]),
            ]
            for pair in row["pairs"]
        ],
    )  # fmt: skip
    table("all seeds", ["λ > 0 / λ = 0"], [[interval(row["with_over_without"])]])


if __name__ == "__main__":
    main()
