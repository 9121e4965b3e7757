"""Causal attention of rows of many new tokens over paged keys and values, which already hold this step's: bound by
arithmetic.

One program takes a block of a row's new tokens and one query head, and walks the keys those tokens see, cached prefix
and new ones alike, through the block table. Only tiles on the diagonal, or on a window's edge, pay for masks. The
grid is bounded by the number of tokens and rows, so rows of very different lengths cost no idle programs; each finds
its row on the device.

Source: Dao, "FlashAttention-2" (2023), sections 3.1-3.2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attend_tiles(
    acc,  # [BLOCK_M, BLOCK_D] fp32
    maximum,  # [BLOCK_M] fp32, in log2
    weights,  # [BLOCK_M] fp32
    q,  # [BLOCK_M, BLOCK_D]
    head_ptr,
    table,
    begin,  # multiple of TILE
    end,
    position,  # [BLOCK_M]
    first_key,
    seq_len,
    scale,
    soft_cap,
    cache_block_stride,
    cache_kv_stride,
    cache_offset_stride,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    n = tl.arange(0, TILE)
    d = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, TILE):
        key = start + n
        if MASKED:
            # What lies outside the row may be another request's, NaN included: it is never loaded.
            in_row = (key >= first_key) & (key < seq_len)
        else:
            in_row = key >= 0
        if BLOCK_SIZE >= TILE:
            page = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            address = page * cache_block_stride + (start % BLOCK_SIZE + n) * cache_offset_stride
        elif MASKED:
            page = tl.load(table + key // BLOCK_SIZE, mask=in_row, other=0).to(tl.int64)
            address = page * cache_block_stride + (key % BLOCK_SIZE) * cache_offset_stride
        else:
            page = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
            address = page * cache_block_stride + (key % BLOCK_SIZE) * cache_offset_stride
        k_ptr = head_ptr + address[None, :] + d[:, None]
        v_ptr = head_ptr + cache_kv_stride + address[:, None] + d[None, :]
        if MASKED or DIM < BLOCK_D:
            k = tl.load(k_ptr, mask=in_row[None, :] & (d < DIM)[:, None], other=0.0)
        else:
            k = tl.load(k_ptr)
        logits = tl.dot(q, k, input_precision="ieee")
        if SOFT_CAP:
            logits = (2.0 * tl.sigmoid(2.0 * scale * logits) - 1.0) * soft_cap
        if MASKED:
            visible = in_row[None, :] & (key[None, :] <= position[:, None])
            if WINDOW > 0:
                visible &= key[None, :] > position[:, None] - WINDOW
            logits = tl.where(visible, logits, float("-inf"))
        # Where the scale is not folded in yet it is applied in the subtraction, one fused multiply-add an element.
        factor = 1.0 if SOFT_CAP else scale
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=1) * factor)
        if MASKED:
            # A token that has seen nothing yet has no maximum to subtract.
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        else:
            shift = new_maximum
        probability = tl.exp2(logits * factor - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        weights = weights * rescale + tl.sum(probability, axis=1)
        acc = acc * rescale[:, None]
        if MASKED or DIM < BLOCK_D:
            v = tl.load(v_ptr, mask=in_row[:, None] & (d < DIM)[None, :], other=0.0)
        else:
            v = tl.load(v_ptr)
        acc = tl.dot(probability.to(v.dtype), v, acc, input_precision="ieee")
        maximum = new_maximum
    return acc, maximum, weights


@triton.jit
def _row_blocks(query_start_loc_ptr, rows, num_rows, BLOCK_M: tl.constexpr):
    """Blocks of tokens of each of `rows`; 0 for those that there are not."""
    starts = tl.load(query_start_loc_ptr + rows, mask=rows < num_rows, other=0)
    ends = tl.load(query_start_loc_ptr + rows + 1, mask=rows < num_rows, other=0)
    return tl.cdiv(ends - starts, BLOCK_M)


# How many rows there are and where the prefill rows begin changes from step to step. Triton would compile a variant for
# each pattern of their divisibility, while streams wait.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["row_slots_ptr", "query_start_loc_ptr", "seq_lens_ptr"],
)
def _prefill_attention_kernel(
    # pointers
    q_ptr,  # [T, Hq, D]
    cache_ptr,  # [num_blocks, 2, Hkv, BLOCK_SIZE, D]
    block_table_ptr,  # [slots, max_blocks] int32
    row_slots_ptr,  # [R] int32
    query_start_loc_ptr,  # [R + 1] int32
    seq_lens_ptr,  # [R] int32
    out_ptr,  # [T, Hq, D]
    scale,  # log2(e) / sqrt(D), or with SOFT_CAP the plain scale / cap
    soft_cap,  # cap * log2(e)
    # dimensions and strides, in elements
    num_rows,
    q_stride,
    out_stride,
    table_stride,
    cache_block_stride,
    cache_kv_stride,
    cache_head_stride,
    cache_offset_stride,
    # meta-parameters
    GROUP: tl.constexpr,  # query heads a KV head
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ROWS: tl.constexpr,  # rows looked through at a time
    BLOCK_M: tl.constexpr,  # tokens a program
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,  # keys a tile
):
    head = tl.program_id(0)
    # The last blocks of a row see the most keys: they start first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    lanes = tl.arange(0, ROWS)
    first_row = 0
    row_blocks = _row_blocks(query_start_loc_ptr, lanes, num_rows, BLOCK_M)
    total = tl.sum(row_blocks, axis=0)
    while (block >= total) & (first_row + ROWS < num_rows):
        block -= total
        first_row += ROWS
        row_blocks = _row_blocks(query_start_loc_ptr, first_row + lanes, num_rows, BLOCK_M)
        total = tl.sum(row_blocks, axis=0)
    if block >= total:
        return
    before = tl.cumsum(row_blocks, axis=0) <= block
    row = first_row + tl.sum(before.to(tl.int32), axis=0)
    block -= tl.sum(tl.where(before, row_blocks, 0), axis=0)

    query_start = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + row)
    slot = tl.load(row_slots_ptr + row)
    token = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    in_q = (token < query_len)[:, None] & (d < DIM)[None, :]
    query_token = (query_start + token).to(tl.int64)
    q = tl.load(q_ptr + query_token[:, None] * q_stride + head * DIM + d[None, :], mask=in_q, other=0.0)
    first_position = seq_len - query_len + block * BLOCK_M
    position = first_position + tl.arange(0, BLOCK_M)

    # Keys [first_key, stop) are seen by some token of the block, keys [full_begin, full_end) by all of them.
    stop = tl.minimum(first_position + BLOCK_M, seq_len)
    first_key = 0
    full_begin = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_position - WINDOW + 1, 0)
        full_begin = tl.cdiv(tl.maximum(first_position + BLOCK_M - WINDOW, 0), TILE) * TILE
    begin = first_key // TILE * TILE
    full_end = tl.maximum((first_position + 1) // TILE * TILE, begin)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), full_end)

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weights = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    table = block_table_ptr + slot.to(tl.int64) * table_stride
    head_ptr = cache_ptr + (head // GROUP).to(tl.int64) * cache_head_stride
    if WINDOW > 0:
        acc, maximum, weights = _attend_tiles(
            acc, maximum, weights, q, head_ptr, table, begin, full_begin, position, first_key, seq_len, scale, soft_cap,
            cache_block_stride, cache_kv_stride, cache_offset_stride,
            DIM, BLOCK_D, BLOCK_SIZE, WINDOW, SOFT_CAP, TILE, True,
        )  # fmt: skip
    acc, maximum, weights = _attend_tiles(
        acc, maximum, weights, q, head_ptr, table, full_begin, full_end, position, first_key, seq_len, scale, soft_cap,
        cache_block_stride, cache_kv_stride, cache_offset_stride,
        DIM, BLOCK_D, BLOCK_SIZE, WINDOW, SOFT_CAP, TILE, False,
    )  # fmt: skip
    acc, maximum, weights = _attend_tiles(
        acc, maximum, weights, q, head_ptr, table, full_end, stop, position, first_key, seq_len, scale, soft_cap,
        cache_block_stride, cache_kv_stride, cache_offset_stride,
        DIM, BLOCK_D, BLOCK_SIZE, WINDOW, SOFT_CAP, TILE, True,
    )  # fmt: skip

    answer = acc / tl.where(weights > 0.0, weights, 1.0)[:, None]
    out = out_ptr + query_token[:, None] * out_stride + head * DIM + d[None, :]
    tl.store(out, answer.to(out_ptr.dtype.element_ty), mask=in_q)


def _config(dim: int, itemsize: int) -> dict[str, int]:
    """Tile sizes, warps and stages."""
    block_d = triton.next_power_of_2(dim)
    if itemsize == 4:
        # fp32 products run on the ordinary units: small tiles, or the operands do not fit the registers.
        side = 32 if block_d <= 64 else 16
        return {"BLOCK_M": side, "BLOCK_D": block_d, "TILE": side, "num_warps": 4, "num_stages": 2}
    if block_d <= 64:
        return {"BLOCK_M": 128, "BLOCK_D": block_d, "TILE": 64, "num_warps": 4, "num_stages": 3}
    if block_d <= 128:
        # The published shape of FlashAttention-2 on Hopper: two warp groups of 64 rows each.
        return {"BLOCK_M": 128, "BLOCK_D": block_d, "TILE": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_D": block_d, "TILE": 64, "num_warps": 8, "num_stages": 2}


def prefill_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    row_slots: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Causal attention of rows of different query lengths over the pages of their slot, which already hold their
    keys.

    q [T, Hq, D] (rows may be strided); kv_cache [num_blocks, 2, Hkv, block_size, D] of q's dtype; row r's tokens are
    `query_start_loc[r] .. query_start_loc[r + 1]` (relative to q's first) and are the last of its seq_lens[r]
    positions. Visibility, scale and soft_cap as in `decode_attention`. Returns [T, Hq, D]; tokens of no row are left
    undefined.
    """
    num_rows, (tokens, num_q, dim) = row_slots.shape[0], q.shape
    num_kv, block_size = kv_cache.shape[2], kv_cache.shape[3]
    out = torch.empty((tokens, num_q, dim), dtype=q.dtype, device=q.device)
    if num_rows == 0 or tokens == 0:
        return out
    config = _config(dim, q.element_size())
    # Each row wastes at most one block, and none is longer than max_query_len.
    blocks = min(tokens // config["BLOCK_M"] + num_rows, num_rows * triton.cdiv(max_query_len, config["BLOCK_M"]))
    log2_e = 1.4426950408889634
    _prefill_attention_kernel[(num_q, blocks)](
        q,
        kv_cache,
        block_table,
        row_slots,
        query_start_loc,
        seq_lens,
        out,
        scale / soft_cap if soft_cap else scale * log2_e,
        soft_cap * log2_e,
        num_rows,
        q.stride(0),
        out.stride(0),
        block_table.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        kv_cache.stride(3),
        num_q // num_kv,
        dim,
        block_size,
        window,
        soft_cap > 0.0,
        32,
        **config,
        enable_fp_fusion=True,
    )
    return out
