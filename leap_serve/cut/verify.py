"""Proof that a cut holds exactly the bytes of the model it came from, tensor by tensor, by SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_serve.checkpoint import Checkpoint, check_cut, check_experts, is_shared_scale, router_tail
from leap_serve.errors import CheckpointError
from leap_serve.weights.tensorfile import CHUNK_BYTES, Made, Piece, TensorEntry

if TYPE_CHECKING:
    from leap_serve.cut.remake import Remaker


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was proven.

    Args:
        folder, base: the cut and, if it was given, the model it came from.
        fingerprint: found equal in all parts.
        untouched, renumbered, sliced: tensors compared with the base: copied whole; of a retained
            expert, under its new id; rows of fused experts and routers.
        remade: tensors that the plan changes (merged, narrowed, truncated, zeroed), computed anew and compared.
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
    remade: int = 0
    bytes_compared: int = 0
    sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)


def verify(folder: Path, base: Path | None = None, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check a cut against its manifest and, with ``base``, every byte against the model it came from.

    The way back from the cut's tensors to the base's is worked out here, from leap.json and the names,
    not by the code that cut; only what a plan changes in the weights is computed by the same arithmetic. Raises CheckpointError naming the first part that is not what it should be.
    """
    from leap_serve.cut.remake import Remaker

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
    if checkpoint.trained:
        what = f"was trained ({checkpoint.trained['report']}): its experts and routers are no longer the base's"
        raise CheckpointError(folder, what, "verify the cut that was trained, or this one without --base")
    source = Checkpoint.open(base)
    check_experts(source)
    if source.identity().sha256 != plan.base.sha256:
        raise CheckpointError(base, f"is not the model that {folder} was cut from ({plan.base.id})", "give that model")
    counts = {"untouched": 0, "renumbered": 0, "sliced": 0, "remade": 0}
    heads, remaker = source.head_tails(), Remaker.of(source, plan)
    digest, seen, done = hashlib.sha256(), set(), 0
    for name, entry in sorted(checkpoint.tensors.items()):
        kind, original, ranges = _origin(checkpoint, source, heads, name)
        mine, remade = _sha256(entry, [(entry.begin, entry.end)]), _remade(checkpoint, remaker, original, name)
        if isinstance(remade, Made):
            same = _is_made(remade, entry, exact=not plan.layers[source.role(name).layer].ranks)
        else:
            same = mine == _sha256(original, ranges if remade is None else remade.ranges)
        kind = kind if remade is None else "remade"
        if entry.dtype != original.dtype or not same:
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
    planned = checkpoint.plan.layers.get(role.layer) if checkpoint.plan else None
    mapped = planned is not None and planned.maps_router
    head = role.kind == "router" and not mapped and router_tail(source.family, name) in heads[role.layer]
    if head or (role.kind == "fused" and not is_shared_scale(entry)):
        return "sliced", entry, entry.rows(_retained(checkpoint, role.layer))
    return "renumbered" if role.kind == "expert" else "untouched", entry, [(entry.begin, entry.end)]


def _remade(checkpoint: Checkpoint, remaker: Remaker, original: TensorEntry, name: str) -> Piece | Made | None:
    """Return what the plan makes of a tensor; None where it leaves the content alone."""
    if remaker.source.role(name).kind == "fused" and is_shared_scale(original):
        return None
    return remaker.piece(original.name, original, remaker.source.role(original.name), checkpoint.role(name).expert)


def _is_made(made: Made, entry: TensorEntry, exact: bool) -> bool:
    """Whether a tensor is what is computed anew.

    Sums and selections are the same everywhere; a singular value decomposition may differ in its last bits from one
    linear-algebra library to the next, so it is held to one rounding step of the tensor's largest value.
    """
    import numpy as np

    from leap_serve.weights.matrices import DTYPES, values

    if made.shape != entry.shape:
        return False
    content = b"".join(made.make())
    if exact:
        return hashlib.sha256(content).digest() == _sha256(entry, [(entry.begin, entry.end)])
    raw = np.frombuffer(content, DTYPES[entry.dtype]).reshape(entry.shape)
    again = (raw.astype("<u4") << 16).view("<f4") if entry.dtype == "BF16" else raw.astype("<f4")
    step = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-20}[entry.dtype]
    return bool(np.abs(values(entry) - again).max() <= step * np.abs(again).max())


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
