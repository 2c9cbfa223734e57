"""Decoding gets faster with fewer experts where a batch reads many of them, and does not where it reads few.

Makes a random qwen3_moe whose weights are nearly all experts, cuts it to 32, 16, 8 and 4 of 64 experts with
the same top-4, and measures all of them interleaved in one run. Appends a row per batch and cut to
bench/results/batch.jsonl; ``ratio_a_over_b`` is full over cut, so for tpot_ms it is the speed-up.

    python bench/bench_batch.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from leap_serve.bench.contenders import Contender, compare, measure_rounds, opened, stamped
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import progress_bar, table
from leap_serve.cut.write import cut
from leap_serve.files import append_jsonl
from leap_serve.plan import LayerPlan, Plan
from leap_serve.workload import Workload

RESULTS = Path(__file__).parent / "results" / "batch.jsonl"
METRICS = ("ttft_ms", "tpot_ms", "output_tok_s")


def make_model(
    folder: Path, hidden: int, intermediate: int, experts: int, layers: int, seed: int = 0, dtype: str = "bfloat16",
    form: str = "qwen3_moe",
) -> Path:  # fmt: skip
    """Write a model with top-4 routing, or of Llama 4's form (top-1, a shared expert, every other layer dense).

    Routers and embeddings are wide, so that every token has its own experts.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Llama4TextConfig, Qwen3MoeConfig

    torch.manual_seed(seed)
    shared: dict[str, Any] = dict(
        vocab_size=2048, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=1,
        head_dim=64, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=None, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    if form == "llama4_text":
        config: Any = Llama4TextConfig(
            **shared, num_local_experts=experts, num_experts_per_tok=1, intermediate_size=intermediate,
            intermediate_size_mlp=intermediate, interleave_moe_layer_step=2, attention_chunk_size=2048,
        )  # fmt: skip
    else:
        config = Qwen3MoeConfig(
            **shared,
            num_experts=experts,
            num_experts_per_tok=4,
            moe_intermediate_size=intermediate,
            norm_topk_prob=True,
        )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                routers = (".mlp.gate.weight", ".router.weight")
                parameter.normal_(0.0, 1.0 if "embed" in name else 0.2 if name.endswith(routers) else 0.03)
    model.save_pretrained(folder)
    if form == "llama4_text":  # vLLM asks this form's tokenizer for more than its token ids
        AutoTokenizer.from_pretrained(resolve_model("leap-tiny")).save_pretrained(folder)
    return folder


def cut_to(model: Path, experts: int, out: Path) -> Path:
    """Keep the same number of experts in every layer."""
    source = Checkpoint.open(model)
    step = source.num_experts // experts
    layer = LayerPlan(tuple(range(0, source.num_experts, step)), source.top_k)
    cut(model, Plan(source.identity(), source.num_experts, dict.fromkeys(source.moe_layers, layer)), out)
    return out


def main() -> None:
    """Make, cut, measure, record, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 16, 8, 4], help="of 64, in each layer")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    loads = [Workload("decode", input_tokens=16, output_tokens=32, batch=batch) for batch in args.batch]
    with tempfile.TemporaryDirectory() as folder:
        full = make_model(Path(folder) / "experts64", args.hidden, args.intermediate, 64, args.layers)
        models = [full, *(cut_to(full, kept, Path(folder) / f"experts{kept}") for kept in args.experts)]
        engine = {"kv_cache_gib": 0.25, "max_model_len": 64, "max_num_seqs": max(args.batch)}
        env = {"OMP_NUM_THREADS": str(args.threads)}
        contenders = [Contender(model.name, str(model), engine, env) for model in models]
        described = [contender.describe() for contender in contenders]
        shown = []
        with opened(contenders) as workers:
            for load in loads:
                with progress_bar(f"batch {load.batch}") as progress:
                    samples = measure_rounds(workers, load, args.rounds, warmup=2, progress=progress)
                line: list[Any] = [load.batch]
                for index in range(1, len(workers)):
                    both = [described[0], described[index]], [samples[0], samples[index]]
                    row = compare("batch", *both, METRICS)
                    append_jsonl(args.results, stamped({"workload": load.to_json(), **row}))
                    speed_up = row["ratio_a_over_b"]["tpot_ms"]
                    line.append(f"{speed_up['median']:.2f} [{speed_up['low']:.2f}, {speed_up['high']:.2f}]")
                line.insert(1, f"{row['contenders'][0]['metrics']['tpot_ms']['median']:.2f}")
                shown.append(line)
    table("speed-up of TPOT over 64 experts", ["batch", "TPOT ms, 64", *map(str, args.experts)], shown)


if __name__ == "__main__":
    main()
