"""One MoE layer: our kernel against vLLM's (default and tuned), OpenAI's, torch's grouped_mm, and the machine's floor.

    python bench/bench_kernel.py                      # on a CUDA GPU, nothing else running; rows in results/kernel.jsonl
    python bench/bench_kernel.py --resume             # only what the file lacks: after an interruption
    python bench/bench_kernel.py --resources          # no GPU: registers and shared memory for sm_80, sm_90, sm_100
    python bench/bench_kernel.py --smoke --out FILE   # no GPU: tiny shapes in Triton's interpreter; its times mean nothing

All contenders of a shape take turns in one process; each time is a CUDA graph's, between two events, on weights that
rotate through more than any L2. The floor is the larger of bytes over the copy bandwidth and arithmetic over the matrix
rate, both measured first. Tuned launches come from LEAP_KERNEL_CONFIGS (`leap tune-kernels`), which holds vLLM's as well.
A contender that cannot run here is left out, and the row says why.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leap_serve.bench.contenders import stamped
from leap_serve.cli.console import table
from leap_serve.files import append_jsonl, read_jsonl

RESULTS = Path(__file__).parent / "results"
MODELS = {"Qwen3-30B-A3B": (2048, 768, 8), "Qwen3-235B-A22B": (4096, 1536, 8), "Llama-4-Maverick": (5120, 8192, 1)}
"""Name → H, I, top_k."""
EXPERTS = (128, 64, 32, 16, 8)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SMOKE = {"models": {"tiny": (32, 16, 2)}, "experts": (4, 3), "tokens": (1, 5), "dtype": "float32"}
GPU = {"models": MODELS, "experts": EXPERTS, "tokens": TOKENS, "dtype": "bfloat16"}


def machine(device: Any, smoke: bool) -> dict[str, float]:
    """Measure what bounds a layer: copy bandwidth in GB/s (read and written) and the bf16 matrix rate in TFLOP/s."""
    import torch

    from leap_kernels.timing import median_us

    elements, size = (2**16, 128) if smoke else (2**30, 8192)
    source, target = (torch.ones(elements, dtype=torch.bfloat16, device=device) for _ in range(2))
    copy_us = median_us(lambda _: target.copy_(source), 1, 11, device)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product_us = median_us(lambda _: a @ b, 1, 11, device)
    return {"copy_gb_s": elements * 4 / copy_us / 1e3, "matrix_tflop_s": 2 * size**3 / product_us / 1e6}


def grouped_mm(bench: Any, batch: Any) -> Callable[[int], object]:
    """torch's own: sort, gather, grouped product, SiLU·mul, grouped product, weights, sum in order of arrival."""
    import torch
    from torch.nn import functional

    experts, top_k = bench.shape.experts, bench.shape.top_k

    def run(index: int) -> object:
        order = torch.argsort(batch.ids.flatten(), stable=True)
        bounds = torch.arange(experts, device=batch.ids.device, dtype=batch.ids.dtype)
        ends = torch.searchsorted(batch.ids.flatten()[order], bounds, right=True).to(torch.int32)
        token = order // top_k
        gate, up = torch._grouped_mm(batch.x[token], bench.w13[index].transpose(1, 2), offs=ends).chunk(2, dim=1)
        rows = torch._grouped_mm(functional.silu(gate) * up, bench.w2[index].transpose(1, 2), offs=ends)
        weighted = rows * batch.weights.flatten()[order, None].to(rows.dtype)
        return torch.zeros_like(batch.x).index_add_(0, token, weighted)

    return run


Made = Callable[[], Callable[[int], Any]]
PROVEN = ("ours", "ours default", "vLLM default", "vLLM tuned")
"""Contenders that must agree: if one differs, nothing is timed. The others are left out of a row, with the reason."""


def contenders(bench: Any, batch: Any, tuned: Any, smoke: bool) -> dict[str, Made]:
    """Return name → what makes its layer; making it, or running it, may fail where its library is absent."""
    from leap_kernels import reference_moe
    from leap_vllm import compat_contenders as others

    entry = tuned.nearest(len(batch.x)) if tuned else None
    given = {"topk_ids": batch.ids, "topk_weights": batch.weights}
    data = (batch.x, bench.w13, bench.w2, batch.ids, batch.weights)
    made: dict[str, Made] = {"ours": lambda: bench.ours(batch, entry.config if entry else None)}
    if smoke:
        made["torch"] = lambda: lambda index: reference_moe(batch.x, bench.w13[index], bench.w2[index], **given)
    else:
        if entry:
            made["ours default"] = lambda: bench.ours(batch)
        made["vLLM default"] = lambda: others.vllm_layer(*data)
        if entry and entry.vllm_config:
            made["vLLM tuned"] = lambda: others.vllm_layer(*data, dict(entry.vllm_config))
        made["torch grouped_mm"] = lambda: grouped_mm(bench, batch)
    made["OpenAI triton_kernels"] = lambda: others.openai_layer(*data)
    return made


def agreeing(made: dict[str, Made], sets: int, device: Any) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Return the stopwatches of layers that give what ours gives, and why each of the others does not take part.

    Made ready one after the other: what runs alone may still refuse to be captured in a CUDA graph.
    """
    from leap_kernels.timing import stopwatch

    running: dict[str, Callable[[], float]] = {}
    absent: dict[str, str] = {}
    expected: Any = None
    for name, make in made.items():
        try:
            layer = make()
            found = layer(0).float()
            expected = found if expected is None else expected
            apart = ((found - expected).abs().max() / expected.abs().max()).item()
            if apart < 0.05:
                running[name] = stopwatch(layer, sets, device)
                continue
        except Exception as error:
            if name in PROVEN:
                raise
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        if name in PROVEN:
            raise SystemExit(f"{name} differs from ours by {apart:.3f} of the largest output: nothing is timed")
        absent[name] = f"its output differs from ours by {apart:.3f} of the largest"
    return running, absent


def measure(bench: Any, tokens: int, rates: dict[str, float], tuned: Any, rounds: int, smoke: bool) -> dict[str, Any]:
    """Time all contenders on one batch, after checking that they agree; returns the row's numbers in µs."""
    from leap_kernels.timing import in_turns

    batch = bench.batch(tokens)
    made = contenders(bench, batch, tuned, smoke)
    running, absent = agreeing(made, len(bench.w13), bench.device)
    times = in_turns(running, rounds)
    by_bytes = bench.bytes_read(batch) / rates["copy_gb_s"] / 1e3
    by_flops = bench.flops(batch) / rates["matrix_tflop_s"] / 1e6
    floor = max(by_bytes, by_flops)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "tokens": tokens, "distinct_experts": batch.distinct(), "floor_us": floor,
        "bound": "bytes" if by_bytes > by_flops else "arithmetic", "of_floor": floor / medians["ours"],
        "us": medians, "spread_us": {name: [min(values), max(values)] for name, values in times.items()},
        "rounds": rounds, "absent": absent,
    }  # fmt: skip


def sweep(args: argparse.Namespace, out: Path) -> None:
    import torch

    from leap_kernels.tuning import Shape, device_name, find_table
    from leap_kernels.workbench import ROTATED_BYTES, Workbench

    plan: dict[str, Any] = SMOKE if args.smoke else GPU
    device = torch.device("cpu" if args.smoke else "cuda")
    name = "cpu, interpreted" if args.smoke else device_name(device)
    known = known_rows(out) if args.resume else set()
    rates = machine(device, args.smoke)
    print(f"{name}: copy {rates['copy_gb_s']:.0f} GB/s, matrices {rates['matrix_tflop_s']:.1f} TFLOP/s", flush=True)
    for model in args.models or plan["models"]:
        hidden, width, top_k = plan["models"][model]
        for experts in args.experts or plan["experts"]:
            shape = Shape(experts, hidden, width, min(top_k, experts), plan["dtype"])
            tuned = None if args.smoke else find_table(shape, name)
            about = {"bench": "kernel", "model": model, "experts": experts, "top_k": shape.top_k, "device": name,
                     "dtype": shape.dtype, "smoke": args.smoke, "tuned": tuned is not None}  # fmt: skip
            todo = [t for t in args.tokens or plan["tokens"] if key_of({**about, "tokens": t}) not in known]
            if not todo:
                continue
            bench = Workbench(shape, device, 1 if args.smoke else ROTATED_BYTES)
            rows = []
            for tokens in todo:
                row = measure(bench, tokens, rates, tuned, args.rounds, args.smoke)
                rows.append(row)
                append_jsonl(out, stamped({**about, **rates, **row}))
            show(f"{model}, {experts} experts, top-{shape.top_k}, µs a layer", rows)
            del bench


def known_rows(out: Path) -> set[tuple[Any, ...]]:
    """The keys of the rows that a file holds."""
    return {key_of(row) for row in read_jsonl(out) if row.get("bench") == "kernel"}


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one row from another; a row of before the tuning is another one than after it."""
    return tuple(row.get(key) for key in ("model", "experts", "tokens", "smoke", "device", "dtype", "tuned"))


def show(title: str, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    lines = [
        [row["tokens"], f"{row['floor_us']:.1f}", f"{100 * row['of_floor']:.0f}",
         *(f"{row['us'][n]:.1f}" if n in row["us"] else "–" for n in names)]
        for row in rows
    ]  # fmt: skip
    table(title, ["tokens", "floor", "ours, % of floor", *names], lines)
    for name, why in {name: why for row in rows for name, why in row["absent"].items()}.items():
        print(f"left out: {name}: {why}", flush=True)


def resources(out: Path) -> int:
    """Compile everything that ships for three architectures and append what it takes."""
    command = [sys.executable, "-m", "leap_kernels.compiling"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        append_jsonl(out, stamped({"bench": "kernel_resources", **row}))
    worst = sorted(rows, key=lambda row: -row["registers"])[:12]
    keys = ("kernel", "variant", "arch", "registers", "stack", "local", "shared")
    table(f"{len(rows)} kernels compiled, {sum(not row['fits'] for row in rows)} do not fit; most registers first",
          keys, [[row[key] for key in keys] for row in worst])  # fmt: skip
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--resources", action="store_true", help="compile ahead of time instead of timing")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--experts", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--resume", action="store_true", help="skip what the file of rows holds already")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.resources:
        return resources(args.out or RESULTS / "kernel_resources.jsonl")
    if args.smoke:
        if args.out is None:
            parser.error("--smoke needs --out: its times do not belong among the results")
        args.rounds = 2
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_DEFAULT_FP_FUSION": "1"}
    else:
        import torch

        if not torch.cuda.is_available():
            parser.error("no CUDA GPU here: run it on one, or try --smoke or --resources")
    # vLLM reads tuned files from there first: its default would be measured with them.
    os.environ.pop("VLLM_TUNED_CONFIG_FOLDER", None)
    sweep(args, args.out or RESULTS / "kernel.jsonl")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
