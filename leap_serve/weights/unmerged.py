"""An adapter that is not merged at load but left to vLLM's own LoRA path, as one module among others.

vLLM applies LoRA to experts on a GPU only (``FusedMoEWithLoRA``). Its reader of PEFT's 3-D form makes of our factors
what ``leap_serve.weights.overlays`` says they are, except in the families refused here. The router head is laid in at
load either way. ``leap serve --unmerged`` sets the variable, which every process of the engine reads.
"""

from __future__ import annotations

import os

from leap_serve.checkpoint import Checkpoint
from leap_serve.errors import UnsupportedError, UsageError
from leap_serve.weights.overlays import ADAPTER, PARAMETERS, is_transposed, read_factors

VARIABLE = "LEAP_UNMERGED"
FLAG = "--unmerged"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes."""
_REMEDY = "serve without it: the adapter is then merged into the experts"


def left_to_vllm() -> bool:
    """Whether LEAP_UNMERGED says that the plugin is not to merge the adapter."""
    return os.environ.get(VARIABLE) == "1"


def rank_for_vllm(checkpoint: Checkpoint) -> int:
    """Return the --max-lora-rank that a checked cut's adapter needs.

    Raises UsageError where there is no adapter, and UnsupportedError where vLLM cannot take it or would make
    something else of it than PEFT.
    """
    factors = read_factors(checkpoint)
    if not factors:
        raise UsageError(FLAG, f"is given, but {checkpoint.folder} has no {ADAPTER}", "serve without it")
    family = checkpoint.family
    if family.weight_on_input:
        what = f"vLLM weighs an adapter's output by the router, but {family.model_type} weighs the experts' input"
        raise UnsupportedError(FLAG, what, _REMEDY)
    if is_transposed(family):
        raise UnsupportedError(FLAG, f"vLLM orders gate and up of {family.model_type}'s adapters otherwise", _REMEDY)
    path = checkpoint.folder / ADAPTER
    if any(f".{family.block}.experts." not in one.a.name for one in factors.values()):
        what = f"is named after transformers' modules, which {family.model_type} names otherwise: vLLM would skip it"
        raise UnsupportedError(path, what, _REMEDY)
    for layer, parameter in sorted({(layer, parameter) for layer, _ in factors for parameter in PARAMETERS}):
        if (layer, parameter) not in factors:
            what = f"adapts no {parameter} in layer {layer}, and vLLM takes both parameters of a layer or neither"
            raise UnsupportedError(path, what, _REMEDY)
    rank = max(one.rank for one in factors.values())
    if rank > RANKS[-1]:
        raise UnsupportedError(path, f"has rank {rank}, vLLM takes {RANKS[-1]} at most", _REMEDY)
    return next(step for step in RANKS if step >= rank)
