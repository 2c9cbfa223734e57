"""Intra-expert pruning: every expert keeps its most important intermediate channels, and really gets narrower.

As LExI (§3) measures it: 12.5, 25 or 50 % of the FFN dimension of each expert goes. Ours, since no paper says by which
measure: the importance of channel c sums |W|·‖activation‖ over all that reads or writes it,
Σ_j (|G_cj| + |U_cj|)·‖g·x_j‖ + Σ_h |D_hc|·‖g·mid_c‖, with the profile's channel sums (those of MoE-Pruner).

It saves memory, FLOPs and reading in proportion; experts and top_k stay. The same width everywhere is an ordinary
checkpoint with a smaller intermediate size, which stock vLLM and transformers load.

Cost: a profile with channel sums, one reading of the expert weights per budget, a matrix at a time. Memory: per layer
E·(H + I)·8 bytes of channel sums, E·I·8 of importances and in the plan 8 to 36 a kept channel; I·H·24 for the matrix.
No gradients.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from leap_serve.checkpoint import Checkpoint, check_narrow, width_of
from leap_serve.engine import Progress
from leap_serve.errors import UsageError
from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_serve.provenance import made_by
from leap_training.methods.moe_pruner import matrices_of
from leap_training.saliency import Array


def importance(profile: Profile, checkpoint: Checkpoint, progress: Progress | None = None) -> dict[int, Array]:
    """Return the importance of every expert's channels, {layer: [E, I] float64}.

    ``progress`` is called with matrices done and matrices in all.
    """
    width = width_of(checkpoint)
    found = {index: np.zeros((profile.num_experts, width)) for index in profile.layers}
    for matrix, norms in matrices_of(profile, checkpoint, progress):
        sizes = np.abs(matrix.read().astype(np.float64))
        found[matrix.layer][matrix.expert] += sizes.sum(0) * norms if matrix.part == "down" else sizes @ norms
    return found


def intra(
    profile: Profile, checkpoint: Checkpoint, base: Plan, share: float, progress: Progress | None = None,
    **provenance: Any,
) -> Plan:  # fmt: skip
    """Return ``base`` with the best round(share·I) channels of every retained expert.

    Args:
        profile: of this model, with channel sums.
        checkpoint: the model.
        base: the experts to narrow; no merged or truncated ones.
        share: of the channels to keep, in (0, 1].
        progress: called with expert matrices read and matrices in all.
        provenance: what else ``made_by`` shall record.

    Raises UsageError and UnsupportedError where that cannot be.
    """
    check_narrow(checkpoint)
    width = width_of(checkpoint)
    if not 0.0 < share <= 1.0:
        raise UsageError("--budget", f"is {share}, not a fraction in (0, 1]", "give the fraction of channels to keep")
    kept = max(1, math.floor(share * width + 0.5))
    scores = importance(profile, checkpoint, progress)
    layers = {}
    for index, layer in base.layers.items():
        # Of equals the lower channels stay.
        order = np.argsort(-scores[index], axis=1, kind="stable")[:, :kept]
        channels = tuple(tuple(sorted(map(int, order[expert]))) for expert in layer.retained)
        layers[index] = replace(layer, channels=channels)
    record = made_by(
        method="intra", width=kept, full_width=width, data_sha256=profile.data_sha256,
        notices=[f"every expert keeps {kept} of {width} channels; experts and top_k stay as they are"], **provenance,
    )  # fmt: skip
    return Plan(base.base, base.num_experts, layers, base.scores, record)
