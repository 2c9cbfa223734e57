"""MoE-Pruner: weights by magnitude, activation norm and router weight; here also as a score of whole experts.

Paper: Xie et al. 2024, «MoE-Pruner: Pruning Mixture-of-Experts Large Language Model using the Hints from Its Router».
S_ij = |W_ij|·‖g·x_j‖ with the router weight g inside the norm, over the tokens that chose the expert; native form: the
lowest of every output row, or 2:4, become zero. Ours: as an expert's score the sum of S over its three matrices, the
norm being √(mean over items of Σ_t (g_t·x_tj)²); for the down projection x is the intermediate.

The native form removes single weights: in a dense kernel neither memory nor time is saved, and the plan says so.
Its knowledge distillation is ``leap tune --baseline kd-experts`` (leap_training.distill).

Cost: a profile with channel sums (the intermediate of every routed token is computed twice), one reading of the
expert weights, a matrix at a time. Memory: the profile, whose channel sums are E·(H + I)·8 bytes per layer, and I·H·8
bytes for the matrix. No gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from leap_serve.checkpoint import Checkpoint
from leap_serve.engine import Progress
from leap_serve.errors import UnsupportedError, UsageError
from leap_serve.files import sha256_of
from leap_serve.plan import LayerPlan, Plan, Zeroed
from leap_serve.profile import LayerProfile, Profile
from leap_serve.provenance import made_by
from leap_serve.weights.matrices import ExpertMatrix, expert_matrices
from leap_training.saliency import Array


def norms_of(layer: LayerProfile, expert: int, items: int, down: bool) -> Array:
    """Return √(Σ_t (g_t·x_tj)² / items) of an expert's input channels, [H] or, for down, [I]."""
    sums = layer.mid2 if down else layer.x2
    if sums is None:
        raise UsageError("profile", "has no channel sums", "profile again with --channels")
    return np.sqrt(sums[expert] / items)


def matrices_of(
    profile: Profile, checkpoint: Checkpoint, progress: Progress | None = None
) -> Iterator[tuple[ExpertMatrix, Array]]:
    """Every expert matrix of the profile's layers, and the norms of its input channels.

    ``progress`` is called with matrices done and matrices in all.
    """
    found = [matrix for matrix in expert_matrices(checkpoint) if matrix.layer in profile.layers]
    for done, matrix in enumerate(found, 1):
        yield matrix, norms_of(profile.layers[matrix.layer], matrix.expert, profile.items, matrix.part == "down")
        if progress is not None:
            progress(done, len(found))


def moe_pruner(profile: Profile, checkpoint: Checkpoint, progress: Progress | None = None) -> dict[int, Array]:
    """Return every expert's score Σ_ij |W_ij|·norm_j over gate, up and down, {layer: [E] float64}.

    ``progress`` is called with matrices done and matrices in all. Raises UsageError where the profile has no channel sums.
    """
    found = {index: np.zeros(profile.num_experts) for index in profile.layers}
    for matrix, norms in matrices_of(profile, checkpoint, progress):
        found[matrix.layer][matrix.expert] += float(np.abs(matrix.read()).sum(0, dtype=np.float64) @ norms)
    return found


def unstructured(
    profile: Profile, folder: Path, checkpoint: Checkpoint, pattern: Literal["row", "2:4"], ratio: float
) -> Plan:
    """Return the plan that keeps every expert and zeroes single weights by the channel sums of a profile.

    Args:
        profile: of this model, with channel sums.
        folder: where it lies; the cut reads it again.
        checkpoint: the model.
        pattern: "row" or "2:4".
        ratio: fraction to zero; 0.5 for 2:4.
    """
    if not 0.0 < ratio < 1.0 or (pattern == "2:4" and ratio != 0.5):
        raise UsageError("--budget", f"is {1 - ratio} with --zero {pattern}", "give a fraction in (0, 1); 2:4 is 0.5")
    for layer in profile.layers.values():
        norms_of(layer, 0, profile.items, down=False)
    if checkpoint.family.fused_halves:
        raise UnsupportedError(
            folder, "its experts are fused in one tensor, of which the cut zeroes no single weights",
            "leave --zero away: whole experts are chosen by the same score",
        )  # fmt: skip
    every = tuple(range(profile.num_experts))
    layers = {index: LayerPlan(every, k) for index, k in profile.top_k.items()}
    notice = f"{ratio:.0%} of the experts' weights become zero: in a dense kernel that saves neither memory nor time"
    record = made_by(method=f"moe-pruner-{pattern}", data_sha256=profile.data_sha256, sparsity=ratio, notices=[notice])
    where = Zeroed(pattern, ratio, str(folder.resolve()), sha256_of(folder / "profile.safetensors"))
    return Plan(profile.base, profile.num_experts, layers, made_by=record, zeroed=where)
