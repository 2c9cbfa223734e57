"""``leap cut MODEL plan.json -o ckpt/``: cut the planned experts out of a checkpoint, on files only."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import resolve_model
from leap_serve.cli.console import progress_bar, say, table
from leap_serve.cut.write import cut
from leap_serve.errors import UsageError
from leap_serve.plan import Plan

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("model", help="the full model: a checkpoint folder, leap-tiny, or a model id")
    parser.add_argument("plan", type=Path, help="plan.json of leap search, made for this model")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--force", action="store_true", help="replace --out if it is not empty")
    parser.add_argument("--optimizer", type=Path, help="optimizer state (safetensors) to cut alike")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default 5GB)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Cut and show what was written."""
    limit = _size(args.max_shard_size)
    model, plan = resolve_model(args.model), Plan.load(args.plan)
    with progress_bar("cut, MiB") as bar:
        report = cut(
            model, plan, args.out, force=args.force, optimizer=args.optimizer, max_shard_bytes=limit,
            progress=lambda done, total: bar(done >> 20, total >> 20),
        )  # fmt: skip
    least, most = min(report.retained), max(report.retained)
    table(
        f"{args.model} → {args.out}",
        ["", "before", "after"],
        [
            ["experts per MoE layer", report.num_experts, least if least == most else f"{least} – {most}"],
            ["weights, GiB", f"{report.base_bytes / 2**30:.3f}", f"{report.weights_bytes / 2**30:.3f}"],
            ["architecture", "", report.architecture],
            ["fingerprint", "", report.fingerprint[:12]],
        ],
    )
    if report.left_out:
        say(f"not copied: {', '.join(report.left_out)}")
    return report.to_json()


def _size(text: str) -> int:
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMG]i?B|)\s*", text, re.IGNORECASE)
    try:
        value = int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    except ValueError:
        value = 0
    if value < 1:
        raise UsageError("--max-shard-size", f"is {text!r}, not a size", "give for instance 5GB or 500MiB")
    return value
