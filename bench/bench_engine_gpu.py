"""What fewer experts are worth in the whole engine: real vLLM, Qwen3-30B-A3B's sizes, random weights.

    python bench/bench_engine_gpu.py                      # on a CUDA GPU; rows in results/engine_gpu.jsonl
    python bench/bench_engine_gpu.py --kernels vllm ours  # the same with our MoE kernel as well
    python bench/bench_engine_gpu.py --resume             # only what the file of rows lacks
    python bench/bench_engine_gpu.py --sparse DIR         # writes one checkpoint with every |I|, for leap tune-kernels
    python bench/bench_engine_gpu.py --sparse DIR --model Llama-4-Maverick        # the same with another model's layers
    python bench/bench_engine_gpu.py --smoke --out FILE   # tiny sizes on a CPU; its times say nothing about a GPU

128, 64, 32, 16 and 8 experts a layer and one plan whose layers differ, each in a process of its own. The checkpoints are
sparse files: headers, a config and leap.json, no weights, which vLLM draws at random (load format dummy). Random routers
spread tokens evenly, so a batch touches more experts than a trained model's would: no quality follows, and speed-ups of
trained models may differ. Nothing is compared within a process; run it twice to see the spread between processes.

All requests of a batch are submitted at once, and vLLM prefills long prompts a chunk a step: requests that are through
decode meanwhile, so that TPOT, from a request's first token to its last, holds prefill as well, about as much whatever the
expert count. Decode alone is the ITL, the median gap between two tokens of all requests: it shows no prefill as long as
fewer than half of the gaps do. Judge decode by the ITL's speed-up, and what a user waits for by that of TPOT.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from leap_serve.bench.contenders import stamped
from leap_serve.checkpoint import FINGERPRINT_KEY, MANIFEST, Checkpoint, resolve_model
from leap_serve.cli.console import table
from leap_serve.files import append_jsonl, new_folder, read_jsonl, write_json
from leap_serve.plan import BaseModel, LayerPlan, Plan

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from bench_kernel import EXPERTS, MODELS

RESULTS = Path(__file__).parent / "results" / "engine_gpu.jsonl"
DEFAULTS = "default"
"""Stands for the file of a kernel that follows none."""
SPARSE = "sparse"
"""Stands for the name of a model in plans of checkpoints without weights."""
SIZES: dict[str, int] = dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    max_position_embeddings=40960,
)  # fmt: skip
"""Qwen3-30B-A3B, from its config.json."""
TINY: dict[str, int] = dict(
    vocab_size=1024, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=8, num_experts_per_tok=2,
    max_position_embeddings=256,
)  # fmt: skip
GPU: dict[str, Any] = {
    "sizes": SIZES, "experts": EXPERTS, "uneven": (4, 8, 16, 40), "batches": (1, 8, 16, 32, 64, 128),
    "contexts": ((128, 128), (2048, 128)), "dtype": "bfloat16", "rounds": 5,
    "engine": {"max_num_seqs": 128, "kv_cache_gib": 32.0, "enforce_eager": False, "max_model_len": 4096},
}  # fmt: skip
SMOKE: dict[str, Any] = {
    "device": "cpu", "sizes": TINY, "experts": (8, 4), "uneven": (2, 5), "batches": (1, 2), "contexts": ((8, 4),), "dtype": "float32",
    "rounds": 1, "engine": {"max_num_seqs": 4, "kv_cache_gib": 0.02, "max_model_len": 64},
}  # fmt: skip


def tensors_of(sizes: dict[str, int], counts: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a Qwen3-MoE whose layer l holds counts[l] experts."""
    hidden, width, head = sizes["hidden_size"], sizes["moe_intermediate_size"], sizes["head_dim"]
    queries, keys = sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes["vocab_size"], hidden), "model.norm.weight": (hidden,),
        "lm_head.weight": (sizes["vocab_size"], hidden),
    }  # fmt: skip
    for layer, count in enumerate(counts):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.{name}_proj.weight": (size, hidden) for name, size in
                  (("q", queries), ("k", keys), ("v", keys))}  # fmt: skip
        found[f"{at}.self_attn.o_proj.weight"] = (hidden, queries)
        found |= {f"{at}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
        found |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        found[f"{at}.mlp.gate.weight"] = (count, hidden)
        for expert in range(count):
            found |= {f"{at}.mlp.experts.{expert}.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
            found[f"{at}.mlp.experts.{expert}.down_proj.weight"] = (hidden, width)
    return found


def write_sparse(folder: Path, settings: dict[str, Any], counts: Sequence[int]) -> Path:
    """Write a checkpoint without its data: real headers over a hole in the file."""
    sizes, layers = settings["sizes"], settings["sizes"]["num_hidden_layers"]
    top_k = min(sizes["num_experts_per_tok"], *counts)
    config: dict[str, Any] = {
        **sizes, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": max(counts),
        "num_experts_per_tok": top_k, "norm_topk_prob": True, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
        "dtype": settings["dtype"], "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    metadata, kind, width = {"format": "pt"}, *{"bfloat16": ("BF16", 2), "float32": ("F32", 4)}[settings["dtype"]]
    folder.mkdir(exist_ok=True)
    if len(set(counts)) > 1:
        base = BaseModel(SPARSE, "0" * 64)
        plan = Plan(base, sizes["num_experts"], {
            layer: LayerPlan(tuple(range(counts[layer])), top_k, 1.0) for layer in range(layers)
        })  # fmt: skip
        metadata[FINGERPRINT_KEY] = config[FINGERPRINT_KEY] = plan.fingerprint
        config["architectures"] = ["LeapQwen3MoeForCausalLM"]
        write_json(folder / MANIFEST, plan.to_json())
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, shape in tensors_of(sizes, counts).items():
        end = position + width * prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + position)
    write_json(folder / "config.json", config)
    # Prompts are drawn from a tokenizer's own ids; any tokenizer will do.
    for path in resolve_model("leap-tiny").glob("tokenizer*.json"):
        shutil.copyfile(path, folder / path.name)
    return folder


def child(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Open one engine and measure all batches; runs in a process of its own."""
    from leap_serve.engines.vllm_engine import VllmEngine
    from leap_serve.workload import Workload

    engine = VllmEngine(folder, dtype=settings["dtype"], load_format="dummy", **settings["engine"])
    rows = []
    for given, made in settings["contexts"]:
        for batch in settings["batches"]:
            found = engine.measure(Workload("engine", given, made, batch), settings["rounds"], 1)
            metrics = ("tpot_ms", "itl_ms", "ttft_ms", "output_tok_s")
            row = {"input_tokens": given, "output_tokens": made, "batch": batch}
            rows.append(row | {name: found.summary(name).to_json() for name in metrics})
    memory = engine.memory()
    layers = engine.kernels()
    kernels = Counter(f"{one['kernel']}: {one['experts_class']}" for one in layers)
    launches = Counter("/".join(Path(one["launches"]).parts[-2:]) if one["launches"] else DEFAULTS for one in layers)
    engine.close()
    return {"rows": rows, "moe_kernels": dict(kernels), "launches": dict(launches), "weights_gib": memory.weights_bytes / 2**30, "kv_gib": memory.kv_cache_bytes / 2**30,
            "peak_gib": memory.peak_bytes / 2**30}  # fmt: skip


def largest_batch(settings: dict[str, Any], found: dict[str, Any], context: int) -> int | None:
    """Return how many sequences of a context fit beside the weights in 90 % of the GPU; computed, not run."""
    import torch

    if not torch.cuda.is_available():
        return None
    sizes = settings["sizes"]
    per_token = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"] * 2
    total = torch.cuda.get_device_properties(0).total_memory
    beside = found["peak_gib"] - found["kv_gib"]
    return int((0.9 * total - beside * 2**30) // (per_token * context))


def variants(settings: dict[str, Any]) -> dict[str, list[int]]:
    """Name → experts per layer."""
    layers = settings["sizes"]["num_hidden_layers"]
    uneven = [settings["uneven"][layer % len(settings["uneven"])] for layer in range(layers)]
    return {**{str(count): [count] * layers for count in settings["experts"]}, "uneven": uneven}


Key = tuple[Any, ...]
"""Experts, kernel, whether tuned launches were at hand, device, dtype, input tokens, batch: one row."""
KEY = ("experts", "kernel", "tuned", "device", "dtype", "input_tokens", "batch")


def key_of(row: dict[str, Any]) -> Key:
    return tuple(row.get(name) for name in KEY)


def about(settings: dict[str, Any], experts: str, kernel: str) -> dict[str, Any]:
    """What is known of an engine's rows before it runs."""
    named = (os.environ.get(name) for name in ("LEAP_KERNEL_CONFIGS", "VLLM_TUNED_CONFIG_FOLDER"))
    tuned = any(next(Path(folder).glob("E=*.json"), None) for folder in named if folder)
    return {
        "experts": experts,
        "kernel": kernel,
        "tuned": tuned,
        "device": settings["device"],
        "dtype": settings["dtype"],
    }


def wanted(settings: dict[str, Any], experts: str, kernel: str) -> set[Key]:
    """The rows that one engine gives."""
    engine = about(settings, experts, kernel)
    return {
        key_of({**engine, "input_tokens": given, "batch": batch})
        for given, _ in settings["contexts"] for batch in settings["batches"]
    }  # fmt: skip


def run(
    settings: dict[str, Any], names: Sequence[str], kernels: Sequence[str], out: Path, smoke: bool, known: list[dict[str, Any]]
) -> None:  # fmt: skip
    """Measure what ``known`` rows do not hold, an engine at a time, and show all."""
    rows = list(known)
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            folder = write_sparse(Path(work) / name, settings, variants(settings)[name])
            for kernel in kernels:
                if wanted(settings, name, kernel) <= {key_of(row) for row in known}:
                    continue
                found = measure_apart(folder, settings, kernel, name)
                shared = {key: found[key] for key in ("moe_kernels", "launches", "weights_gib", "kv_gib")}
                engine = {"bench": "engine_gpu", "smoke": smoke, **about(settings, name, kernel), **shared}
                for row in found["rows"]:
                    fits = largest_batch(settings, found, row["input_tokens"] + row["output_tokens"])
                    rows.append(engine | row | {"largest_batch": fits})
                    append_jsonl(out, stamped(rows[-1]))
    show(rows, str(settings["experts"][0]))


def measure_apart(folder: Path, settings: dict[str, Any], kernel: str, name: str) -> dict[str, Any]:
    """Open one engine in a process of its own; returns what child() found."""
    env = {**os.environ, "LEAP_KERNEL": kernel, "PYTHONSAFEPATH": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, __file__, "--child", str(folder), json.dumps(settings)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} experts, kernel {kernel}: the engine's process ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(rows: list[dict[str, Any]], full: str) -> None:
    """Print all rows; speed-ups are those over ``full`` experts with vLLM's kernel, tuned if the row is.

    Launches by the folder of their file: vLLM ships some in ``configs``, what is tuned here lies in ``kernels``.
    """
    base = {key_of(row)[2:]: row for row in rows if key_of(row)[:2] == (full, "vllm")}

    def timed(row: dict[str, Any], metric: str) -> tuple[str, str]:
        value, before = row[metric]["median"], base.get(key_of(row)[2:])
        return f"{value:.2f}", f"{before[metric]['median'] / value:.2f}" if before else "–"

    lines = [
        [r["experts"], r["kernel"], "+".join(sorted({name.split("/")[0] for name in r["launches"]})), r["input_tokens"], r["batch"], *timed(r, "itl_ms"), *timed(r, "tpot_ms"),
         f"{r['ttft_ms']['median']:.1f}", f"{r['output_tok_s']['median']:.0f}", f"{r['weights_gib']:.2f}",
         f"{r['kv_gib']:.2f}", r["largest_batch"] or "–"]
        for r in rows
    ]  # fmt: skip
    header = ["experts", "kernel", "launches", "input", "batch", "ITL ms", "speed-up", "TPOT ms", "speed-up", "TTFT ms", "tok/s",
              "weights GiB", "KV GiB", "fits"]  # fmt: skip
    table(f"real vLLM, random weights; speed-ups over {full} experts with vLLM's kernel", header, lines)


def rows_of(out: Path, smoke: bool) -> list[dict[str, Any]]:
    """The rows that a file holds of this bench, run this way."""
    return [row for row in read_jsonl(out) if row.get("bench") == "engine_gpu" and row.get("smoke") is smoke]


def write_tunable(folder: Path, settings: dict[str, Any]) -> None:
    """Write a checkpoint whose layers go through all expert counts: what leap tune-kernels needs to see them all.

    One that is there already stays.
    """
    counts, layers = settings["experts"], settings["sizes"]["num_hidden_layers"]
    each = [counts[layer % len(counts)] for layer in range(layers)]
    if (folder / MANIFEST).is_file():
        plan = Checkpoint.open(folder).plan
        if plan is not None and (plan.base.id, plan.counts) == (SPARSE, each):
            return
    with new_folder(folder) as work:
        write_sparse(work, settings, each)


def layers_of(model: str) -> dict[str, Any]:
    """Settings whose MoE layers are a model's; all else stays as it is, since kernels see no more of a checkpoint."""
    hidden, width, top_k = MODELS[model]
    layers = {"hidden_size": hidden, "moe_intermediate_size": width, "num_experts_per_tok": top_k}
    return {**GPU, "sizes": {**SIZES, **layers, "num_hidden_layers": len(EXPERTS)}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--kernels", nargs="+", choices=["auto", "ours", "vllm"], default=["vllm"])
    parser.add_argument("--experts", nargs="+", metavar="N", help="expert counts, or uneven (default: all)")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B")
    parser.add_argument(
        "--contexts", type=int, nargs="+", metavar="TOKENS", help="input tokens (default: 128 and 2048)"
    )
    parser.add_argument("--output-tokens", type=int, metavar="TOKENS", help="decoded a request (default: 128)")
    parser.add_argument("--rounds", type=int, metavar="N", help="measured rounds of each batch (default: 5)")
    parser.add_argument("--resume", action="store_true", help="skip the engines whose rows the file holds already")
    parser.add_argument(
        "--sparse", type=Path, help="write a checkpoint with every expert count here, and measure nothing"
    )
    parser.add_argument("--model", choices=MODELS, help="with --sparse: whose MoE layers (default: Qwen3-30B-A3B's)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], json.loads(args.child[1]))))
        return 0
    settings = {**(SMOKE if args.smoke else GPU)}
    if args.sparse:
        write_tunable(args.sparse, layers_of(args.model) if args.model else settings)
        return 0
    names = args.experts or list(variants(settings))
    if unknown := sorted(set(names) - set(variants(settings))):
        parser.error(f"--experts {' '.join(unknown)}: choose among {', '.join(variants(settings))}")
    settings["batches"] = args.batches or settings["batches"]
    settings["rounds"] = args.rounds or settings["rounds"]
    settings["contexts"] = [
        (given, args.output_tokens or made)
        for given, made in settings["contexts"]
        if not args.contexts or given in args.contexts
    ]
    if args.smoke and args.out is None:
        parser.error("--smoke needs --out: its times do not belong among the results")
    if not args.smoke:
        import torch

        if not torch.cuda.is_available():
            parser.error("no CUDA GPU here: run it on one, or try --smoke")
        from leap_kernels.tuning import device_name

        settings["device"] = device_name(torch.device("cuda"))
    out = args.out or RESULTS
    run(settings, names, args.kernels, out, args.smoke, rows_of(out, args.smoke) if args.resume else [])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
