"""Triton: choose the experts of each token, and sort the (token, expert) pairs by expert without atomics.

A *slot* is one pair: slot t·K + j is the j-th expert of token t. Sorting gives every slot that has an expert
here a *row*: rows of one expert are adjacent, and slots keep their order within an expert, so that the whole is
deterministic. What the kernels write, all int32:

    order [T·K]       row → slot
    rows [T·K]        slot → row, −1 where the slot has no expert here (another rank's, or an id of −1)
    offsets [E + 1]   first row of each expert
    blocks [3, B]     for the grouped products: expert (−1: unused), first row and end of each block of rows

One program does it all while tokens × experts fit into its registers (``route_once``); beyond that
``route_choose`` counts per chunk of tokens and ``route_place`` gives out the rows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _choose(logits, stride_l, bias, tokens, live, E, K, inverse_temperature, scale,
            SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, RENORMALISE: tl.constexpr,
            BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Score, choose K and weigh: ids [BT, BK] and weights [BT, BK] of the tokens [BT]."""
    expert = tl.arange(0, BE)
    known = expert < E
    column = tl.arange(0, BK)
    z = tl.load(
        logits + tokens.to(tl.int64)[:, None] * stride_l + expert[None, :],
        mask=live[:, None] & known[None, :], other=float("-inf"),
    ).to(tl.float32) * inverse_temperature  # fmt: skip
    z = tl.where(live[:, None], z, 0.0)
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-z))
    else:
        score = tl.exp(z - tl.max(z, axis=1)[:, None])
        score = score / tl.sum(tl.where(known[None, :], score, 0.0), axis=1)[:, None]
    # Without a bias the logits themselves are ranked: scores far down underflow and would tie.
    key = z
    if HAS_BIAS:
        key = score + tl.load(bias + expert, mask=known, other=0.0).to(tl.float32)[None, :]
    # A floor keeps experts that were masked with −inf above those taken already: K distinct ids, whatever comes.
    key = tl.where(key > -3.0e38, key, -3.0e38)
    key = tl.where(known[None, :], key, float("-inf"))
    ids = tl.full((BT, BK), -1, dtype=tl.int32)
    weights = tl.zeros((BT, BK), dtype=tl.float32)
    for j in range(K):
        best = tl.argmax(key, axis=1, tie_break_left=True).to(tl.int32)
        taken = expert[None, :] == best[:, None]
        weight = tl.sum(tl.where(taken, score, 0.0), axis=1)
        key = tl.where(taken, float("-inf"), key)
        ids = tl.where(column[None, :] == j, best[:, None], ids)
        weights = tl.where(column[None, :] == j, weight[:, None], weights)
    if RENORMALISE:
        weights = weights / tl.maximum(tl.sum(weights, axis=1), 1e-20)[:, None]
    ids = tl.where(live[:, None], ids, -1)
    return ids, weights * scale


@triton.jit
def _given(topk_ids, expert_map, tokens, live, E, K, MAP_SIZE,
           HAS_MAP: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Read ids [BT, BK] of the tokens [BT]; those of other ranks, and any outside 0 … E−1, become −1."""
    column = tl.arange(0, BK)
    inside = live[:, None] & (column < K)[None, :]
    ids = tl.load(topk_ids + tokens.to(tl.int64)[:, None] * K + column[None, :], mask=inside, other=-1)
    if HAS_MAP:
        mapped = (ids >= 0) & (ids < MAP_SIZE)
        ids = tl.load(expert_map + tl.where(mapped, ids, 0), mask=mapped, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@triton.jit
def _count(ids, K, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr):
    """Return how often each of the tokens chose each expert, int32 [BT, BE]."""
    expert = tl.arange(0, BE)
    column = tl.arange(0, BK)
    counts = tl.zeros((BT, BE), dtype=tl.int32)
    for j in range(K):
        chosen = tl.max(tl.where(column[None, :] == j, ids, -1), axis=1)
        counts += (expert[None, :] == chosen[:, None]).to(tl.int32)
    return counts


@triton.jit
def _place(ids, counts, first, order, rows, tokens, live, K,
           BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Give rows to the slots of the tokens [BT]; ``first`` [BE] is the next free row of each expert."""
    expert = tl.arange(0, BE)
    column = tl.arange(0, BK)
    free = first[None, :] + tl.cumsum(counts, axis=0) - counts
    placed = tl.full((BT, BK), -1, dtype=tl.int32)
    for j in range(K):
        chosen = tl.max(tl.where(column[None, :] == j, ids, -1), axis=1)
        here = expert[None, :] == chosen[:, None]
        row = tl.sum(tl.where(here, free, 0), axis=1)
        row = tl.where(chosen >= 0, row, -1)
        # The same expert twice in one token would otherwise get the same row twice.
        free += here.to(tl.int32)
        placed = tl.where(column[None, :] == j, row[:, None], placed)
    slots = tokens[:, None] * K + column[None, :]
    inside = live[:, None] & (column < K)[None, :]
    tl.store(rows + slots, placed, mask=inside)
    tl.store(order + placed, slots, mask=inside & (placed >= 0))


@triton.jit
def _write_blocks(total, blocks, num_blocks, first_step, step,
                  BE: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Cut each expert's rows (``total`` [BE] of them) into blocks of BLOCK_M; programs share the work by steps."""
    expert = tl.arange(0, BE)
    start = tl.cumsum(total, axis=0) - total
    needed = (total + BLOCK_M - 1) // BLOCK_M
    place = tl.cumsum(needed, axis=0) - needed
    for i in range(first_step, tl.max(needed, axis=0), step):
        has = i < needed
        tl.store(blocks + place + i, expert, mask=has)
        tl.store(blocks + num_blocks + place + i, start + i * BLOCK_M, mask=has)
        tl.store(blocks + 2 * num_blocks + place + i, start + total, mask=has)
    used = tl.sum(needed, axis=0)
    for i in range(used + first_step * BE, num_blocks, step * BE):
        tl.store(blocks + i + expert, tl.full((BE,), -1, dtype=tl.int32), mask=i + expert < num_blocks)


@triton.jit
def route_once(logits, stride_l, bias, topk_ids, topk_weights, expert_map, order, rows, offsets, blocks,
               T, E, K, MAP_SIZE, num_blocks, inverse_temperature, scale,
               HAS_LOGITS: tl.constexpr, SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, RENORMALISE: tl.constexpr,
               HAS_MAP: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
               BLOCK_M: tl.constexpr):  # fmt: skip
    """Choose and sort in one program: T ≤ BT tokens."""
    tokens = tl.arange(0, BT)
    live = tokens < T
    column = tl.arange(0, BK)
    if HAS_LOGITS:
        ids, weights = _choose(logits, stride_l, bias, tokens, live, E, K, inverse_temperature, scale,
                               SIGMOID, HAS_BIAS, RENORMALISE, BT, BE, BK)  # fmt: skip
        slots = tokens[:, None] * K + column[None, :]
        inside = live[:, None] & (column < K)[None, :]
        tl.store(topk_ids + slots, ids, mask=inside)
        tl.store(topk_weights + slots, weights, mask=inside)
    else:
        ids = _given(topk_ids, expert_map, tokens, live, E, K, MAP_SIZE, HAS_MAP, BK)
    counts = _count(ids, K, BT, BE, BK)
    total = tl.sum(counts, axis=0)
    start = tl.cumsum(total, axis=0) - total
    expert = tl.arange(0, BE)
    tl.store(offsets + 1 + expert, start + total, mask=expert < E)
    tl.store(offsets, 0)
    _place(ids, counts, start, order, rows, tokens, live, K, BT, BE, BK)
    _write_blocks(total, blocks, num_blocks, 0, 1, BE, BLOCK_M)


@triton.jit
def route_choose(logits, stride_l, bias, topk_ids, topk_weights, expert_map, counts_of_chunks,
                 T, E, K, MAP_SIZE, inverse_temperature, scale, chunk,
                 HAS_LOGITS: tl.constexpr, SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, RENORMALISE: tl.constexpr,
                 HAS_MAP: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Choose for one chunk of tokens and count: counts_of_chunks [programs, BE]."""
    pid = tl.program_id(0)
    column = tl.arange(0, BK)
    expert = tl.arange(0, BE)
    total = tl.zeros((BE,), dtype=tl.int32)
    for first in range(pid * chunk, tl.minimum(pid * chunk + chunk, T), BT):
        tokens = first + tl.arange(0, BT)
        live = tokens < tl.minimum(pid * chunk + chunk, T)
        if HAS_LOGITS:
            ids, weights = _choose(logits, stride_l, bias, tokens, live, E, K, inverse_temperature, scale,
                                   SIGMOID, HAS_BIAS, RENORMALISE, BT, BE, BK)  # fmt: skip
            slots = tokens[:, None] * K + column[None, :]
            inside = live[:, None] & (column < K)[None, :]
            tl.store(topk_ids + slots, ids, mask=inside)
            tl.store(topk_weights + slots, weights, mask=inside)
        else:
            ids = _given(topk_ids, expert_map, tokens, live, E, K, MAP_SIZE, HAS_MAP, BK)
        total += tl.sum(_count(ids, K, BT, BE, BK), axis=0)
    tl.store(counts_of_chunks + pid * BE + expert, total)


@triton.jit
def route_place(topk_ids, expert_map, counts_of_chunks, order, rows, offsets, blocks,
                T, E, K, MAP_SIZE, num_blocks, chunk, num_chunks,
                HAS_MAP: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
                BLOCK_M: tl.constexpr):  # fmt: skip
    """Give out the rows of one chunk of tokens, knowing what all chunks counted."""
    pid = tl.program_id(0)
    expert = tl.arange(0, BE)
    total = tl.zeros((BE,), dtype=tl.int32)
    before = tl.zeros((BE,), dtype=tl.int32)
    for other in range(num_chunks):
        count = tl.load(counts_of_chunks + other * BE + expert)
        total += count
        before += tl.where(other < pid, count, 0)
    start = tl.cumsum(total, axis=0) - total
    if pid == 0:
        tl.store(offsets + 1 + expert, start + total, mask=expert < E)
        tl.store(offsets, 0)
    _write_blocks(total, blocks, num_blocks, pid, num_chunks, BE, BLOCK_M)
    free = start + before
    for first in range(pid * chunk, tl.minimum(pid * chunk + chunk, T), BT):
        tokens = first + tl.arange(0, BT)
        live = tokens < tl.minimum(pid * chunk + chunk, T)
        ids = _given(topk_ids, expert_map, tokens, live, E, K, MAP_SIZE, HAS_MAP, BK)
        counts = _count(ids, K, BT, BE, BK)
        _place(ids, counts, free, order, rows, tokens, live, K, BT, BE, BK)
        free += tl.sum(counts, axis=0)
