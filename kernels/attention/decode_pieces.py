"""The answers of decode attention's units: written by the program that had a unit whole, or added
up from pieces.

A program whose stretch holds a part of a unit only stores that piece in scratch; it has two of them
at most, where its stretch begins and where it ends. The one that arrives last adds a unit's pieces
up in their order.
"""

import triton
import triton.language as tl

from octavo.kernels.attention.kv_quant import component


@triton.jit
def write_answer(
    out_ptr,  # [tokens, NUM_Q, DIM]
    query_token,  # [rows]
    query_head,  # [rows]
    weights,  # [rows]
    sums,  # [words, rows] a part of the words
    w,
    in_q,
    NUM_Q: tl.constexpr,
    DIM: tl.constexpr,
    FORMAT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Writes what a unit's query rows saw; a row that saw nothing gets zeros."""
    divisor = tl.where(weights > 0.0, weights, 1.0)[None, :]
    out = out_ptr + (query_token * NUM_Q + query_head) * DIM
    dtype = out_ptr.dtype.element_ty
    for i in tl.static_range(PARTS):
        tl.store(out[None, :] + component(w, i, FORMAT, DIM)[:, None], (sums[i] / divisor).to(dtype), mask=in_q)


@triton.jit
def store_piece(
    partial_ptr,
    partial_stats_ptr,
    piece,
    maximum,  # [rows]
    weights,  # [rows]
    sums,  # [words, rows] a part of the words
    m,
    w,
    PARTS: tl.constexpr,
    BLOCK_PARTIAL: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Leaves what a program has of a unit in its scratch."""
    in_partial = m < BLOCK_PARTIAL
    sums_ptrs = partial_ptr + (piece * BLOCK_PARTIAL + m)[None, :] * (PARTS * BLOCK_W) + w[:, None]
    for i in tl.static_range(PARTS):
        tl.store(sums_ptrs + i * BLOCK_W, sums[i], mask=in_partial[None, :])
    stats_ptr = partial_stats_ptr + piece * (2 * BLOCK_PARTIAL)
    tl.store(stats_ptr + m, maximum, mask=in_partial)
    tl.store(stats_ptr + BLOCK_PARTIAL + m, weights, mask=in_partial)


@triton.jit
def merge_pieces(
    partial_ptr,
    partial_stats_ptr,
    out_ptr,
    first_program,
    pieces,
    first_is_second,  # 1 if the first program's piece is its second one
    first_token,  # the row's, and how many it has
    num_tokens,
    unit,
    GROUP: tl.constexpr,
    NUM_KV: tl.constexpr,
    DIM: tl.constexpr,
    FORMAT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_CHUNKS: tl.constexpr,
    BLOCK_PARTIAL: tl.constexpr,
    BLOCK_W: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Adds up a unit's pieces and writes its answer."""
    BLOCK_D: tl.constexpr = PARTS * BLOCK_W
    m = tl.arange(0, BLOCK_PARTIAL)
    d = tl.arange(0, BLOCK_D)
    maximum = tl.full((BLOCK_PARTIAL,), float("-inf"), tl.float32)
    weights = tl.zeros((BLOCK_PARTIAL,), tl.float32)
    acc = tl.zeros((BLOCK_PARTIAL, BLOCK_D), tl.float32)
    # One stage: loads go straight to registers, where staging them in shared memory would only add
    # latency. Rows come first, then pieces: so warps divide the rows, and each thread adds up what
    # it has loaded.
    for start in tl.range(0, pieces, MERGE, num_stages=1):
        index = start + tl.arange(0, MERGE)
        exists = index < pieces
        piece = 2 * (first_program + index) + tl.where(index == 0, first_is_second, 0)
        stats = partial_stats_ptr + piece[None, :] * (2 * BLOCK_PARTIAL) + m[:, None]
        # `.cg`: written by other SMs, so not from this one's L1.
        piece_maximum = tl.load(stats, mask=exists[None, :], other=float("-inf"), cache_modifier=".cg")
        piece_weights = tl.load(stats + BLOCK_PARTIAL, mask=exists[None, :], other=0.0, cache_modifier=".cg")
        sums = tl.load(
            partial_ptr + (piece[None, :] * BLOCK_PARTIAL + m[:, None])[:, :, None] * BLOCK_D + d[None, None, :],
            mask=exists[None, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_maximum = tl.maximum(maximum, tl.max(piece_maximum, axis=1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        rescale = tl.exp2(maximum - shift)
        factor = tl.exp2(piece_maximum - shift[:, None])
        weights = weights * rescale + tl.sum(piece_weights * factor, axis=1)
        acc = acc * rescale[:, None] + tl.sum(sums * factor[:, :, None], axis=1)
        maximum = new_maximum
    answer = acc / tl.where(weights > 0.0, weights, 1.0)[:, None]
    query_row = (unit % M_CHUNKS) * BLOCK_M + m
    query_token = first_token + query_row // GROUP
    query_head = (unit // M_CHUNKS) * GROUP + query_row % GROUP
    inside = (query_row < num_tokens * GROUP)[:, None] & (d % BLOCK_W < DIM // PARTS)[None, :]
    # Sums lie part by part.
    position = component(d % BLOCK_W, d // BLOCK_W, FORMAT, DIM)
    out = out_ptr + (query_token * (NUM_KV * GROUP) + query_head)[:, None] * DIM + position[None, :]
    tl.store(out, answer.to(out_ptr.dtype.element_ty), mask=inside)
