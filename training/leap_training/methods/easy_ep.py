"""EASY-EP: a one-shot criterion for experts of one domain, from a few demonstrations.

Paper: Dong et al. 2025, «Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations».
An expert's score sums, over the tokens it is chosen for, its output-aware importance g·‖f‖ (gate weight × norm of
its output) times the token's contribution max(1 − cos(h, h + r), 0): how far the routed experts turn the residual
stream h, r being their joint output. Ours: the clamp at 0, and for Llama-4, whose weight multiplies the input, ‖f(g·x)‖.

Cost: none beside the profile, which sums it as ``easy`` in the pass that all criteria share; no gradients. Memory: E·8
bytes per layer, beside the profile's (E² + 7·E)·8.
"""

from __future__ import annotations

import numpy as np

from leap_serve.errors import UsageError
from leap_serve.profile import Profile
from leap_training.saliency import Array


def easy_ep(profile: Profile) -> dict[int, Array]:
    """Return every expert's score, {layer: [E] float64}; UsageError where the profile has not seen the residual."""
    found: dict[int, Array] = {}
    for index, layer in profile.layers.items():
        if layer.easy is None:
            raise UsageError(
                "--method easy-ep", f"the profile has no residual stream of layer {index} ({profile.engine})",
                "profile again with another --engine, or choose another --method",
            )  # fmt: skip
        found[index] = np.array(layer.easy)
    return found
