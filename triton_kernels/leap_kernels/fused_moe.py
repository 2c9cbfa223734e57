"""A fused MoE layer for few experts: route, gate_up with SiLU·mul, down with the weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton

from leap_kernels import _kernels, _route
from leap_kernels.checks import check_arguments
from leap_kernels.config import KernelConfig, default_config

ROUTE_ELEMENTS = 1024
"""Tokens × experts that one routing program holds in registers; with 2048 route_place takes a stack frame."""
ROUTE_CHUNKS = 128
"""Most programs that share the routing of a large batch."""
ROUTE_WARPS, CHOOSE_WARPS = 4, 8
"""Of the kernels that give out rows, and of route_choose: on four warps Triton 3.6 gives it a stack frame on sm_100."""
ADD_UP_COLUMNS = 512
"""Columns that one program of the final sum handles: 4 a thread; 8 fp32 take a stack frame on sm_100."""

SCHEMA = (
    "(Tensor x, Tensor w13, Tensor w2, Tensor? router_logits, Tensor? topk_ids, Tensor? topk_weights, int top_k,"
    " str scoring, float temperature, Tensor? bias, bool renormalise, float scale, bool weight_on_input,"
    " Tensor? expert_map, int[] launch) -> Tensor"
)
"""Of the operator; spelt out, since releases of torch differ in which annotations they can read one from."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Who goes where: ids, weights [T, K] and the sorted order that _route.py describes."""

    ids: torch.Tensor
    weights: torch.Tensor
    order: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor
    blocks: torch.Tensor


def fused_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    router_logits: torch.Tensor | None = None,
    *,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    top_k: int | None = None,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    renormalise: bool = True,
    scale: float = 1.0,
    weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    config: KernelConfig | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run one MoE layer: Σ over a token's experts e of weight_e · w2_e·(SiLU(gate_e·x) · (up_e·x)).

    T tokens, H hidden, I intermediate, E experts held here, K = top_k. Give either ``router_logits`` and
    ``top_k``, or ``topk_ids`` and ``topk_weights``. Nothing is synchronised with the host: safe in CUDA graphs.
    Under torch.compile it is one opaque operator, ``leap_kernels::fused_moe``. There is no backward pass.

    Args:
        x: [T, H], fp32, fp16 or bf16, rows contiguous.
        w13: [E, 2·I, H], x's dtype, gate rows before up rows.
        w2: [E, H, I], x's dtype.
        router_logits: [T, E], any float dtype; scored and ranked in fp32.
        topk_ids: [T, K] int32 or int64; an id outside 0 … E−1 (after expert_map) contributes nothing.
        topk_weights: [T, K] fp32.
        top_k: K, with router_logits.
        scoring: of the logits.
        temperature: τ, divides the logits.
        bias: [E], added to the scores for ranking only (DeepSeek-V3's correction bias).
        renormalise: the K weights are made to sum to ``scale``.
        scale: factor on the weights.
        weight_on_input: the weight multiplies x instead of the output (Llama-4).
        expert_map: [experts of all ranks] int32, global id → local id or −1; with topk_ids.
        config: how to launch; default by size. Its reduction decides determinism, see config.Reduction.
        out: [T, H] like x, contiguous; made if not given.

    Returns:
        [T, H] in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices, strides or settings that do not fit, with their values.
    """
    top_k = check_arguments(
        x, w13, w2, router_logits, topk_ids, topk_weights, top_k, scoring, temperature, bias, expert_map, out
    )
    if torch.compiler.is_compiling():
        launch = config.to_ints() if config else []
        made = _operator(
            x, w13, w2, router_logits, topk_ids, topk_weights, top_k, scoring, temperature, bias, renormalise, scale,
            weight_on_input, expert_map, launch,
        )  # fmt: skip
        return made if out is None else out.copy_(made)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not len(x):
        return out
    config = config or default_config(len(x), len(w13), top_k, x.element_size())
    # Triton launches on the current GPU, whose addresses the tensors of another are not.
    with torch.cuda.device_of(x):
        routing = _route_tokens(
            len(x), len(w13), top_k, config.block_m, router_logits, topk_ids, topk_weights,
            scoring, temperature, bias, renormalise, scale, expert_map,
        )  # fmt: skip
        hidden = _gate_up(x, w13, routing, weight_on_input, config)
        # Only ids given from outside may leave a token without an expert.
        _down(hidden, w2, routing, not weight_on_input, router_logits is None, config, out)
    return out


@torch.library.custom_op("leap_kernels::fused_moe", mutates_args=(), schema=SCHEMA)  # type: ignore[untyped-decorator]
def _operator(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    router_logits: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    top_k: int,
    scoring: str,
    temperature: float,
    bias: torch.Tensor | None,
    renormalise: bool,
    scale: float,
    weight_on_input: bool,
    expert_map: torch.Tensor | None,
    launch: Sequence[int],
) -> torch.Tensor:
    """fused_moe as a compiler sees it: sizes, choices and launches stay inside. ``launch``: KernelConfig.to_ints."""
    return fused_moe(
        x, w13, w2, router_logits, topk_ids=topk_ids, topk_weights=topk_weights, top_k=top_k,
        scoring="softmax" if scoring == "softmax" else "sigmoid", temperature=temperature, bias=bias,
        renormalise=renormalise, scale=scale, weight_on_input=weight_on_input, expert_map=expert_map,
        config=KernelConfig.from_ints(launch) if launch else None,
    )  # fmt: skip


@_operator.register_fake  # type: ignore[untyped-decorator]
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    """[T, H] like x, contiguous."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _route_tokens(
    num_tokens: int, num_experts: int, top_k: int, block_m: int,
    logits: torch.Tensor | None, ids: torch.Tensor | None, weights: torch.Tensor | None,
    scoring: str, temperature: float, bias: torch.Tensor | None, renormalise: bool, scale: float,
    expert_map: torch.Tensor | None,
) -> Routing:  # fmt: skip
    """Choose (or take) the experts and sort the slots, in one launch if the batch is small, else in two."""
    given = ids if ids is not None else logits
    assert given is not None
    slots = num_tokens * top_k
    num_blocks = max_blocks(slots, num_experts, block_m)
    block_e = max(16, triton.next_power_of_2(num_experts))
    block_k = triton.next_power_of_2(top_k)

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=given.device)

    if ids is None or weights is None:
        ids = ints(num_tokens, top_k)
        weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=given.device)
    routing = Routing(ids, weights, ints(slots), ints(slots), ints(num_experts + 1), ints(3, num_blocks))
    # Pointers that a variant does not read still need a tensor.
    score = (logits if logits is not None else ids, logits.stride(0) if logits is not None else 0,
             bias if bias is not None else ids)  # fmt: skip
    mapped = expert_map if expert_map is not None else ids
    factors = (1.0 / temperature, scale)
    flags = {
        "HAS_LOGITS": logits is not None, "SIGMOID": scoring == "sigmoid", "HAS_BIAS": bias is not None,
        "RENORMALISE": renormalise,
    }  # fmt: skip
    sizes = {"HAS_MAP": expert_map is not None, "BE": block_e, "BK": block_k}
    sorted_to = (routing.order, routing.rows, routing.offsets, routing.blocks)
    scalars = (num_tokens, num_experts, top_k, len(mapped))
    # An id per choice is held as well: both tables must fit.
    most = max(1, ROUTE_ELEMENTS // max(block_e, block_k))
    if num_tokens <= most:
        _route.route_once[(1,)](
            *score, ids, weights, mapped, *sorted_to, *scalars, num_blocks, *factors,
            **flags, **sizes, BT=triton.next_power_of_2(num_tokens), BLOCK_M=block_m, num_warps=ROUTE_WARPS,
        )  # fmt: skip
        return routing
    chunk = most * triton.cdiv(triton.cdiv(num_tokens, ROUTE_CHUNKS), most)
    chunks = triton.cdiv(num_tokens, chunk)
    counts = ints(chunks, block_e)
    _route.route_choose[(chunks,)](
        *score,
        ids,
        weights,
        mapped,
        counts,
        *scalars,
        *factors,
        chunk,
        **flags,
        **sizes,
        BT=most,
        num_warps=CHOOSE_WARPS,
    )
    _route.route_place[(chunks,)](
        ids, mapped, counts, *sorted_to, *scalars, num_blocks, chunk, chunks,
        **sizes, BT=most, BLOCK_M=block_m, num_warps=ROUTE_WARPS,
    )  # fmt: skip
    return routing


def max_blocks(slots: int, num_experts: int, block_m: int) -> int:
    """Return the most blocks of block_m rows that any routing of so many slots can need: Σ ⌈n_e / block_m⌉."""
    return (slots + min(num_experts, slots) * (block_m - 1)) // block_m


def precision_of(dtype: torch.dtype) -> dict[str, object]:
    """Return the compile-time settings of products in a dtype: fp32 stays fp32, never TF32."""
    upcast = dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    return {"PRECISION": "ieee" if dtype == torch.float32 else "tf32", "UPCAST": upcast}


def _gate_up(
    x: torch.Tensor, w13: torch.Tensor, routing: Routing, weight_on_input: bool, config: KernelConfig
) -> torch.Tensor:
    """Return SiLU(gate)·up of every slot, [T·K, I] in sorted order, x's dtype."""
    tile, hidden, width = config.gate_up, x.shape[1], w13.shape[1] // 2
    out = torch.empty((len(routing.order), width), dtype=x.dtype, device=x.device)
    blocks = routing.blocks.shape[1]
    _kernels.gate_up[(blocks * triton.cdiv(width, tile.block_n),)](
        x, w13, out, routing.order, routing.weights, routing.blocks, blocks, hidden, width, routing.ids.shape[1],
        x.stride(0), w13.stride(0), w13.stride(1),
        WEIGHT_ON_INPUT=weight_on_input, EVEN_H=hidden % tile.block_k == 0, **precision_of(x.dtype),
        BLOCK_M=config.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=config.group_m,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _down(
    h: torch.Tensor, w2: torch.Tensor, routing: Routing, apply_weight: bool, may_be_absent: bool,
    config: KernelConfig, out: torch.Tensor,
) -> None:  # fmt: skip
    """Write the weighted sum of each token's experts into out [T, H]."""
    tile, (tokens, hidden), width, top_k = config.down, out.shape, h.shape[1], routing.ids.shape[1]
    common = {
        "APPLY_WEIGHT": apply_weight, "EVEN_I": width % tile.block_k == 0, **precision_of(h.dtype),
        "BLOCK_M": config.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    columns = triton.cdiv(hidden, tile.block_n)
    strides = (w2.stride(0), w2.stride(1))
    if config.reduction == "by_expert":
        _kernels.down_by_expert[(triton.cdiv(tokens, config.block_m), columns)](
            h, w2, out, routing.ids, routing.weights, routing.rows, routing.offsets,
            tokens, len(w2), hidden, width, top_k, *strides, BK=triton.next_power_of_2(top_k), **common,
        )  # fmt: skip
        return
    if top_k == 1:
        to, target = "token", out.zero_() if may_be_absent else out
    elif config.reduction == "atomic":
        to, target = "atomic", torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    else:
        to, target = "rows", torch.empty((len(h), hidden), dtype=h.dtype, device=h.device)
    blocks = routing.blocks.shape[1]
    _kernels.down[(blocks * columns,)](
        h, w2, target, routing.order, routing.weights, routing.blocks, blocks, hidden, width, top_k, *strides,
        TO=to, GROUP_M=config.group_m, **common,
    )  # fmt: skip
    if to == "atomic":
        out.copy_(target)
    elif to == "rows":
        block = min(ADD_UP_COLUMNS, triton.next_power_of_2(hidden))
        _kernels.add_up[(tokens, triton.cdiv(hidden, block))](
            target, routing.rows, out, hidden, top_k, BLOCK=block, num_warps=4
        )
