"""``leap export ckpt/ -o plain/``: merge router head and adapter into the weights of a tuned cut."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import resolve_model
from leap_serve.cli.console import progress_bar, say, table
from leap_serve.cut.export import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("checkpoint", help="a tuned checkpoint, or a cut that tuning left as it was")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the plain checkpoint")
    parser.add_argument("--force", action="store_true", help="replace --out if it is not empty")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export and show what was written."""
    with progress_bar("export, tensors") as bar:
        report = export(resolve_model(args.checkpoint), args.out, force=args.force, progress=bar)
    table(
        f"{args.checkpoint} → {args.out}",
        ["", ""],
        [
            ["merged", ", ".join(report.merged) or "nothing"],
            ["tensors changed", f"{report.changed} of {report.tensors}"],
            ["weights, GiB", f"{report.weights_bytes / 2**30:.3f}"],
            ["architecture", report.architecture],
        ],
    )
    if not report.merged:
        say("it has neither a router head nor an adapter, so there was nothing to merge: this is the cut itself")
    if report.plugin:
        say("its layers differ in experts, top_k or temperature: serving it still needs leap-serve's plugin")
    else:
        say("plain vLLM and plain transformers load it")
    if report.left_out:
        say(f"not copied: {', '.join(report.left_out)}")
    return report.to_json()
