"""Proof that a cut holds exactly the bytes of the model it came from, tensor by tensor, by SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import Checkpoint, check_cut, check_experts, is_shared_scale, router_tail
from leap_serve.errors import CheckpointError
from leap_serve.tensorfile import CHUNK_BYTES, TensorEntry


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was proven.

    Args:
        folder, base: the cut and, if it was given, the model it came from.
        fingerprint: found equal in all parts.
        untouched, renumbered, sliced: tensors compared with the base: copied whole; of a retained
            expert, under its new id; rows of fused experts and routers.
        bytes_compared: their bytes.
        overlays: what tuning laid beside the weights; checked against the plan, and no part of the base.
        sha256: digest over the digests of all tensors of the cut, in the order of names.
    """

    folder: str
    base: str | None
    fingerprint: str
    tensors: int
    overlays: tuple[str, ...] = ()
    untouched: int = 0
    renumbered: int = 0
    sliced: int = 0
    bytes_compared: int = 0
    sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)


def verify(folder: Path, base: Path | None = None, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check a cut against its manifest and, with ``base``, every byte against the model it came from.

    The way back from the cut's tensors to the base's is worked out here, from leap.json and the names,
    not by the code that cut. Raises CheckpointError naming the first part that is not what it should be.
    """
    checkpoint = Checkpoint.open(folder)
    check_cut(checkpoint)
    plan = checkpoint.plan
    assert plan is not None  # check_cut saw it
    overlays = tuple(path.relative_to(folder).as_posix() for path in checkpoint.overlays)
    if base is None:
        return VerifyReport(str(folder), None, plan.fingerprint, len(checkpoint.tensors), overlays)
    if checkpoint.exported:
        what = "was exported: what tuning learned is merged into its weights, which are no longer the base's"
        raise CheckpointError(folder, what, "verify the checkpoint that it was exported from")
    source = Checkpoint.open(base)
    check_experts(source)
    if source.identity().sha256 != plan.base.sha256:
        raise CheckpointError(base, f"is not the model that {folder} was cut from ({plan.base.id})", "give that model")
    counts = {"untouched": 0, "renumbered": 0, "sliced": 0}
    heads = source.head_tails()
    digest, seen, done = hashlib.sha256(), set(), 0
    for name, entry in sorted(checkpoint.tensors.items()):
        kind, original, ranges = _origin(checkpoint, source, heads, name)
        mine, theirs = _sha256(entry, [(entry.begin, entry.end)]), _sha256(original, ranges)
        if entry.dtype != original.dtype or mine != theirs:
            raise CheckpointError(
                entry.file, f"tensor {name} differs from {original.name} of {source.folder.name}", "cut again"
            )
        counts[kind] += 1
        seen.add(original.name)
        digest.update(mine)
        done += entry.nbytes
        if progress:
            progress(done, checkpoint.weight_bytes)
    lost = [name for name in source.tensors if name not in seen and not _dropped(checkpoint, source, name)]
    if lost:
        raise CheckpointError(folder, f"lacks tensor {lost[0]} of {base} and {len(lost) - 1} more", "cut again")
    return VerifyReport(
        str(folder), str(base), plan.fingerprint, len(checkpoint.tensors), overlays, bytes_compared=done,
        sha256=digest.hexdigest(), **counts,
    )  # fmt: skip


def _retained(checkpoint: Checkpoint, layer: int) -> tuple[int, ...]:
    plan = checkpoint.plan
    if plan is not None and layer in plan.layers:
        return plan.layers[layer].retained
    return checkpoint.mtp_retained[layer]


def _origin(
    checkpoint: Checkpoint, source: Checkpoint, heads: Mapping[int, frozenset[str]], name: str
) -> tuple[str, TensorEntry, Iterable[tuple[int, int]]]:
    """Return how a tensor of the cut was made, the base's tensor, and the byte ranges of it that must be equal."""
    role = source.role(name)
    origin = role.renamed(_retained(checkpoint, role.layer)[role.expert]) if role.kind == "expert" else name
    entry = source.tensors.get(origin)
    if entry is None:
        raise CheckpointError(checkpoint.folder, f"tensor {name} has no origin {origin} in the base", "cut again")
    head = role.kind == "router" and router_tail(source.family, name) in heads[role.layer]
    if head or (role.kind == "fused" and not is_shared_scale(entry)):
        return "sliced", entry, entry.rows(_retained(checkpoint, role.layer))
    return "renumbered" if role.kind == "expert" else "untouched", entry, [(entry.begin, entry.end)]


def _dropped(checkpoint: Checkpoint, source: Checkpoint, name: str) -> bool:
    role = source.role(name)
    return role.kind == "expert" and role.expert not in _retained(checkpoint, role.layer)


def _sha256(entry: TensorEntry, ranges: Iterable[tuple[int, int]]) -> bytes:
    """Hash byte ranges of a tensor's file, 16 MiB at a time."""
    digest = hashlib.sha256()
    with entry.file.open("rb") as stream:
        for begin, end in ranges:
            stream.seek(begin)
            while begin < end:
                chunk = stream.read(min(CHUNK_BYTES, end - begin))
                if not chunk:
                    raise CheckpointError(entry.file, f"ended inside tensor {entry.name}", "leave it alone meanwhile")
                digest.update(chunk)
                begin += len(chunk)
    return digest.digest()
