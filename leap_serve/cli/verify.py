"""``leap verify ckpt/ [--base MODEL]``: check a cut checkpoint, with --base against the model it came from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import resolve_model
from leap_serve.cli.console import progress_bar, say, table
from leap_serve.cut.verify import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("checkpoint", type=Path, help="a cut checkpoint")
    parser.add_argument("--base", help="the model it was cut from: compare every byte by SHA-256")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Verify and show the counts."""
    base = resolve_model(args.base) if args.base else None
    with progress_bar("verify, MiB") as bar:
        report = verify(args.checkpoint, base, lambda done, total: bar(done >> 20, total >> 20))
    if base is None:
        say(
            f"{args.checkpoint}: {report.tensors} tensors and one fingerprint, {report.fingerprint[:12]}, agree with leap.json"
        )
        if report.overlays:
            say(f"beside the weights, of the same fingerprint and of fitting shapes: {', '.join(report.overlays)}")
        say("give --base MODEL to compare every byte with the model it was cut from")
        return report.to_json()
    table(
        f"{args.checkpoint} against {args.base}: " + ("as its plan makes it" if report.remade else "byte-identical"),
        ["tensors", "number"],
        [
            ["copied untouched", report.untouched],
            ["of retained experts, renumbered", report.renumbered],
            ["sliced to the retained experts' rows", report.sliced],
            ["changed by the plan, computed anew", report.remade],
            ["beside the weights, not from the base", ", ".join(report.overlays) or "nothing"],
            ["GiB compared", f"{report.bytes_compared / 2**30:.3f}"],
        ],
    )
    return report.to_json()
