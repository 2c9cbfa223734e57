"""``leap eval CKPT --task T``: score a checkpoint on a task, greedy decoding in the engine that serves."""

from __future__ import annotations

import argparse
import os
from typing import Any

from leap_serve.cli.console import progress_bar, table
from leap_serve.cli.engines import open_engine
from leap_serve.errors import UsageError
from leap_serve.evaluate import evaluate
from leap_serve.sandbox import UNSAFE
from leap_serve.tasks.registry import TASKS, load_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("model", help="a checkpoint folder, leap-tiny, or a model id")
    parser.add_argument("--task", action="append", required=True, help=f"one of {', '.join(TASKS)}; may be repeated")
    parser.add_argument("--limit", type=int, default=500, help="items per task (default 500)")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated items")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine", default="vllm", choices=("vllm", "torch"))
    parser.add_argument(
        "--allow-unsafe-execution", action="store_true",
        help="run generated code even where the kernel allows no sandbox, at your own risk",
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model once and evaluate every task."""
    if args.limit < 1:
        raise UsageError("--limit", f"must be at least 1, got {args.limit}", "give a positive number of items")
    if args.allow_unsafe_execution:
        os.environ[UNSAFE] = "1"
    tasks = [load_task(name) for name in dict.fromkeys(args.task)]
    engine = open_engine(args.engine, args.model, args.dtype)
    results: dict[str, Any] = {}
    try:
        for task in tasks:
            items = task.items(args.split, args.limit, args.seed)
            with progress_bar(f"eval {task.name}") as progress:
                outcome = evaluate(engine, task, items, progress)
            results[task.name] = {
                "metric": outcome.metric, "score": outcome.score, "loss": outcome.loss, "items": len(items),
            }  # fmt: skip
    finally:
        engine.close()
    table(
        f"{args.model} on {args.split}",
        ["task", "metric", "score", "loss", "items"],
        [[n, r["metric"], f"{100 * r['score']:.1f} %", f"{r['loss']:.4f}", r["items"]] for n, r in results.items()],
    )
    return {"model": str(args.model), "split": args.split, "engine": args.engine, "tasks": results}
