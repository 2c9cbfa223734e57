"""``leap inspect PATH``: what a checkpoint or a plan retains, what it weighs and where it came from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from leap_serve.adapter import describe_overlays
from leap_serve.checkpoint import OPTIMIZER, Checkpoint, check_cut, check_experts, resolve_model
from leap_serve.cli.console import say, table
from leap_serve.errors import LeapError
from leap_serve.flops import flops_per_token, parameters
from leap_serve.plan import LayerPlan, Plan

EXTRAS = {
    "channels": "channels", "skip": "β", "mean_rank": "mean rank", "merged": "merged of up to", "router_map": "map on",
}  # fmt: skip
"""What a plan may say of a layer beyond experts, top_k and τ → its column."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("path", help="a checkpoint folder, leap-tiny, a model id, or a plan.json")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Describe the thing and show it."""
    path = Path(args.path)
    if path.is_file() and path.suffix == ".json":
        result = describe_plan(Plan.load(path))
    else:
        result = describe_checkpoint(Checkpoint.open(resolve_model(args.path)))
    _show(args.path, result)
    return result


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return what a plan says, layer by layer."""
    return {
        "kind": "plan",
        "base": {"id": plan.base.id, "revision": plan.base.revision, "sha256": plan.base.sha256},
        "num_experts": plan.num_experts,
        "uniform": plan.is_uniform,
        "fingerprint": plan.fingerprint,
        "retained_share": sum(plan.counts) / (len(plan.counts) * plan.num_experts),
        "layers": [
            {"layer": index, "retained": len(layer.retained), "top_k": layer.top_k, "temperature": layer.temperature}
            | _extras(layer)
            for index, layer in plan.layers.items()
        ],
        "zeroed": plan.zeroed.to_json() if plan.zeroed else None,
        "made_by": dict(plan.made_by),
    }


def _extras(layer: LayerPlan) -> dict[str, Any]:
    """What a layer's plan says beyond experts, top_k and τ."""
    found: dict[str, Any] = {}
    if layer.width is not None:
        found["channels"] = layer.width
    if layer.skip is not None:
        found["skip"] = layer.skip
    if layer.ranks:
        found["mean_rank"] = sum(layer.ranks) / len(layer.ranks)
    if layer.merge is not None:
        found["merged"] = max(len(row) for row in layer.merge.experts)
        found["router_map"] = layer.merge.applied if layer.merge.router else None
    return found


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint holds; ``problem`` is the first thing that contradicts its manifest, or None."""
    counted = parameters(checkpoint)
    full = [
        {"layer": index, "retained": checkpoint.num_experts, "top_k": checkpoint.top_k, "temperature": 1.0}
        for index in checkpoint.moe_layers
    ]
    plan = describe_plan(checkpoint.plan) if checkpoint.plan else {"fingerprint": None, "layers": full, "made_by": {}}
    problem = _problem(checkpoint)
    beside = [path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.overlays]
    return {
        **plan,
        "kind": "cut" if checkpoint.plan else "model",
        "family": checkpoint.family.model_type,
        "architecture": (checkpoint.config.get("architectures") or [None])[0],
        "identity": checkpoint.identity().sha256,
        "num_experts": checkpoint.plan.num_experts if checkpoint.plan else checkpoint.num_experts,
        "mtp_layers": {str(layer): checkpoint.experts_in(layer) for layer in checkpoint.mtp_layers},
        "overlays": beside,
        "tuned": {} if problem else describe_overlays(checkpoint),
        "trained": dict(checkpoint.trained),
        "optimizer": (checkpoint.folder / OPTIMIZER).exists(),
        "shards": len(checkpoint.metadata),
        "parameters": {"total": counted.total, "active": counted.active},
        "weights_bytes": checkpoint.weight_bytes,
        "weights_gib": checkpoint.weight_bytes / 2**30,
        "flops_per_token": flops_per_token(checkpoint),
        "problem": problem,
    }


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _problem(checkpoint: Checkpoint) -> str | None:
    try:
        (check_cut if checkpoint.plan else check_experts)(checkpoint)
    except LeapError as error:
        return str(error)
    return None


def _show(name: str, result: dict[str, Any]) -> None:
    rows: list[list[object]] = [["kind", result["kind"]]]
    if result["kind"] != "plan":
        rows += [
            ["architecture", result["architecture"]],
            ["parameters, total", f"{result['parameters']['total'] / 1e6:,.2f} M"],
            ["parameters, active per token", f"{result['parameters']['active'] / 1e6:,.2f} M"],
            ["FLOPs per token, theoretical", f"{result['flops_per_token'] / 1e6:,.2f} M"],
            ["weights, GiB", f"{result['weights_gib']:.4f} in {result['shards']} file(s)"],
            ["beside the weights", ", ".join(result["overlays"]) or "nothing"],
        ]
        if result["trained"]:
            by = " ".join(map(str, result["trained"]["made_by"].get("argv", []))) or "unknown"
            rows.append(["trained as a whole by", f"{by} ({result['trained']['report']})"])
        head, adapter = result["tuned"].get("router_head"), result["tuned"].get("adapter")
        if head:
            rows.append(["router head", f"layers {', '.join(map(str, head['layers']))}"])
        if adapter:
            rows.append(
                ["adapter", f"rank {adapter['rank']}, alpha {adapter['alpha']:g}, {len(adapter['layers'])} layers"]
            )
    if result["fingerprint"]:
        rows += [
            ["fingerprint", result["fingerprint"][:12]],
            ["base model", f"{result['base']['id']} ({result['base']['sha256'][:12]})"],
            ["made by", " ".join(map(str, result["made_by"].get("argv", []))) or "unknown"],
        ]
    table(name, ["", "value"], rows)
    more = [key for key in EXTRAS if any(key in one for one in result["layers"])]
    layers = [
        [one["layer"], f"{one['retained']} of {result['num_experts']}", one["top_k"], f"{one['temperature']:g}"]
        + [_cell(one.get(key)) for key in more]
        for one in result["layers"]
    ]
    table("MoE layers", ["layer", "experts", "top_k", "τ", *(EXTRAS[key] for key in more)], layers)
    if zeroed := result.get("zeroed"):
        say(f"weights zeroed: {100 * zeroed['ratio']:g} % by {zeroed['pattern']}; a dense kernel saves nothing by it")
    if result.get("problem"):
        say(f"PROBLEM: {result['problem']}")
