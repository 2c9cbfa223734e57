"""Every method of ``leap search`` in a row of facts (``leap methods``). Data only: no method is loaded for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Method:
    """What one must know to choose a method.

    Args:
        name: what ``--method`` takes.
        paper: where it is from; «ours» where no paper has it.
        source: what it needs beside the model: nothing, a profile, or items of a task.
        gradients: whether it needs any.
        evaluations: what it evaluates.
        output: what of a plan it decides.
    """

    name: str
    paper: str
    source: Literal["nothing", "profile", "items", "profile and items", "profile and weights"]
    gradients: bool
    evaluations: str
    output: Literal["experts", "experts and τ", "top_k", "channels", "merged experts"] = "experts"


_ONCE = "none (one pass for all criteria)"
_SEARCHED = "--episodes plans in the engine"
METHODS: tuple[Method, ...] = (
    Method("frequency", "baseline of LEAP §4.1", "profile", False, _ONCE),
    Method("gate-mass", "«soft» frequency", "profile", False, _ONCE),
    Method("ean", "expert activation norm (REAP's comparison)", "profile", False, _ONCE),
    Method("ean-mean", "expert activation norm, per token", "profile", False, _ONCE),
    Method("ean-weighted", "expert activation norm, weighted by the gate", "profile", False, _ONCE),
    Method("reap", "Lasby et al. 2025, REAP", "profile", False, _ONCE),
    Method("easy-ep", "Dong et al. 2025, EASY-EP", "profile", False, _ONCE),
    Method("moe-pruner", "Xie et al. 2024, MoE-Pruner", "profile and weights", False, "none (a profile --channels)"),
    Method("intra", "LExI §3", "profile and weights", False, "none (a profile --channels)", "channels"),
    Method("magnitude", "baseline of LEAP §4.1", "nothing", False, "none (weights only)"),
    Method("random", "control", "nothing", False, "none"),
    Method("naee", "Lu et al. 2024, NAEE §3.2", "items", False, "C(E, r) subsets per layer; greedy above 20,000"),
    Method("naee-progressive", "Lu et al. 2024, NAEE §3.2", "items", False, "as naee, on the pruned model's inputs"),
    Method("moe-i2", "Yang et al. 2024, MoE-I²", "items", False, "100 + 50 × 50 sets per layer, 27 per 3 layers"),
    Method(
        "hc-smoe", "Chen et al. 2024, HC-SMoE", "items", False, "none (all experts on all tokens)", "merged experts"
    ),
    Method("lexi", "LExI, algorithms 1 and 2", "nothing", False, "--draws of noise per layer", "top_k"),
    Method("tsep", "Chen et al. 2022, TSEP", "items", True, "none (--steps of tuning on the full model)"),
    Method("eep", "Liu et al. 2024, EEP", "items", False, "--episodes of items, in transformers", "merged experts"),
    Method("leap", "LEAP §3.1", "profile and items", True, _SEARCHED, "experts and τ"),
    Method("random-search", "control", "profile and items", False, _SEARCHED),
    Method("greedy", "control", "profile and items", False, _SEARCHED),
    Method("evolution", "control", "profile and items", False, _SEARCHED),
    Method("evo-counts", "after EvoESAP", "profile and items", False, _SEARCHED),
    Method("rco", "after RCO: learned scores, Gumbel noise", "profile and items", True, "steps of items"),
)
CHANNELWISE = ("moe-pruner", "intra")
"""Methods that need a profile with channel sums, and the weights."""
LAYERWISE = ("naee", "naee-progressive", "moe-i2", "hc-smoe", "lexi")
"""Methods that run the MoE layers themselves, in transformers."""
TASKWISE = ("tsep", "eep")
"""Methods that look at the task's own loss, in transformers."""
