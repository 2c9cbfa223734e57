"""``leap methods``: every method of ``leap search``, what it is from, what it needs and what it decides."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from leap_serve.cli.console import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags: none."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """List them."""
    from leap_training.methods.registry import METHODS

    table(
        "methods of leap search",
        ["--method", "paper", "needs", "gradients", "evaluations", "decides"],
        [
            [one.name, one.paper, one.source, "yes" if one.gradients else "no", one.evaluations, one.output]
            for one in METHODS
        ],
    )
    return {"methods": [asdict(one) for one in METHODS]}
