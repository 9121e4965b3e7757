"""Causal attention of rows of many new tokens over paged keys and values, which already hold this
step's: bound by arithmetic.

On Hopper GPUs keys and values of the usual shapes go to `prefill_gluon.py`, codes widened to 16 bits
by `widen.py` as far as its work space goes. The rest is this kernel's. One program takes a block of
a row's new tokens and one query head, and walks the keys those tokens see, cached prefix and new
ones alike, through the block table. Only tiles on the diagonal, or on a window's edge, pay for
masks. The grid is bounded by the number of tokens and rows, so rows of very different lengths cost
no idle programs; each finds its row on the device.

Source: Dao, "FlashAttention-2" (2023), sections 3.1-3.2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.attention.kv_quant import component, part, value_headroom, words
from octavo.kernels.attention.widen import widen, widens, work_space
from octavo.kernels.launch import has_gluon


@triton.jit
def _cap(logits, soft_cap):
    """soft_cap * tanh(logits)."""
    return (2.0 * tl.sigmoid(2.0 * logits) - 1.0) * soft_cap


@triton.jit
def _new_maximum(maximum, tile_maximum, MASKED: tl.constexpr):
    """(the new maximum, what to subtract, what earlier sums are to be multiplied by)."""
    new_maximum = tl.maximum(maximum, tile_maximum)
    if MASKED:
        # A token that has seen nothing yet has no maximum to subtract.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    else:
        shift = new_maximum
    return new_maximum, shift, tl.exp2(maximum - shift)


@triton.jit
def _load_tile(cache, table, start, head_row, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr):
    page = tl.load(table + start // BLOCK_SIZE)
    return cache.load([page, head_row + start % BLOCK_SIZE, 0]).reshape([TILE, DIM])


@triton.jit
def _attend_whole_tiles(
    acc,  # [BLOCK_M, DIM] fp32
    maximum,  # [BLOCK_M] fp32, in log2
    weights,  # [BLOCK_M] fp32
    q,  # [BLOCK_M, DIM]
    cache,  # descriptor of [num_blocks, 2 * Hkv * BLOCK_SIZE, DIM], a tile a load
    table,
    begin,  # multiple of TILE
    end,  # begin and a multiple of 2 * TILE, inside the row
    position,  # [BLOCK_M]
    key_row,
    value_row,
    scale,
    soft_cap,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`_attend_tiles` where whole pairs of tiles belong to the row: fetched by the copy engine,
    without a pointer a number. Two tiles a step share one maximum and one rescaling.
    """
    factor = 1.0 if SOFT_CAP else scale
    for start in tl.range(begin, end, 2 * TILE):
        k0 = _load_tile(cache, table, start, key_row, BLOCK_SIZE, TILE, DIM)
        k1 = _load_tile(cache, table, start + TILE, key_row, BLOCK_SIZE, TILE, DIM)
        logits0 = tl.dot(q, k0.T)
        logits1 = tl.dot(q, k1.T)
        if SOFT_CAP:
            logits0 = _cap(logits0 * scale, soft_cap)
            logits1 = _cap(logits1 * scale, soft_cap)
        if MASKED:
            key = start + tl.arange(0, TILE)
            logits0 = tl.where(_visible(key, position, WINDOW), logits0, float("-inf"))
            logits1 = tl.where(_visible(key + TILE, position, WINDOW), logits1, float("-inf"))
        largest = tl.maximum(tl.max(logits0, axis=1), tl.max(logits1, axis=1)) * factor
        maximum, shift, rescale = _new_maximum(maximum, largest, MASKED)
        p0 = tl.exp2(logits0 * factor - shift[:, None])
        p1 = tl.exp2(logits1 * factor - shift[:, None])
        weights = weights * rescale + tl.sum(p0, axis=1) + tl.sum(p1, axis=1)
        v0 = _load_tile(cache, table, start, value_row, BLOCK_SIZE, TILE, DIM)
        v1 = _load_tile(cache, table, start + TILE, value_row, BLOCK_SIZE, TILE, DIM)
        acc = tl.dot(p0.to(q.dtype), v0, acc * rescale[:, None])
        acc = tl.dot(p1.to(q.dtype), v1, acc)
    return acc, maximum, weights


@triton.jit
def _visible(key, position, WINDOW: tl.constexpr):
    visible = key[None, :] <= position[:, None]
    if WINDOW > 0:
        visible &= key[None, :] > position[:, None] - WINDOW
    return visible


@triton.jit
def _attend_tiles(
    acc,  # [BLOCK_M, BLOCK_W] fp32
    acc1,  # the same of further parts
    acc2,
    acc3,
    maximum,  # [BLOCK_M] fp32, in log2
    weights,  # [BLOCK_M] fp32
    q,  # [BLOCK_M, BLOCK_W]
    q1,
    q2,
    q3,
    head_ptr,
    scales_ptr,
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
    scales_block_stride,
    scales_kv_stride,
    WORDS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FORMAT: tl.constexpr,
    PARTS: tl.constexpr,
    HEADROOM: tl.constexpr,
    ON_GPU: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    n = tl.arange(0, TILE)
    w = tl.arange(0, BLOCK_W)
    # The scale is applied where the maximum is subtracted, one fused multiply-add an element, if
    # nothing else needs it.
    factor = 1.0 if SOFT_CAP or FORMAT != "" else scale
    for start in tl.range(begin, end, TILE):
        key = start + n
        if MASKED:
            # What lies outside the row may be another request's, NaN included: it is never loaded.
            in_row = (key >= first_key) & (key < seq_len)
        else:
            in_row = key >= 0
        if BLOCK_SIZE >= TILE:
            page = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            offset = start % BLOCK_SIZE + n
        else:
            page = tl.load(table + key // BLOCK_SIZE, mask=in_row, other=0).to(tl.int64)
            offset = key % BLOCK_SIZE
        address = page * cache_block_stride + offset * cache_offset_stride
        k_ptr = head_ptr + address[None, :] + w[:, None]
        v_ptr = head_ptr + cache_kv_stride + address[:, None] + w[None, :]
        if MASKED or WORDS < BLOCK_W:
            k = tl.load(k_ptr, mask=in_row[None, :] & (w < WORDS)[:, None], other=0)
        else:
            k = tl.load(k_ptr)
        logits = tl.dot(q, part(k, 0, FORMAT, q.dtype, ON_GPU), input_precision="ieee")
        if PARTS > 1:
            logits = tl.dot(q1, part(k, 1, FORMAT, q.dtype, ON_GPU), logits, input_precision="ieee")
        if PARTS > 2:
            logits = tl.dot(q2, part(k, 2, FORMAT, q.dtype, ON_GPU), logits, input_precision="ieee")
            logits = tl.dot(q3, part(k, 3, FORMAT, q.dtype, ON_GPU), logits, input_precision="ieee")
        if FORMAT != "":
            scales_at = scales_ptr + page * scales_block_stride + offset
            logits *= scale * tl.load(scales_at, mask=in_row, other=0.0)[None, :]
        if SOFT_CAP:
            logits = _cap(logits if FORMAT != "" else logits * scale, soft_cap)
        if MASKED:
            logits = tl.where(in_row[None, :] & _visible(key, position, WINDOW), logits, float("-inf"))
        maximum, shift, rescale = _new_maximum(maximum, tl.max(logits, axis=1) * factor, MASKED)
        probability = tl.exp2(logits * factor - shift[:, None])
        weights = weights * rescale + tl.sum(probability, axis=1)
        acc = acc * rescale[:, None]
        if MASKED or WORDS < BLOCK_W:
            v = tl.load(v_ptr, mask=in_row[:, None] & (w < WORDS)[None, :], other=0)
        else:
            v = tl.load(v_ptr)
        if FORMAT != "":
            v_scales = tl.load(scales_at + scales_kv_stride, mask=in_row, other=0.0)
            probability *= (v_scales * HEADROOM)[None, :]
        p = probability.to(q.dtype)
        acc = tl.dot(p, part(v, 0, FORMAT, q.dtype, ON_GPU), acc, input_precision="ieee")
        if PARTS > 1:
            acc1 = tl.dot(p, part(v, 1, FORMAT, q.dtype, ON_GPU), acc1 * rescale[:, None], input_precision="ieee")
        if PARTS > 2:
            acc2 = tl.dot(p, part(v, 2, FORMAT, q.dtype, ON_GPU), acc2 * rescale[:, None], input_precision="ieee")
            acc3 = tl.dot(p, part(v, 3, FORMAT, q.dtype, ON_GPU), acc3 * rescale[:, None], input_precision="ieee")
    return acc, acc1, acc2, acc3, maximum, weights


@triton.jit
def _row_blocks(query_start_loc_ptr, rows, num_rows, BLOCK_M: tl.constexpr):
    """Blocks of tokens of each of `rows`; 0 for those that there are not."""
    starts = tl.load(query_start_loc_ptr + rows, mask=rows < num_rows, other=0)
    ends = tl.load(query_start_loc_ptr + rows + 1, mask=rows < num_rows, other=0)
    return tl.cdiv(ends - starts, BLOCK_M)


# How many rows there are and where the prefill rows begin changes from step to step. Triton would
# compile a variant for each pattern of their divisibility, while streams wait.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["row_slots_ptr", "query_start_loc_ptr", "seq_lens_ptr", "first_row_ptr"],
)
def _prefill_attention_kernel(
    cache,  # if WHOLE_TILES: descriptor of [num_blocks, 2 * Hkv * BLOCK_SIZE, D], [1, TILE, D] a load
    # pointers
    q_ptr,  # [T, Hq, D]
    cache_ptr,  # [num_blocks, 2, Hkv, BLOCK_SIZE, W]: numbers, or words of PARTS codes
    scales_ptr,  # [num_blocks, 2, Hkv, BLOCK_SIZE] if FORMAT
    block_table_ptr,  # [slots, max_blocks] int32
    row_slots_ptr,  # [R] int32
    query_start_loc_ptr,  # [R + 1] int32
    seq_lens_ptr,  # [R] int32
    first_row_ptr,  # [1] int32 if LATER: earlier rows are not its affair
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
    scales_block_stride,
    scales_kv_stride,
    scales_head_stride,
    # meta-parameters
    GROUP: tl.constexpr,  # query heads a KV head
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FORMAT: tl.constexpr,  # of codes (`kv_quant.py`), or ""
    PARTS: tl.constexpr,  # numbers a word of the cache: 1, 2 or 4
    HEADROOM: tl.constexpr,  # factor of V's scales
    ON_GPU: tl.constexpr,  # may use assembly
    LATER: tl.constexpr,
    WHOLE_TILES: tl.constexpr,  # tiles inside the row come through the descriptor
    ROWS: tl.constexpr,  # rows looked through at a time
    BLOCK_M: tl.constexpr,  # tokens a program
    BLOCK_W: tl.constexpr,  # >= W
    TILE: tl.constexpr,  # keys a tile
):
    WORDS: tl.constexpr = DIM // PARTS
    PAIR: tl.constexpr = 2 * TILE
    head = tl.program_id(0)
    # The last blocks of a row see the most keys: they start first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    lanes = tl.arange(0, ROWS)
    first_row = 0
    if LATER:
        first_row = tl.load(first_row_ptr)
    row_blocks = _row_blocks(query_start_loc_ptr, first_row + lanes, num_rows, BLOCK_M)
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
    w = tl.arange(0, BLOCK_W)
    in_q = (token < query_len)[:, None] & (w < WORDS)[None, :]
    query_token = (query_start + token).to(tl.int64)
    q_row = q_ptr + query_token[:, None] * q_stride + head * DIM
    q = tl.load(q_row + component(w, 0, FORMAT, DIM)[None, :], mask=in_q, other=0.0)
    q1 = q  # of further parts, if there are any
    q2 = q
    q3 = q
    if PARTS > 1:
        q1 = tl.load(q_row + component(w, 1, FORMAT, DIM)[None, :], mask=in_q, other=0.0)
    if PARTS > 2:
        q2 = tl.load(q_row + component(w, 2, FORMAT, DIM)[None, :], mask=in_q, other=0.0)
        q3 = tl.load(q_row + component(w, 3, FORMAT, DIM)[None, :], mask=in_q, other=0.0)
    first_position = seq_len - query_len + block * BLOCK_M
    position = first_position + tl.arange(0, BLOCK_M)

    # Keys [first_key, stop) are seen by some token of the block, keys [full_begin, full_end) by all
    # of them.
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
    acc = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    acc1 = acc
    acc2 = acc
    acc3 = acc
    table = block_table_ptr + slot.to(tl.int64) * table_stride
    head_ptr = cache_ptr + (head // GROUP).to(tl.int64) * cache_head_stride
    head_scales_ptr = scales_ptr + (head // GROUP).to(tl.int64) * scales_head_stride
    if WHOLE_TILES:
        # In pairs from `begin` on. Past the last whole tile of the row its page may hold another
        # request's leftovers.
        whole_end = tl.minimum(tl.cdiv(stop, TILE), seq_len // TILE) * TILE
        whole_end = begin + tl.maximum(whole_end - begin, 0) // PAIR * PAIR
        full_begin = begin + tl.cdiv(full_begin - begin, PAIR) * PAIR
        full_begin = tl.minimum(full_begin, whole_end)
        full_end = tl.maximum(begin + (full_end - begin) // PAIR * PAIR, full_begin)
        key_row = head // GROUP * BLOCK_SIZE
        value_row = (tl.num_programs(0) // GROUP + head // GROUP) * BLOCK_SIZE
        if WINDOW > 0:
            acc, maximum, weights = _attend_whole_tiles(
                acc, maximum, weights, q, cache, table, begin, full_begin, position, key_row, value_row,
                scale, soft_cap, DIM, BLOCK_SIZE, WINDOW, SOFT_CAP, TILE, True,
            )  # fmt: skip
        acc, maximum, weights = _attend_whole_tiles(
            acc, maximum, weights, q, cache, table, full_begin, full_end, position, key_row, value_row,
            scale, soft_cap, DIM, BLOCK_SIZE, WINDOW, SOFT_CAP, TILE, False,
        )  # fmt: skip
        acc, maximum, weights = _attend_whole_tiles(
            acc, maximum, weights, q, cache, table, full_end, whole_end, position, key_row, value_row,
            scale, soft_cap, DIM, BLOCK_SIZE, WINDOW, SOFT_CAP, TILE, True,
        )  # fmt: skip
    else:
        whole_end = full_end
        if WINDOW > 0:
            acc, acc1, acc2, acc3, maximum, weights = _attend_tiles(
                acc, acc1, acc2, acc3, maximum, weights, q, q1, q2, q3, head_ptr, head_scales_ptr, table,
                begin, full_begin, position, first_key, seq_len, scale, soft_cap,
                cache_block_stride, cache_kv_stride, cache_offset_stride, scales_block_stride, scales_kv_stride,
                WORDS, BLOCK_W, BLOCK_SIZE, WINDOW, SOFT_CAP, FORMAT, PARTS, HEADROOM, ON_GPU, TILE, True,
            )  # fmt: skip
        acc, acc1, acc2, acc3, maximum, weights = _attend_tiles(
            acc, acc1, acc2, acc3, maximum, weights, q, q1, q2, q3, head_ptr, head_scales_ptr, table,
            full_begin, full_end, position, first_key, seq_len, scale, soft_cap,
            cache_block_stride, cache_kv_stride, cache_offset_stride, scales_block_stride, scales_kv_stride,
            WORDS, BLOCK_W, BLOCK_SIZE, WINDOW, SOFT_CAP, FORMAT, PARTS, HEADROOM, ON_GPU, TILE, False,
        )  # fmt: skip
    acc, acc1, acc2, acc3, maximum, weights = _attend_tiles(
        acc, acc1, acc2, acc3, maximum, weights, q, q1, q2, q3, head_ptr, head_scales_ptr, table,
        whole_end, stop, position, first_key, seq_len, scale, soft_cap,
        cache_block_stride, cache_kv_stride, cache_offset_stride, scales_block_stride, scales_kv_stride,
        WORDS, BLOCK_W, BLOCK_SIZE, WINDOW, SOFT_CAP, FORMAT, PARTS, HEADROOM, ON_GPU, TILE, True,
    )  # fmt: skip

    divisor = tl.where(weights > 0.0, weights * HEADROOM, 1.0)[:, None]
    out = out_ptr + query_token[:, None] * out_stride + head * DIM
    dtype = out_ptr.dtype.element_ty
    tl.store(out + component(w, 0, FORMAT, DIM)[None, :], (acc / divisor).to(dtype), mask=in_q)
    if PARTS > 1:
        tl.store(out + component(w, 1, FORMAT, DIM)[None, :], (acc1 / divisor).to(dtype), mask=in_q)
    if PARTS > 2:
        tl.store(out + component(w, 2, FORMAT, DIM)[None, :], (acc2 / divisor).to(dtype), mask=in_q)
        tl.store(out + component(w, 3, FORMAT, DIM)[None, :], (acc3 / divisor).to(dtype), mask=in_q)


def _config(dim: int, parts: int, itemsize: int) -> dict[str, int]:
    """Tile sizes, warps and stages. parts: numbers a word of the cache; itemsize: of q."""
    block_w = max(16, triton.next_power_of_2(dim // parts))
    block_d = block_w * parts
    if itemsize == 4:
        # fp32 products run on the ordinary units: small tiles, or the operands do not fit the
        # registers.
        side = 32 if block_d <= 64 else 16
        return {"BLOCK_M": side, "BLOCK_W": block_w, "TILE": side, "num_warps": 4, "num_stages": 2}
    if block_d <= 64:
        return {"BLOCK_M": 128, "BLOCK_W": block_w, "TILE": 64, "num_warps": 4, "num_stages": 3}
    if block_d <= 128:
        # The published shape of FlashAttention-2 on Hopper: two warp groups of 64 rows each.
        return {"BLOCK_M": 128, "BLOCK_W": block_w, "TILE": 64, "num_warps": 8, "num_stages": 3}
    # Two tiles a step, of keys and of values, two deep: 64 keys of 16 bits a tile would not fit the
    # shared memory. Codes that are unpacked in registers leave room for half as many tokens.
    return {"BLOCK_M": 128 if parts == 1 else 64, "BLOCK_W": block_w, "TILE": 32, "num_warps": 8, "num_stages": 2}


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
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of rows of different query lengths over the pages of their slot, which
    already hold their keys.

    q [T, Hq, D] (rows may be strided); kv_cache [num_blocks, 2, Hkv, block_size, D] of q's dtype,
    or codes with their kv_scales [num_blocks, 2, Hkv, block_size] (formats: `kv_quant.py`); row r's
    tokens are `query_start_loc[r] .. query_start_loc[r + 1]` (relative to q's first) and are the
    last of its seq_lens[r] positions. Visibility, scale and soft_cap as in `decode_attention`.
    Returns [T, Hq, D]; tokens of no row are left undefined.
    """
    num_rows, (tokens, num_q, dim) = row_slots.shape[0], q.shape
    num_kv, block_size = kv_cache.shape[2], kv_cache.shape[3]
    if num_rows == 0 or tokens == 0:
        return torch.empty((tokens, num_q, dim), dtype=q.dtype, device=q.device)
    out, first_row = None, None
    if soft_cap == 0.0 and has_gluon(q.device):
        from octavo.kernels.attention import prefill_gluon

        rows = (row_slots, query_start_loc, seq_lens)
        settings = (max_query_len, scale, window)
        if kv_scales is None and prefill_gluon.fits(q, kv_cache):
            return prefill_gluon.prefill_attention(q, kv_cache, block_table, *rows, *settings)
        if kv_scales is not None and prefill_gluon.fits_queries(q, block_size) and widens(kv_cache, kv_scales):
            room, is_enough = work_space(tokens, num_rows, block_table.shape[1], num_kv, block_size, dim)
            pages, table, fitting = widen(kv_cache, kv_scales, block_table, *rows, window, q.dtype, room)
            out = prefill_gluon.prefill_attention(q, pages, table, *rows, *settings, fitting)
            if is_enough:
                return out
            first_row = fitting
    if out is None:
        out = torch.empty((tokens, num_q, dim), dtype=q.dtype, device=q.device)
    headroom = value_headroom(q.dtype, kv_cache.dtype)
    kv_cache, kv_format, parts = words(kv_cache)
    scales = q if kv_scales is None else kv_scales
    config = _config(dim, parts, q.element_size())
    # Each row wastes at most one block, and none is longer than max_query_len.
    blocks = min(tokens // config["BLOCK_M"] + num_rows, num_rows * triton.cdiv(max_query_len, config["BLOCK_M"]))
    whole_tiles = (
        not kv_format
        and q.element_size() == 2
        and dim == config["BLOCK_W"]
        and block_size % config["TILE"] == 0
        and kv_cache[0].is_contiguous()
        and kv_cache.stride(0) % 8 == 0
    )
    descriptor = None
    if whole_tiles:
        shape, strides = [kv_cache.shape[0], 2 * num_kv * block_size, dim], [kv_cache.stride(0), dim, 1]
        descriptor = TensorDescriptor(kv_cache, shape, strides, [1, config["TILE"], dim])
    log2_e = 1.4426950408889634
    _prefill_attention_kernel[(num_q, blocks)](
        descriptor,
        q,
        kv_cache,
        scales,
        block_table,
        row_slots,
        query_start_loc,
        seq_lens,
        seq_lens if first_row is None else first_row,  # any pointer
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
        scales.stride(0),
        scales.stride(1),
        scales.stride(2),
        num_q // num_kv,
        dim,
        block_size,
        window,
        soft_cap > 0.0,
        kv_format,
        parts,
        headroom,
        not q.is_cpu,
        first_row is not None,
        whole_tiles,
        32,
        **config,
        enable_fp_fusion=True,
    )
    return out
