"""Triton: the two grouped products of an MoE layer, and the sum over a token's experts.

Rows, slots and blocks are those of _route.py. Every product accumulates in fp32. UPCAST turns operands into fp32
before a product: Triton's interpreter multiplies bfloat16 wrongly.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: E741

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _block_of(blocks, num_blocks, num_n, GROUP_M: tl.constexpr):
    """Map a program to (block of rows, tile of columns): GROUP_M blocks walk the columns together, for L2."""
    pid = tl.program_id(0)
    per_group = GROUP_M * num_n
    first = (pid // per_group) * GROUP_M
    height = tl.minimum(num_blocks - first, GROUP_M)
    return first + (pid % per_group) % height, (pid % per_group) // height


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a·b in fp32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def gate_up(x, w13, h, order, weights, blocks, num_blocks, H, I, K, stride_x, stride_e, stride_n,
            WEIGHT_ON_INPUT: tl.constexpr, EVEN_H: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr):  # fmt: skip
    """h[row] = SiLU(x·gateᵀ) · (x·upᵀ) for rows [T·K, I] in sorted order; w13 is [E, 2·I, H], gates first."""
    num_n = tl.cdiv(I, BLOCK_N)
    block, pid_n = _block_of(blocks, num_blocks, num_n, GROUP_M)
    expert = tl.load(blocks + block).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(blocks + num_blocks + block) + tl.arange(0, BLOCK_M)
    live = row < tl.load(blocks + 2 * num_blocks + block)
    slot = tl.load(order + row, mask=live, other=0)
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Columns beyond I read some other column's weights and are not stored: no mask on the widest loads.
    a = x + (slot // K).to(tl.int64)[:, None] * stride_x + inner[None, :]
    gate_at = w13 + expert * stride_e + (column % I)[None, :] * stride_n + inner[:, None]
    up_at = gate_at + I * stride_n
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        if EVEN_H:
            tile = tl.load(a + k, mask=live[:, None], other=0.0)
            gate = _product(tile, tl.load(gate_at + k), gate, PRECISION, UPCAST)
            up = _product(tile, tl.load(up_at + k), up, PRECISION, UPCAST)
        else:
            inside = inner + k < H
            tile = tl.load(a + k, mask=live[:, None] & inside[None, :], other=0.0)
            gate = _product(tile, tl.load(gate_at + k, mask=inside[:, None], other=0.0), gate, PRECISION, UPCAST)
            up = _product(tile, tl.load(up_at + k, mask=inside[:, None], other=0.0), up, PRECISION, UPCAST)
    if WEIGHT_ON_INPUT:
        # W·(w·x) = w·(W·x): scaling here needs no second copy of x and rounds nothing.
        weight = tl.load(weights + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        gate *= weight
        up *= weight
    out = gate / (1.0 + tl.exp(-gate)) * up
    at = h + row.to(tl.int64)[:, None] * I + column[None, :]
    tl.store(at, out.to(h.dtype.element_ty), mask=live[:, None] & (column < I)[None, :])


@triton.jit
def down(h, w2, y, order, weights, blocks, num_blocks, H, I, K, stride_e, stride_n,
         APPLY_WEIGHT: tl.constexpr, TO: tl.constexpr, EVEN_I: tl.constexpr, PRECISION: tl.constexpr,
         UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
         GROUP_M: tl.constexpr):  # fmt: skip
    """Rows of h [T·K, I] times their expert's w2 [E, H, I], times the router's weight.

    TO: "rows" writes y[row], "token" writes y[token] (K = 1), "atomic" adds to y[token] in fp32.
    """
    num_n = tl.cdiv(H, BLOCK_N)
    block, pid_n = _block_of(blocks, num_blocks, num_n, GROUP_M)
    expert = tl.load(blocks + block).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(blocks + num_blocks + block) + tl.arange(0, BLOCK_M)
    live = row < tl.load(blocks + 2 * num_blocks + block)
    slot = tl.load(order + row, mask=live, other=0)
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a = h + row.to(tl.int64)[:, None] * I + inner[None, :]
    b = w2 + expert * stride_e + (column % H)[None, :] * stride_n + inner[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, I, BLOCK_K):
        if EVEN_I:
            acc = _product(tl.load(a + k, mask=live[:, None], other=0.0), tl.load(b + k), acc, PRECISION, UPCAST)
        else:
            inside = inner + k < I
            tile = tl.load(a + k, mask=live[:, None] & inside[None, :], other=0.0)
            acc = _product(tile, tl.load(b + k, mask=inside[:, None], other=0.0), acc, PRECISION, UPCAST)
    if APPLY_WEIGHT:
        acc *= tl.load(weights + slot, mask=live, other=0.0).to(tl.float32)[:, None]
    inside_out = live[:, None] & (column < H)[None, :]
    if TO == "rows":
        tl.store(y + row.to(tl.int64)[:, None] * H + column[None, :], acc.to(y.dtype.element_ty), mask=inside_out)
    else:
        at = y + (slot // K).to(tl.int64)[:, None] * H + column[None, :]
        if TO == "token":
            tl.store(at, acc.to(y.dtype.element_ty), mask=inside_out)
        else:
            tl.atomic_add(at, acc, mask=inside_out, sem="relaxed")


@triton.jit
def down_by_expert(h, w2, out, ids, weights, rows, offsets, T, E, H, I, K, stride_e, stride_n,
                   APPLY_WEIGHT: tl.constexpr, EVEN_I: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                   BK: tl.constexpr):  # fmt: skip
    """out[t] = Σ over experts in order: a block of tokens goes through all experts that anyone chose.

    No intermediate, no second launch, same order of sums always; E/K times the arithmetic, so it is for decode.
    """
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    choice = tl.arange(0, BK)
    mine = (token < T)[:, None] & (choice < K)[None, :]
    slots = token[:, None] * K + choice[None, :]
    row_of = tl.load(rows + slots, mask=mine, other=-1)
    weight_of = tl.load(weights + slots, mask=mine, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b = w2 + (column % H)[None, :] * stride_n + inner[:, None]
    for expert in range(0, E):
        first = tl.load(offsets + expert)
        end = tl.load(offsets + expert + 1)
        if end > first:
            chosen = (row_of >= first) & (row_of < end)
            row = tl.max(tl.where(chosen, row_of, -1), axis=1)
            live = row >= 0
            a = h + row.to(tl.int64)[:, None] * I + inner[None, :]
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in range(0, I, BLOCK_K):
                if EVEN_I:
                    tile = tl.load(a + k, mask=live[:, None], other=0.0)
                    part = _product(tile, tl.load(b + k), part, PRECISION, UPCAST)
                else:
                    inside = inner + k < I
                    tile = tl.load(a + k, mask=live[:, None] & inside[None, :], other=0.0)
                    part = _product(tile, tl.load(b + k, mask=inside[:, None], other=0.0), part, PRECISION, UPCAST)
            if APPLY_WEIGHT:
                part *= tl.sum(tl.where(chosen, weight_of, 0.0), axis=1)[:, None]
            acc += part
        b += stride_e
    at = out + token.to(tl.int64)[:, None] * H + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(token < T)[:, None] & (column < H)[None, :])


@triton.jit
def add_up(y, rows, out, H, K, BLOCK: tl.constexpr):
    """out[t] = Σ_j y[rows[t, j]], j = 0 … K−1 in order, in fp32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(0, K):
        row = tl.load(rows + token * K + j).to(tl.int64) + tl.zeros((BLOCK,), dtype=tl.int64)
        total += tl.load(y + row * H + column, mask=(row >= 0) & (column < H), other=0.0).to(tl.float32)
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=column < H)
