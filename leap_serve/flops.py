"""Parameters and theoretical FLOPs per token, from a checkpoint's headers and a plan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from leap_serve.architectures import text_config
from leap_serve.checkpoint import Checkpoint, router_tail, width_of
from leap_serve.plan import Plan
from leap_serve.weights.tensorfile import TensorEntry

_SIDE = re.compile(r"(scales?|scale_inv|scale_2|scale_shape|qzeros|zero_point|g_idx|weight_shape)$")
_BIAS = re.compile(r"[._](bias|e_score_correction_bias|sinks)$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|tok_embeddings)\.weight$")
_OUTSIDE = re.compile(r"(^|\.)(vision\w*|visual|multi_modal\w*|mtp)\.")


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters: stored, used for one token of text, and multiplied with a vector for one token."""

    total: int
    active: int
    matmul: int


def parameters(
    checkpoint: Checkpoint, plan: Plan | None = None, active_experts: Mapping[int, float] | None = None
) -> Parameters:
    """Count the parameters of a checkpoint as ``plan`` would leave it (None: as it stands).

    A token uses top_k of a layer's experts and all else but vision towers and MTP layers. Of the matrices
    multiplied, the embedding look-up is none; where it is tied, it counts as the output head. Packed
    quantised weights count by their values; scales and zero points do not count. A router map adds r × E products.
    Truncated and zeroed matrices are dense, so they count in full.

    ``active_experts``: of layers that skip experts, how many a token really uses, on average (LayerPlan.skip).
    """
    total, active, matmul = Fraction(0), Fraction(0), Fraction(0)
    ruling = plan or checkpoint.plan
    mapped = {layer for layer, planned in ruling.layers.items() if planned.maps_router} if ruling else set()
    heads = checkpoint.head_tails()
    tied = not any(name.endswith("lm_head.weight") for name in checkpoint.tensors)
    for name, entry in checkpoint.tensors.items():
        if _SIDE.search(name):
            continue
        role = checkpoint.role(name)
        size = Fraction(entry.elements * _values_per_element(checkpoint, entry))
        used, weight = size, len(entry.shape) >= 2 and not _BIAS.search(name)
        if role.kind != "other":
            held = checkpoint.experts_in(role.layer)
            kept, top_k = _kept(checkpoint, plan, role.layer)
            if role.kind == "router":
                # A router that maps its rows to the retained slots keeps them all, and each needs its product; of a
                # router of several layers only the last one has a row per expert.
                head = router_tail(checkpoint.family, name) in heads[role.layer]
                size *= Fraction(kept, held) if head and role.layer not in mapped else 1
                used = size
            else:
                size *= Fraction(kept, held) * _narrowed(checkpoint, plan, role.layer)
                used = size * Fraction((active_experts or {}).get(role.layer, top_k)) / kept
        total += size
        if role.layer < checkpoint.num_hidden_layers and not _OUTSIDE.search(name):
            active += used
            matmul += used if weight and (tied or not _EMBEDDING.search(name)) else 0
    for planned in ruling.layers.values() if ruling else ():
        if planned.merge is not None and planned.merge.router and planned.merge.applied == "probabilities":
            of_map = len(planned.retained) * (ruling.num_experts if ruling else 0)
            total, active, matmul = total + of_map, active + of_map, matmul + of_map
    return Parameters(round(total), round(active), round(matmul))


def flops_per_token(
    checkpoint: Checkpoint, plan: Plan | None = None, active_experts: Mapping[int, float] | None = None
) -> int:
    """Return the theoretical FLOPs to process one token: 2 × the parameters multiplied (see :func:`parameters`).

    The products of queries with cached keys and values depend on the context length and are left out. With
    top_k = min(k, |I|), pruning alone leaves this number (but for router rows) as it was: it falls with top_k and
    with the experts' width. Dynamic skipping lowers it where ``active_experts`` says by how much: the choices that
    are left out weigh nothing, whether a kernel spares itself their products or not.
    """
    return 2 * parameters(checkpoint, plan, active_experts).matmul


def _kept(checkpoint: Checkpoint, plan: Plan | None, layer: int) -> tuple[int, int]:
    """Return a layer's number of experts and its top_k under a plan."""
    plan = plan or checkpoint.plan
    if plan is not None and layer in plan.layers:
        return len(plan.layers[layer].retained), plan.layers[layer].top_k
    if plan is not None and layer in checkpoint.mtp_layers:
        last = plan.layers[checkpoint.moe_layers[-1]]  # as the cut does
        return len(last.retained), last.top_k
    held = checkpoint.experts_in(layer)
    return held, min(held, checkpoint.top_k)


def _narrowed(checkpoint: Checkpoint, plan: Plan | None, layer: int) -> Fraction:
    """The share of the experts' channels that a plan keeps; 1 where the checkpoint has been cut by it already."""
    if plan is None or layer not in plan.layers or plan.layers[layer].width is None:
        return Fraction(1)
    return Fraction(plan.layers[layer].width or 0, width_of(checkpoint))


def _values_per_element(checkpoint: Checkpoint, entry: TensorEntry) -> int:
    """How many weights one stored element of a packed tensor holds."""
    last = entry.name.rpartition(".")[2]
    if entry.dtype == "U8" and (last == "weight" or last.endswith(("_blocks", "weight_packed"))):
        return 2  # MXFP4, NVFP4
    if entry.dtype == "I32" and last in ("qweight", "weight_packed"):
        quantisation = checkpoint.config.get("quantization_config") or text_config(checkpoint.config)
        return 32 // next(_bits(quantisation), 4)
    return 1


def _bits(value: Any) -> Iterator[int]:
    """Yield the bit widths that a quantisation config names (GPTQ, AWQ, compressed-tensors)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("bits", "w_bit", "num_bits") and type(item) is int and item > 0:
                yield item
            else:
                yield from _bits(item)
