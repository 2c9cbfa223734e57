"""Expert weights that a plan changes: merged, narrowed, truncated in rank, or zeroed one by one; a tensor at a time.

[out, in] is a weight matrix as checkpoints of per-expert layout hold it: gate and up [I, H], down [H, I].

- merged: Σ_e w_e·W_e in float64, rounded once. Biases and fused tensors merge alike.
- narrowed: rows of gate and up and columns of down, bit for bit.
- truncated: U_R S_R V_Rᵀ of the singular value decomposition, multiplied back to dense: it saves neither memory nor
  time in a dense kernel.
- zeroed: the lowest |W_ij|·√(Σ_t (g·x_j)²), by output row or two of every four (MoE-Pruner); saves nothing there
  either. g·x is the profile's channel sum; for down it is that of the intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from leap_serve.architectures import Role
from leap_serve.checkpoint import Checkpoint, check_narrow, width_of
from leap_serve.errors import PlanError, UnsupportedError
from leap_serve.plan import LayerPlan, Plan
from leap_serve.weights.matrices import DTYPES, Array, raw, values
from leap_serve.weights.overlays import part_of_expert
from leap_serve.weights.tensorfile import Made, Piece, TensorEntry

if TYPE_CHECKING:
    from leap_serve.profile import Profile


@dataclass(frozen=True, slots=True)
class Remaker:
    """What a plan makes of a model's expert tensors.

    Args:
        source: the model that is cut.
        plan: for it.
        profile: with the channel sums that ``plan.zeroed`` speaks of; None where it zeroes nothing.
    """

    source: Checkpoint
    plan: Plan
    profile: Profile | None = None

    @classmethod
    def of(cls, source: Checkpoint, plan: Plan) -> Remaker:
        """Check that the plan's changes can be made to this model; PlanError or UnsupportedError otherwise."""
        profile = None if plan.zeroed is None else _profile(source, plan)
        changed = {index for index, layer in plan.layers.items() if profile or _changes(layer)}
        narrow = [layer for layer in plan.layers.values() if layer.channels]
        if narrow:
            _check_width(source, max(kept[-1] for layer in narrow for kept in layer.channels))
        for name, entry in source.tensors.items():
            role = source.role(name)
            if role.layer not in changed or role.kind not in ("expert", "fused"):
                continue
            only_merged = plan.zeroed is None and plan.layers[role.layer].merge is not None
            plain = only_merged or part_of_expert(role) is not None
            if entry.dtype not in DTYPES or not plain:
                raise UnsupportedError(
                    entry.file, f"tensor {name} ({entry.dtype} {list(entry.shape)}) cannot be remade as the plan says",
                    "give an unquantised model with one gate, up and down matrix per expert",
                )  # fmt: skip
        if any(layer.maps_router for layer in plan.layers.values()):
            _check_mapped(source, plan)
        return cls(source, plan, profile)

    def piece(self, name: str, entry: TensorEntry, role: Role, slot: int = -1) -> Piece | Made | None:
        """Return what takes the place of an expert tensor, named for its slot; None where it stays as it is."""
        layer = self.plan.layers.get(role.layer)
        if layer is None or role.kind not in ("expert", "fused"):
            return None
        if role.kind == "fused":
            return None if layer.merge is None else self._fused(entry, layer)
        new = role.renamed(slot)
        if layer.merge is not None:
            parts = [(self._of(role, expert), weight) for expert, weight in layer.merge.experts[slot]]
            return Made(new, entry.dtype, entry.shape, lambda: _once(_sum(parts), entry.dtype))
        if layer.channels:
            kept = layer.channels[slot]
            if part_of_expert(role) == "down":
                shape = (entry.shape[0], len(kept))
                return Made(new, entry.dtype, shape, lambda: iter([raw(entry)[:, list(kept)].tobytes()]))
            return Piece(new, entry.dtype, (len(kept), entry.shape[1]), entry.file, tuple(entry.rows(kept)))
        if not layer.ranks and self.profile is None:
            return None
        rank = layer.ranks[slot] if layer.ranks else None
        return Made(new, entry.dtype, entry.shape, lambda: _once(self._matrix(entry, role, rank), entry.dtype))

    def _of(self, role: Role, expert: int) -> TensorEntry:
        return self.source.tensors[role.renamed(expert)]

    def _fused(self, entry: TensorEntry, layer: LayerPlan) -> Made:
        assert layer.merge is not None
        rows, shape = layer.merge.experts, (len(layer.merge.experts), *entry.shape[1:])

        def make() -> Iterator[bytes]:
            for row in rows:
                yield from _once(_sum([(entry, weight) for _, weight in row], [e for e, _ in row]), entry.dtype)

        return Made(entry.name, entry.dtype, shape, make)

    def _matrix(self, entry: TensorEntry, role: Role, rank: int | None) -> Array:
        """Return an expert's matrix truncated in rank, then zeroed."""
        matrix = values(entry)
        if rank is not None:
            matrix = truncated(matrix, rank)
        if self.profile is not None and self.plan.zeroed is not None:
            sums = self.profile.layers[role.layer]
            squares = sums.mid2 if part_of_expert(role) == "down" else sums.x2
            assert squares is not None, "Remaker.of lets no profile without channel sums through"
            matrix = zeroed(matrix, np.sqrt(squares[role.expert]), self.plan.zeroed.pattern, self.plan.zeroed.ratio)
        return matrix


def truncated(matrix: Array, rank: int) -> Array:
    """Return the best approximation of a matrix [out, in] that has at most this rank (Eckart–Young), float64."""
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def zeroed(matrix: Array, norms: Array, pattern: str, ratio: float) -> Array:
    """Return a matrix [out, in] whose lowest |W_ij|·norms_j are 0: a ratio of every row, or two of every four.

    Of equals the earlier go first. An expert that was never hit has norms 0 throughout: its magnitudes decide.
    """
    score = np.abs(matrix.astype(np.float64)) * (norms if norms.any() else 1.0)
    out, size = matrix.shape
    group, fewer = (4, 2) if pattern == "2:4" else (size, int(ratio * size + 0.5))
    if size % group:
        raise PlanError("2:4", f"needs inputs in fours, a matrix has {size}", "choose the pattern row")
    order = np.argsort(score.reshape(out, -1, group), axis=-1, kind="stable")
    kept = matrix.reshape(out, -1, group).copy()
    np.put_along_axis(kept, order[..., :fewer], 0.0, axis=-1)
    return kept.reshape(out, size)


def rounded(value: Array, dtype: str) -> Array:
    """Round to a safetensors dtype, to nearest and even; bfloat16 comes as the uint16 that it is stored as."""
    if dtype != "BF16":
        return value.astype(DTYPES[dtype])
    bits = np.ascontiguousarray(value, "<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _sum(parts: Sequence[tuple[TensorEntry, float]], rows: Sequence[int] | None = None) -> Array:
    """Σ w·tensor in float64, in the order given; of fused tensors each part's own row."""
    shape = parts[0][0].shape if rows is None else parts[0][0].shape[1:]
    total = np.zeros(shape)
    for place, (entry, weight) in enumerate(parts):
        total += weight * values(entry, None if rows is None else rows[place]).astype(np.float64)
    return total


def _once(value: Array, dtype: str) -> Iterator[bytes]:
    yield rounded(value, dtype).tobytes()


def _changes(layer: LayerPlan) -> bool:
    return bool(layer.channels or layer.ranks or layer.merge)


def _check_width(source: Checkpoint, highest: int) -> None:
    check_narrow(source)
    if source.mtp_layers:
        what = f"has MTP layers {source.mtp_layers}, whose experts' size hangs on {source.family.width_key}, too"
        raise UnsupportedError(source.folder, what, "choose another --method than intra")
    if highest >= width_of(source):
        what = f"keeps channel {highest} of an expert, the model's have {width_of(source)}"
        raise PlanError("plan", what, "search again on this model")


def _check_mapped(source: Checkpoint, plan: Plan) -> None:
    """Refuse router maps on probabilities where the router gives none."""
    applied = {layer.merge.applied for layer in plan.layers.values() if layer.merge and layer.merge.router}
    if "probabilities" in applied and source.family.router_kind not in ("softmax", "topk-softmax"):
        raise UnsupportedError(
            source.folder, f"its router ({source.family.router_kind}) has no softmax for a router map to follow",
            "choose another --method than eep",
        )  # fmt: skip


def _profile(source: Checkpoint, plan: Plan) -> Profile:
    """Open the profile that ``plan.zeroed`` names, and check that it is that one."""
    from leap_serve.files import sha256_of
    from leap_serve.profile import Profile

    assert plan.zeroed is not None
    folder = Path(plan.zeroed.profile)
    profile = Profile.load(folder)
    if sha256_of(folder / "profile.safetensors") != plan.zeroed.profile_sha256:
        raise PlanError(folder, "is not the profile that the plan was made from", "restore it, or search again")
    lacking = [index for index, layer in profile.layers.items() if layer.x2 is None or layer.mid2 is None]
    if lacking or set(profile.layers) != set(source.moe_layers):
        raise PlanError(folder, f"has no channel sums of layers {lacking[:8]}", "profile again with --channels")
    return profile
