"""``leap profile MODEL --task T -o prof/``: collect the experts' statistics, inside the engine that serves."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from leap_serve.cli.console import progress_bar, table
from leap_serve.cli.engines import open_engine
from leap_serve.cut.write import check_destination
from leap_serve.errors import UsageError
from leap_serve.files import new_folder
from leap_serve.profile import Profile
from leap_serve.provenance import made_by
from leap_serve.tasks.base import Item
from leap_serve.tasks.registry import TASKS, items_from_file, load_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("model", help="a checkpoint folder, leap-tiny, or a model id")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--task", help=f"one of {', '.join(TASKS)}")
    data.add_argument("--data", type=Path, help='JSON Lines, plain or .gz: {"prompt", "answer"} or {"text"}')
    parser.add_argument("--split", default="train", help="train (default) or validation, of --task")
    parser.add_argument("--limit", type=int, default=256, help="items to look at (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated items")
    parser.add_argument("--engine", default="vllm", choices=("vllm", "torch"), help="torch is the slow reference")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument(
        "--channels", action="store_true", help="also sum what goes into every channel (for moe-pruner and intra)"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the profile")
    parser.add_argument("--force", action="store_true", help="replace --out if it is not empty")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Profile, write the folder, and show how the experts were used."""
    items = _items(args)
    check_destination(Path(args.model), args.out)
    # Opened first, so that a folder that may not be replaced is refused before the model is loaded.
    with new_folder(args.out, args.force) as folder:
        profile = _profile(args, items)
        source = {"task": args.task, "split": args.split} if args.task else {"data": str(args.data)}
        profile = replace(profile, made_by=made_by(model=args.model, seed=args.seed, **source))
        profile.write(folder)
    rows = []
    for index, layer in profile.layers.items():
        share = layer.n / layer.n.sum()
        top = int(layer.n.argmax())
        rows.append([index, f"{int((layer.n > 0).sum())} of {layer.n.size}", top, f"{100 * share[top]:.1f} %"])
    table(
        f"{args.model}: {profile.items} items, {profile.tokens} tokens → {args.out}",
        ["layer", "experts hit", "most used", "its share"],
        rows,
    )
    return {
        "out": str(args.out), "model": args.model, "items": profile.items, "tokens": profile.tokens,
        "layers": len(profile.layers), "num_experts": profile.num_experts, "data_sha256": profile.data_sha256,
        "engine": profile.engine, "dtype": profile.dtype,
        "experts_hit": [int((layer.n > 0).sum()) for layer in profile.layers.values()],
    }  # fmt: skip


def _items(args: argparse.Namespace) -> list[Item]:
    if args.limit < 1:
        raise UsageError("--limit", f"must be at least 1, got {args.limit}", "give a positive number of items")
    if args.data:
        return items_from_file(args.data, args.limit)
    if args.split not in ("train", "validation"):
        what = "is refused: nothing is ever chosen from a test set" if args.split == "test" else "is unknown"
        raise UsageError("--split", f"{args.split!r} {what}", "choose train or validation")
    return load_task(args.task).items(args.split, args.limit, args.seed)


def _profile(args: argparse.Namespace, items: list[Item]) -> Profile:
    engine = open_engine(args.engine, args.model, args.dtype)
    try:
        with progress_bar("profile") as progress:
            return engine.profile(items, progress, channels=args.channels)
    finally:
        engine.close()
