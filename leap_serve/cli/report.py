"""``leap report RUN… -o report.html``: what runs left on disk, as one self-contained page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from leap_serve.cli.console import say
from leap_serve.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN",
        help="folders of leap run, demo, search, cut or tune, the JSON of leap eval, rows of leap bench, bench/results",
    )  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    parser.add_argument("--force", action="store_true", help="replace --out if it exists")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Collect, write the page, and say what it holds and what it leaves out."""
    from leap_serve.report import write_report

    if args.out.is_dir():
        raise UsageError(args.out, "is a folder", "give the name of a file, e.g. report.html")
    if args.out.exists() and not args.force:
        raise UsageError(args.out, "exists", "choose another --out, or pass --force to replace it")
    result = write_report(args.runs, args.out)
    for sentence in result["left_out"]:
        say(f"left out: {sentence}")
    say(f"{sum(result['figures'].values())} figures of {len(result['models'])} models → {args.out}")
    return result
