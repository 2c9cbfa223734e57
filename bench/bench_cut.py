"""How fast `leap cut` is against plainly copying as many bytes, and how much memory it takes.

    python bench/bench_cut.py                    # 4 GiB, 3 interleaved pairs, a row in bench/results/cut.jsonl

A synthetic sharded Qwen3-MoE checkpoint is made in a temporary folder and removed afterwards. Each round
copies exactly the number of bytes that the cut writes (shards of the source, the last one in part), then
cuts, both to fresh files, in a child process each; the order alternates. Both end with fsync, so both
pay for the disk and not for the page cache alone; before each, what is dirty is synced. `copy_cached` is
the copy's time before its fsync, for comparison. The source has just been written and one cut is thrown
away first, so that all rounds find the source as cached as memory allows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from leap_serve import provenance
from leap_serve.checkpoint import Checkpoint
from leap_serve.files import append_jsonl
from leap_serve.plan import LayerPlan, Plan

RESULTS = Path(__file__).parent / "results" / "cut.jsonl"
HIDDEN, INNER, EXPERTS, TOP_K = 2048, 768, 64, 8  # the matrices of Qwen3-30B-A3B
CUT = """
import json, resource, sys, time
from pathlib import Path
from leap_serve.cut.write import cut
from leap_serve.plan import Plan
plan = Plan.load(Path(sys.argv[2]))
began = time.perf_counter()
report = cut(Path(sys.argv[1]), plan, Path(sys.argv[3]))
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak_rss_kib": peak, "bytes": report.weights_bytes}))
"""
COPY = """
import json, os, shutil, sys, time
from pathlib import Path
left, out = int(sys.argv[2]), Path(sys.argv[3])
began = time.perf_counter()
out.mkdir()
handles = []
for source in sorted(Path(sys.argv[1]).glob("model-*.safetensors")):
    size = min(left, source.stat().st_size)
    if not size:
        break
    with source.open("rb") as reader, (out / source.name).open("wb") as writer:
        done = 0
        while done < size:
            done += os.copy_file_range(reader.fileno(), writer.fileno(), min(size - done, 16 * 2**20))
    handles.append(os.open(out / source.name, os.O_RDWR))
    left -= size
cached = time.perf_counter() - began
for handle in handles:
    os.fsync(handle)
print(json.dumps({"seconds": time.perf_counter() - began, "cached_s": cached}))
"""


def tensors_of(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes (bf16) of the synthetic model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16384, HIDDEN)}
    for layer in range(layers):
        head = f"model.layers.{layer}."
        shapes[f"{head}self_attn.q_proj.weight"] = (2 * HIDDEN, HIDDEN)
        for expert in range(EXPERTS):
            for part, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                shapes[f"{head}mlp.experts.{expert}.{part}_proj.weight"] = shape
        shapes[f"{head}mlp.gate.weight"] = (EXPERTS, HIDDEN)
    return shapes


def make_model(folder: Path, gib: float, seed: int) -> int:
    """Write the checkpoint, shards of 1 GiB at most, and return its bytes. Content: one random MiB, rotated."""
    folder.mkdir()
    per_layer = 2 * (EXPERTS * 3 * HIDDEN * INNER + EXPERTS * HIDDEN + 2 * HIDDEN * HIDDEN)
    layers = max(2, -(-int(gib * 2**30) // per_layer))
    noise = random.Random(seed).randbytes(2**20)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": EXPERTS, "hidden_size": HIDDEN,
        "num_experts_per_tok": TOP_K, "num_hidden_layers": layers, "moe_intermediate_size": INNER, "norm_topk_prob": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, int]] = [{}]
    for name, shape in tensors_of(layers).items():
        size = 2 * shape[0] * shape[1]
        if sum(shards[-1].values()) + size > 2**30:
            shards.append({})
        shards[-1][name] = size
    shapes = tensors_of(layers)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        header, position = {}, 0
        for name, size in shard.items():
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, position, len(noise)):
                turn = start // len(noise) % len(noise)
                stream.write((noise[turn:] + noise[:turn])[: position - start])
    total = sum(sum(shard.values()) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def child(code: str, *argv: object) -> dict[str, Any]:
    """Run a measurement in a process of its own, on a disk that has nothing left to write."""
    os.sync()
    time.sleep(1)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, check=True, timeout=3600
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(work: Path, gib: float, pairs: int, keep: int, seed: int) -> dict[str, Any]:
    """Make the model, time pairs of copy and cut, and return the row's figures."""
    model, plan_file = work / "model", work / "plan.json"
    base_bytes = make_model(model, gib, seed)
    checkpoint = Checkpoint.open(model)
    rng = random.Random(seed)
    layers = {k: LayerPlan(tuple(sorted(rng.sample(range(EXPERTS), keep))), TOP_K) for k in checkpoint.moe_layers}
    plan = Plan(checkpoint.identity(), EXPERTS, layers)
    plan.save(plan_file)
    largest = max(entry.nbytes for entry in checkpoint.tensors.values())
    written = child(CUT, model, plan_file, work / "warm-up")["bytes"]
    shutil.rmtree(work / "warm-up")
    rows: dict[str, list[dict[str, Any]]] = {"copy": [], "cut": []}
    for pair in range(pairs):
        for what in ("copy", "cut") if pair % 2 == 0 else ("cut", "copy"):
            out = work / f"{what}-{pair}"
            second = written if what == "copy" else plan_file
            rows[what].append(child(COPY if what == "copy" else CUT, model, second, out))
            shutil.rmtree(out)
    cut_s = [row["seconds"] for row in rows["cut"]]
    copy_s = [row["seconds"] for row in rows["copy"]]
    ratios = [copy / cut for copy, cut in zip(copy_s, cut_s, strict=True)]
    return {
        "base_bytes": base_bytes, "written_bytes": written, "tensors": len(checkpoint.tensors), "retained": keep,
        "num_experts": EXPERTS, "largest_tensor_bytes": largest, "pairs": pairs, "cut_s": [round(x, 3) for x in cut_s],
        "copy_s": [round(x, 3) for x in copy_s], "copy_cached_s": [round(row["cached_s"], 3) for row in rows["copy"]],
        "speed_ratio_median": round(statistics.median(ratios), 3), "speed_ratio_min": round(min(ratios), 3),
        "speed_ratio_max": round(max(ratios), 3), "cut_gib_s_median": round(written / 2**30 / statistics.median(cut_s), 3),
        "peak_rss_mib": round(max(row["peak_rss_kib"] for row in rows["cut"]) / 1024, 1),
        "allowed_rss_mib": round(2 * largest / 2**20 + 300, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Time leap cut against plain copying of the bytes it writes.")
    parser.add_argument("--gib", type=float, default=4.0, help="size of the synthetic checkpoint (default 4)")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--keep", type=int, default=16, help=f"experts retained of {EXPERTS} (default 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where the temporary folder is made")
    args = parser.parse_args()
    free = shutil.disk_usage(args.dir or tempfile.gettempdir()).free
    if free < 2.5 * args.gib * 2**30:
        parser.error(f"needs {2.5 * args.gib:.1f} GiB of disk, {free / 2**30:.1f} GiB are free")
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="leap-bench-cut-") as work:
        figures = measure(Path(work), args.gib, args.pairs, args.keep, args.seed)
    row = {
        "bench": "cut", **provenance.made_by(seed=args.seed), "command": provenance.command(), **figures,
        "load_average": os.getloadavg()[0], "versions": provenance.versions(), "hardware": provenance.hardware(),
    }  # fmt: skip
    append_jsonl(RESULTS, row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
