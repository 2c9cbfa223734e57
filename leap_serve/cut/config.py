"""What a cut changes in a checkpoint's JSON files."""

from __future__ import annotations

import copy
import re
from typing import Any

from leap_serve.checkpoint import COUNT_KEYS, FINGERPRINT_KEY, Checkpoint
from leap_serve.cut.rules import Retained, architecture_of, new_ids
from leap_serve.errors import UnsupportedError
from leap_serve.plan import Plan

CAPACITY_KEYS = ("expert_capacity", "moe_expert_capacity")
_NUMBERED = re.compile(r"experts(\.|\\\.|\[)+[\d(\[]")


def cut_config(source: Checkpoint, plan: Plan, retained: Retained) -> dict[str, Any]:
    """Return config.json of the cut.

    router_aux_loss_coef and capacity factors stay: they are taken over the expert count, which is |I|
    from now on. An absolute capacity (tokens per expert) grows by E / |I|, as each expert's load does.
    """
    config = copy.deepcopy(dict(source.config))
    widths = [layer.width for layer in plan.layers.values() if layer.width is not None]
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        for key in COUNT_KEYS:
            if part.get(key) is not None:
                part[key] = max(plan.counts)
        if part.get(source.family.top_k_key) is not None:
            part[source.family.top_k_key] = max(layer.top_k for layer in plan.layers.values())
        if widths and part.get(source.family.width_key) is not None:
            part[source.family.width_key] = max(widths)
        for key in CAPACITY_KEYS:
            if type(part.get(key)) is int:
                part[key] = -(-part[key] * source.num_experts // min(plan.counts))
        if "quantization_config" in part:
            part["quantization_config"] = renumbered(part["quantization_config"], source, retained)
    config["architectures"] = [architecture_of(source, plan)]
    config[FINGERPRINT_KEY] = plan.fingerprint
    return config


def renumbered(value: Any, source: Checkpoint, retained: Retained) -> Any:
    """Renumber expert ids in the module names of a quantisation config, and drop the names of dropped experts.

    Names stand in lists (ignore, modules_to_not_convert, targets) or as keys (settings per module).
    """
    ids = new_ids(retained)

    def walk(item: Any) -> Any:
        if isinstance(item, dict):
            return {new: walk(inner) for name, inner in item.items() if (new := rename(name)) is not None}
        if isinstance(item, list):
            renamed = [rename(inner) if isinstance(inner, str) else walk(inner) for inner in item]
            return [new for old, new in zip(item, renamed, strict=True) if new is not None or old is None]
        return item

    def rename(name: str) -> str | None:
        if name.startswith(("re:", "+:", "-:")) and _NUMBERED.search(name):
            raise UnsupportedError(
                source.folder, f"its quantisation config names experts by number in the pattern {name!r}",
                "write the modules' full names instead",
            )  # fmt: skip
        role = source.role(name)
        if role.kind != "expert" or role.layer not in ids:
            return name
        new = ids[role.layer].get(role.expert)
        return None if new is None else role.renamed(new)

    return walk(value)
