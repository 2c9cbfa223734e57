"""Searches from a profile's channel sums and the model's weights: MoE-Pruner and intra-expert pruning (methods.md §1, §2)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import progress_bar
from leap_serve.cli.layerwise import base_of, other_base
from leap_serve.cut.rules import beyond_stock, check_served
from leap_serve.errors import UsageError
from leap_serve.flops import flops_per_token, parameters
from leap_serve.plan import LayerPlan, Plan
from leap_serve.profile import Profile

Sizes = Mapping[str, Mapping[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flag that only these methods have."""
    group = parser.add_argument_group("by channels", "moe-pruner, intra: a profile made with --channels, and the model")
    group.add_argument(
        "--zero", choices=("row", "2:4"),
        help="moe-pruner: keep all experts and zero single weights instead, all but --budget of every row",
    )  # fmt: skip


def channelwise(
    args: argparse.Namespace, source: Profile | Checkpoint, sizes: Sizes
) -> dict[str, tuple[Plan, dict[str, Any]]]:
    """Choose for every size; by label the plan and its figures."""
    profile = _check(args, source)
    checkpoint = Checkpoint.open(resolve_model(str(args.model or profile.made_by.get("model") or profile.base.id)))
    if checkpoint.identity().sha256 != profile.base.sha256:
        raise UsageError(args.source, f"is not a profile of {checkpoint.folder}", "give --model, or the right profile")
    make = _intra if args.method == "intra" else _zeroed if args.zero else _experts
    found = {}
    for label, plan in make(args, profile, checkpoint, sizes).items():
        counted, full = parameters(checkpoint, plan), parameters(checkpoint)
        found[label] = plan, _share(plan) | {
            "parameters": counted.total, "full_parameters": full.total,
            "flops_per_token": flops_per_token(checkpoint, plan), "full_flops_per_token": flops_per_token(checkpoint),
        }  # fmt: skip
    return found


def _experts(args: argparse.Namespace, profile: Profile, checkpoint: Checkpoint, sizes: Sizes) -> dict[str, Plan]:
    from leap_training.methods.moe_pruner import moe_pruner
    from leap_training.saliency import Routing, allocate

    with progress_bar("moe-pruner, matrices") as bar:
        scores = moe_pruner(profile, checkpoint, bar)
    return {
        label: allocate(
            scores, Routing.of(profile), **size, allocation=args.allocation, top_k=args.top_k,
            temperature=args.temperature[0], method=args.method, data_sha256=profile.data_sha256,
        )
        for label, size in sizes.items()
    }  # fmt: skip


def _zeroed(args: argparse.Namespace, profile: Profile, checkpoint: Checkpoint, sizes: Sizes) -> dict[str, Plan]:
    from leap_training.methods.moe_pruner import unstructured

    folder = Path(args.source)
    return {
        label: unstructured(profile, folder, checkpoint, args.zero, 1.0 - _fraction(size))
        for label, size in sizes.items()
    }


def _intra(args: argparse.Namespace, profile: Profile, checkpoint: Checkpoint, sizes: Sizes) -> dict[str, Plan]:
    from leap_training.methods.intra import intra

    base = _base(args, profile, checkpoint)
    check_served(checkpoint, beyond_stock(base), other_base(args.on))
    on = {"on": str(args.on)} if args.on else {}
    found = {}
    for label, size in sizes.items():
        with progress_bar(f"intra {label}, matrices") as bar:
            found[label] = intra(profile, checkpoint, base, _fraction(size), bar, **on)
    return found


def _base(args: argparse.Namespace, profile: Profile, checkpoint: Checkpoint) -> Plan:
    """The plan whose experts are narrowed; without --on, all of them."""
    if args.on is not None:
        return base_of(args.on, checkpoint, profile.base)
    every = tuple(range(profile.num_experts))
    layers = {index: LayerPlan(every, k, args.temperature[0]) for index, k in profile.top_k.items()}
    return Plan(profile.base, profile.num_experts, layers)


def _share(plan: Plan) -> dict[str, float]:
    """What --budget is the share of, where it is not experts: channels, or weights that are not zero."""
    if plan.zeroed is not None:
        return {"share": 1.0 - plan.zeroed.ratio}
    made = plan.made_by
    return {"share": made["width"] / made["full_width"]} if "full_width" in made else {}


def _fraction(size: Mapping[str, Any]) -> float:
    if "budget" not in size:
        raise UsageError("--experts", "is not what this method chooses", "give --budget, the fraction to keep")
    return float(size["budget"])


def _check(args: argparse.Namespace, source: Profile | Checkpoint) -> Profile:
    """Refuse flags that mean nothing to the method."""
    where = f"--method {args.method}"
    if not isinstance(source, Profile):
        raise UsageError(where, "needs a profile, not a model", "make one with leap profile --channels")
    if any(layer.x2 is None or layer.mid2 is None for layer in source.layers.values()):
        raise UsageError(args.source, "has no channel sums", "profile again with --channels")
    if len(args.temperature) > 1:
        raise UsageError("--temperature", f"{where} does not search it", "give one value")
    if args.temperature != (1.0,) and (args.zero or args.on):
        raise UsageError("--temperature", "--zero keeps it, and --on brings its own τ", "leave it out")
    if args.zero and (args.top_k is not None or args.allocation != "uniform"):
        raise UsageError("--top-k, --allocation", "--zero keeps them as they are", "leave them out")
    return source
