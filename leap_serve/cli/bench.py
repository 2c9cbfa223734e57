"""``leap bench latency|throughput|memory|serve A [--vs B]``: one checkpoint measured, or two interleaved."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leap_serve.bench.contenders import ROUND_TIMEOUT_S, Contender, compare, measure_rounds, opened, stamped
from leap_serve.cli.console import progress_bar, say, table
from leap_serve.errors import UsageError
from leap_serve.files import append_jsonl
from leap_serve.measure import LATENCY_METRICS, check_rounds
from leap_serve.workload import Workload

UNITS = {
    "ttft_ms": "TTFT ms", "tpot_ms": "TPOT ms", "itl_ms": "ITL ms", "e2el_ms": "E2EL ms",
    "output_tok_s": "output tok/s", "total_tok_s": "total tok/s", "requests_s": "requests/s",
}  # fmt: skip
SHOWN = {
    "latency": (*LATENCY_METRICS, "output_tok_s"),
    "throughput": ("output_tok_s", "total_tok_s", "requests_s"),
    "serve": (*LATENCY_METRICS, "output_tok_s", "requests_s"),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "latency": {"batch": [1, 8, 32], "input_tokens": 128, "output_tokens": 32},
    "throughput": {"batch": [64], "input_tokens": 128, "output_tokens": 64},
    "memory": {"batch": [32], "input_tokens": 128, "output_tokens": 32},
    "serve": {"batch": [32], "input_tokens": 128, "output_tokens": 32},
}
EPILOG = """\
A and B run in processes of their own, by turns (A, B, B, A, …) and never at the same time; ratios are A/B
per pair of rounds, with an order-statistic 95 % interval of their median (it takes 6 rounds)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", choices=(*SHOWN, "memory"))
    parser.add_argument("model", metavar="A", help="a checkpoint folder, leap-tiny, or a model id")
    parser.add_argument("--vs", metavar="B", help="a second checkpoint, interleaved with the first")
    parser.add_argument("--batch", type=int, nargs="+", help="requests at once (latency: 1 8 32, throughput: 64)")
    parser.add_argument("--input-tokens", type=int, help="prompt tokens per request (default 128)")
    parser.add_argument("--output-tokens", type=int, help="decoded tokens per request (default 32; throughput: 64)")
    parser.add_argument("--rounds", type=int, default=6, help="measured rounds per contender (default 6)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before that, not kept (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--leap-kernel", choices=["auto", "ours", "vllm"], help="MoE kernel of both, as in leap serve")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0, help="KV cache of each contender (default 1)")
    parser.add_argument("--request-rate", type=float, default=math.inf, help="serve: requests per second (default inf)")
    parser.add_argument("--concurrency", type=int, help="serve: requests in flight at most")
    parser.add_argument(
        "--results", type=Path, help="append rows here (default in a checkout: bench/results/bench.jsonl)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, show, record."""
    workloads = _workloads(args)
    check_rounds(args.rounds, args.warmup)
    contenders = _contenders(args, workloads)
    described = [contender.describe() for contender in contenders]
    measure = {"memory": _memory, "serve": _serve}.get(args.kind, _timed)
    rows = [stamped(row) for row in measure(args, workloads, contenders, described)]
    results = args.results or default_results()
    if results is not None:
        for row in rows:
            append_jsonl(results, row)
    _show(args.kind, rows)
    if results is not None:
        say(f"{len(rows)} rows appended to {results}")
    return {"bench": args.kind, "rows": rows}


def default_results() -> Path | None:
    """bench/results/bench.jsonl of the checkout that the current folder lies in, or None outside of one."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "leap_serve" / "bench").is_dir() and (folder / "bench" / "results").is_dir():
            return folder / "bench" / "results" / "bench.jsonl"
    return None


Rows = list[dict[str, Any]]
Described = Sequence[Mapping[str, Any]]


def _workloads(args: argparse.Namespace) -> list[Workload]:
    chosen = {
        key: value if (value := getattr(args, key)) is not None else DEFAULTS[args.kind][key]
        for key in DEFAULTS["latency"]
    }
    return [
        Workload(args.kind, chosen["input_tokens"], chosen["output_tokens"], batch, args.seed)
        for batch in dict.fromkeys(chosen["batch"])
    ]


def _contenders(args: argparse.Namespace, workloads: Sequence[Workload]) -> list[Contender]:
    if args.kv_cache_gib <= 0:
        raise UsageError("--kv-cache-gib", f"is {args.kv_cache_gib}", "give a positive number of GiB")
    engine = {
        "dtype": args.dtype, "kv_cache_gib": args.kv_cache_gib, "max_num_seqs": max(load.batch for load in workloads),
        "max_model_len": max(load.input_tokens + load.output_tokens for load in workloads),
    }  # fmt: skip
    models = [args.model] + ([args.vs] if args.vs else [])
    labels = [Path(model).resolve().name if Path(model).is_dir() else model for model in models]
    if len(set(labels)) < len(labels):
        labels = [f"{side}: {label}" for side, label in zip("AB", labels, strict=True)]
    env = {"LEAP_KERNEL": args.leap_kernel} if args.leap_kernel else {}
    return [Contender(label, model, engine, env) for label, model in zip(labels, models, strict=True)]


def _timed(
    args: argparse.Namespace, workloads: Sequence[Workload], contenders: Sequence[Contender], described: Described
) -> Rows:
    rows: Rows = []
    with opened(contenders) as workers:
        for load in workloads:
            with progress_bar(f"{args.kind} at batch {load.batch}") as progress:
                samples = measure_rounds(workers, load, args.rounds, args.warmup, progress)
            seen = [{**about, **worker.about} for about, worker in zip(described, workers, strict=True)]
            rows.append({"workload": load.to_json(), **compare(args.kind, seen, samples, SHOWN[args.kind])})
    return rows


def _serve(
    args: argparse.Namespace, workloads: Sequence[Workload], contenders: Sequence[Contender], described: Described
) -> Rows:
    from leap_serve.bench.serve import measure_serving

    flags = ["--dtype", args.dtype, "--", f"--kv-cache-memory-bytes={int(args.kv_cache_gib * 2**30)}"]
    rows: Rows = []
    for load in workloads:
        with progress_bar(f"serve, {load.batch} requests") as progress:
            samples = measure_serving(
                contenders, load, args.request_rate, args.concurrency, args.rounds, args.warmup, flags, progress
            )
        rate = None if math.isinf(args.request_rate) else args.request_rate
        row = compare("serve", described, samples, SHOWN["serve"])
        rows.append({"workload": {**load.to_json(), "request_rate": rate, "concurrency": args.concurrency}, **row})
    return rows


def _memory(
    args: argparse.Namespace, workloads: Sequence[Workload], contenders: Sequence[Contender], described: Described
) -> Rows:
    sides = []
    for contender, about in zip(contenders, described, strict=True):
        # One after the other: a GPU's peak is the process's own, but the cards are shared.
        with opened([contender]) as (worker,):
            measure_rounds([worker], workloads[-1], 1, 0)
            held = worker.ask("memory", ROUND_TIMEOUT_S)
        gib = {f"{key.removesuffix('_bytes')}_gib": value / 2**30 for key, value in held.items()}
        sides.append({**about, "metrics": {**held, **gib}})
    row: dict[str, Any] = {"bench": "memory", "workload": workloads[-1].to_json(), "contenders": sides}
    if len(sides) == 2:
        a, b = (side["metrics"] for side in sides)
        row["ratio_a_over_b"] = {key: a[key] / b[key] for key in a if key.endswith("_gib") and b[key]}
    return [row]


def _show(kind: str, rows: Rows) -> None:
    for row in rows:
        load, names = row["workload"], [side["label"] for side in row["contenders"]]
        title = f"{kind}: batch {load['batch']}, {load['input_tokens']} + {load['output_tokens']} tokens"
        header = ["metric", *names] + (["A/B"] if len(names) == 2 else [])
        cell: Callable[[Any], str] = _gib if kind == "memory" else _quantiles
        keys = [key for key in row["contenders"][0]["metrics"] if not key.endswith("_bytes")]
        body = [
            [UNITS.get(key, key.replace("_gib", " GiB").replace("_", " ")), *(cell(s["metrics"][key]) for s in row["contenders"])]
            + ([_ratio(row["ratio_a_over_b"].get(key))] if len(names) == 2 else [])
            for key in keys
        ]  # fmt: skip
        body.append(
            ["MFLOPs/token", *(f"{s['flops_per_token'] / 1e6:.2f}" for s in row["contenders"])]
            + [""] * (len(names) - 1)
        )
        table(title, header, body)


def _gib(value: float) -> str:
    return f"{value:.4f}"


def _quantiles(found: Mapping[str, float]) -> str:
    return f"{_short(found['median'])} ({_short(found['p10'])}…{_short(found['p90'])})"


def _ratio(found: Any) -> str:
    if found is None or isinstance(found, float):
        return "" if found is None else f"{found:.3f}"
    # A percentage stands only where the interval is not the usual 95 % one: too few rounds for it.
    rest = "" if found["coverage"] >= 0.95 else f" ({100 * found['coverage']:.0f} %)"
    return f"{found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}]{rest}"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
