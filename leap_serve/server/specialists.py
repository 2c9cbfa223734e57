"""Specialists: plans, and router heads if they were tuned, that share one full model in one engine.

What can be known before an engine runs: where a specialist comes from, that it fits the model, and the state file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import FINGERPRINT_KEY, MANIFEST, Checkpoint
from leap_serve.engines.subsets import check_plans
from leap_serve.errors import CheckpointError, LeapError, PlanError, UnsupportedError, UsageError
from leap_serve.files import read_json, write_json
from leap_serve.plan import BaseModel, Plan
from leap_serve.provenance import made_by
from leap_serve.weights.overlays import ADAPTER_FOLDER, MERGEABLE, ROUTER_HEAD
from leap_serve.weights.tensorfile import TensorEntry, read_header

MAX_SPECIALISTS = 64
"""Slots of an engine."""
MAX_PLAN_BYTES = 4 * 2**20
"""A plan of 94 layers with 128 experts each, scores included, takes a tenth of it."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_TAKEN = frozenset({
    "text", "thinking", "input", "output", "image", "audio", "video", "prompt", "refusal", "tool", "file",
})  # fmt: skip
"""vLLM gives a chat message whose parts are of kind «text» to an adapter of that name, whatever model was asked for."""
STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Head:
    """A router_head.safetensors: where it lies, the SHA-256 of its bytes, and these."""

    path: Path
    sha256: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Specialist:
    """A specialist that fits the model it was read for.

    Args:
        name: what clients give as ``model``.
        plan: its experts, top_k and τ.
        head: its tuned router, or None.
        source: the file it was read from, or None where the plan came with a request.
    """

    name: str
    plan: Plan
    head: Head | None = None
    source: Path | None = None


@dataclass(frozen=True, slots=True)
class Base:
    """The model that specialists share, and its identity, which takes long to read."""

    checkpoint: Checkpoint
    identity: BaseModel

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Base:
        """Raise UnsupportedError where the model is not one that specialists can share."""
        if checkpoint.overlays:
            raise UnsupportedError(
                checkpoint.overlays[0], "tunes the model that specialists would share",
                "merge it with leap export, or serve the full model",
            )  # fmt: skip
        return cls(checkpoint, checkpoint.identity())


def parse_flag(flag: str) -> tuple[str, Path]:
    """Split ``NAME=PATH``; raises UsageError."""
    name, equals, path = flag.partition("=")
    if not equals or not path:
        raise UsageError("--specialist", f"is {flag!r}", "write NAME=PATH, as in math=math/plan.json")
    check_name(name)
    return name, Path(path)


def check_name(name: str) -> None:
    """Raise UsageError unless clients can give this as their model."""
    if not re.fullmatch(NAME, name):
        raise UsageError(
            "specialist", f"cannot be called {name[:80]!r}",
            "use letters, digits, dots, dashes and underscores, at most 64, the first a letter or digit",
        )  # fmt: skip
    if name in _TAKEN:
        raise UsageError("specialist", f"cannot be called {name!r}, a kind of chat content", "choose another name")


def read_specialist(name: str, path: Path, base: Base) -> Specialist:
    """Read a plan.json, a leap.json with what tuning laid beside it, or a folder that holds one of them.

    Raises LeapError: nothing is there, plan and model do not fit, experts were tuned, too, or merged.
    """
    check_name(name)
    file = _plan_file(path)
    if file.stat().st_size > MAX_PLAN_BYTES:
        raise PlanError(file, f"is larger than {MAX_PLAN_BYTES >> 20} MiB", "give a plan.json or leap.json")
    stated = read_json(file)
    plan = plan_from(stated, file, base)
    head = None
    if file.name == MANIFEST:
        _check_untouched_experts(file)
        if (file.parent / ROUTER_HEAD).exists():
            head = read_head(file.parent / ROUTER_HEAD, plan, base)
    return Specialist(name, plan, head, file.absolute())


def plan_from(stated: Any, where: object, base: Base) -> Plan:
    """Parse the JSON of a plan and check that it fits the model; scores, which only explain it, are left out."""
    if isinstance(stated, dict):
        _check_not_exported(stated, where)
        origin = stated.get("made_by")
        stated = {**stated, "scores": {}, "made_by": origin if isinstance(origin, dict) else {}}
    try:
        plan = Plan.from_json(stated, where)
    except (OverflowError, RecursionError) as error:
        raise PlanError(where, f"is ill-formed ({error!r})", "make it again") from None
    try:
        check_plans(base.checkpoint, base.identity, [plan])
    except LeapError as error:
        at = where if error.where == "plan 0" else error.where
        raise type(error)(at, error.what, error.remedy) from None
    _check_can_be_kept(plan, where)
    return plan


def read_head(path: Path, plan: Plan, base: Base) -> Head:
    """Read a router head and check from its header that it belongs to the plan and fits the model's routers."""
    entries, metadata = read_header(path)
    if metadata.get(FINGERPRINT_KEY) != plan.fingerprint:
        raise CheckpointError(
            path, f"has fingerprint {str(metadata.get(FINGERPRINT_KEY))[:12]}…, the plan {plan.fingerprint[:12]}…",
            "it belongs to another cut: put the right file back, or tune again",
        )  # fmt: skip
    routers = _routers(base.checkpoint)
    for name, entry in entries.items():
        own = routers.get(name)
        layer = int(name.split(".")[1]) if own else -1
        if own is None or layer not in plan.layers:
            raise CheckpointError(path, f"tensor {name} replaces nothing in the model's routers", "tune again")
        shape = (len(plan.layers[layer].retained), *own.shape[1:])
        if entry.shape != shape:
            what = f"tensor {name} has shape {list(entry.shape)}, the plan and the model ask for {list(shape)}"
            raise CheckpointError(path, what, "tune again")
        for found in (entry, own):
            if found.dtype not in MERGEABLE:
                what = f"tensor {found.name} is {found.dtype}, which is no dtype of a router head"
                raise UnsupportedError(found.file, what, f"use {', '.join(MERGEABLE)}")
    lonely = [name for name in entries if name.endswith(".bias") and f"{name[:-4]}weight" not in entries]
    if lonely:
        raise CheckpointError(path, f"tensor {lonely[0]} comes without its weight", "tune again")
    content = path.read_bytes()
    return Head(path.absolute(), hashlib.sha256(content).hexdigest(), content)


def write_state(path: Path, base: Base, specialists: Sequence[Specialist]) -> None:
    """Write what was loaded at run time, atomically. Raises LeapError where the file cannot be written."""
    rows = [
        {
            "name": one.name, "source": str(one.source) if one.source else None, "plan": one.plan.to_json(),
            "router_head": {"path": str(one.head.path), "sha256": one.head.sha256} if one.head else None,
        }
        for one in specialists
    ]  # fmt: skip
    model = {"id": base.identity.id, "sha256": base.identity.sha256}
    try:
        write_json(path, {"format_version": STATE_VERSION, "model": model, "specialists": rows, "made_by": made_by()})
    except OSError as error:
        raise LeapError(path, f"cannot be written ({error.strerror})", "check the disk and the folder") from None
    except (ValueError, RecursionError) as error:
        what = f"cannot hold what it should ({type(error).__name__})"
        raise LeapError(path, what, "load it from a path that is plain text") from None


def read_state(path: Path, base: Base) -> list[Specialist]:
    """Read the specialists of a state file; none where there is no file yet. Raises LeapError on any damage."""
    if not path.exists():
        return []
    stated = read_json(path)
    if not isinstance(stated, dict) or stated.get("format_version") != STATE_VERSION:
        raise CheckpointError(path, "is no state file that this leap-serve reads", "give another --state, or remove it")
    try:
        return [_restored(path, row, base) for row in stated["specialists"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(path, f"is ill-formed ({error!r})", "restore the file, or remove it") from None


def _restored(path: Path, row: Mapping[str, Any], base: Base) -> Specialist:
    name = str(row["name"])
    check_name(name)
    plan = plan_from(row["plan"], f"{path}: {name}", base)
    head = None
    if row["router_head"] is not None:
        head = read_head(Path(row["router_head"]["path"]), plan, base)
        if head.sha256 != row["router_head"]["sha256"]:
            raise CheckpointError(
                head.path, f"is no longer the router head that {path} names for {name}",
                f"put it back, or take {name} out of {path}",
            )  # fmt: skip
    return Specialist(name, plan, head, Path(row["source"]) if row["source"] else None)


def _plan_file(path: Path) -> Path:
    try:
        found = [path] if path.is_file() else [path / name for name in (MANIFEST, "plan.json")]
        file = next((one for one in found if one.is_file()), None)
    except (OSError, ValueError) as error:
        raise PlanError(path, f"is no path ({error})", "give a plan.json or leap.json") from None
    if file is None:
        raise PlanError(path, "is no plan, and no folder that holds one", "give a plan.json or leap.json")
    return file


def _check_untouched_experts(manifest: Path) -> None:
    """Raise UnsupportedError where the cut's experts are no longer the base's."""
    if (manifest.parent / ADAPTER_FOLDER).exists():
        what = "adapts the experts, which specialists share with the base"
        raise UnsupportedError(
            manifest.parent / ADAPTER_FOLDER, what, f"serve it on its own: leap serve {manifest.parent}"
        )


def _check_not_exported(stated: Mapping[str, Any], where: object) -> None:
    """Raise UnsupportedError where this is leap.json of an exported or trained checkpoint, under whatever name it came."""
    checkpoint = stated.get("checkpoint")
    how = [word for word in ("exported", "trained") if isinstance(checkpoint, dict) and checkpoint.get(word)]
    if how:
        what = f"was {how[0]}: what tuning learned is in its weights, which are not the base's"
        raise UnsupportedError(where, what, "serve that checkpoint on its own, with leap serve")


def _check_can_be_kept(plan: Plan, where: object) -> None:
    """Raise PlanError where a state file could not hold the plan: JSON can name characters that UTF-8 has not."""
    try:
        json.dumps([[[plan.to_json()]]], indent=1, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise PlanError(where, f"holds what no file can ({type(error).__name__})", "make it again") from None


def _routers(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """Return {"layers.{l}.weight" or ".bias": the model's own router tensor}; routers of several layers have no such name."""
    tails = checkpoint.head_tails()
    return {
        f"layers.{role.layer}.{tail}": entry
        for name, entry in checkpoint.tensors.items()
        if (role := checkpoint.role(name)).kind == "router"
        and (tail := name.rpartition(f".{checkpoint.family.router}.")[2]) in ("weight", "bias")
        and tail in tails[role.layer]
    }
