"""``leap search prof/ --method M --budget B -o plan.json``: choose the experts to retain."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import say, table
from leap_serve.errors import UsageError
from leap_serve.profile import Profile

METHODS = ("frequency", "gate-mass", "ean", "ean-mean", "ean-weighted", "magnitude", "reap", "random")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("source", help="a profile folder; for magnitude and random also the model itself")
    parser.add_argument("--method", required=True, choices=METHODS)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--budget", type=float, help="fraction of the routed experts to keep, e.g. 0.125")
    size.add_argument("--experts", type=int, help="experts to keep per layer (with global: on average)")
    parser.add_argument("--allocation", default="uniform", choices=("uniform", "global"))
    parser.add_argument("--guard-super-experts", action="store_true", help="keep experts with outlying activations")
    parser.add_argument("--top-k", type=int, help="experts per token of the plan (default: the model's)")
    parser.add_argument("--temperature", type=float, default=1.0, help="router temperature of the plan (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="for random")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the plan to write, e.g. plan.json")
    parser.add_argument("--force", action="store_true", help="replace --out if it exists")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score, allocate, write the plan and show its counts."""
    from leap_training.saliency import Routing, allocate, scores, super_experts

    if args.out.is_dir():
        raise UsageError(args.out, "is a folder", "give the name of a file, e.g. plan.json")
    if args.out.exists() and not args.force:
        raise UsageError(args.out, "exists", "choose another --out, or pass --force to replace it")
    source = _source(args.source)
    protect = None
    if args.guard_super_experts:
        if not isinstance(source, Profile):
            raise UsageError("--guard-super-experts", "needs a profile, not a model", "give a profile folder")
        protect = super_experts(source)
    data = {"data_sha256": source.data_sha256} if isinstance(source, Profile) else {}
    plan = allocate(
        scores(source, args.method, args.seed), Routing.of(source), experts=args.experts, budget=args.budget,
        allocation=args.allocation, top_k=args.top_k, temperature=args.temperature, protect=protect,
        method=args.method, seed=args.seed, **data,
        super_experts={str(layer): sorted(ids) for layer, ids in (protect or {}).items()},
    )  # fmt: skip
    plan.save(args.out)
    table(
        f"{args.method}, {args.allocation}: {sum(plan.counts)} of {plan.num_experts * len(plan.layers)} experts"
        f" → {args.out}",
        ["layer", "experts kept", "top_k"],
        [[index, len(layer.retained), layer.top_k] for index, layer in plan.layers.items()],
    )
    notices = list(plan.made_by["notices"])
    for notice in notices:
        say(f"note: {notice}")
    return {
        "out": str(args.out), "method": args.method, "allocation": args.allocation, "retained": plan.counts,
        "top_k": [layer.top_k for layer in plan.layers.values()], "num_experts": plan.num_experts,
        "fingerprint": plan.fingerprint, "notices": notices,
    }  # fmt: skip


def _source(given: str) -> Profile | Checkpoint:
    """Open a profile folder or a model."""
    if (Path(given) / "profile.json").exists() or (Path(given) / "profile.safetensors").exists():
        return Profile.load(Path(given))
    return Checkpoint.open(resolve_model(given))
