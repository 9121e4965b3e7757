"""Attention of rows with a few new tokens each (1-8) over paged keys and values: split over the keys, bound by
memory.

The keys of all rows and heads form one line of tiles. A fixed number of programs takes equal stretches of it, found
on the device from the real lengths, so the grid depends on nothing that a captured graph would freeze, and one very
long row is shared by as many programs as its weight. A *unit* is one row and one KV head: its query heads (times its
new tokens) are the columns of one product, so K and V are read once. Where lengths differ, a unit has places in the
line also for what it costs to begin one: else the programs with the shortest rows would end last. A stretch that holds
a whole unit writes the answer; pieces of a unit go to scratch, and the program that arrives last adds them up. Where
programs may start while the kernel before still runs, they find their stretch and fetch its first tile into the L2
meanwhile.

Keys are the products' rows and queries their columns, since a product has 16 rows at least but only 8 columns: GQA's
few query heads pad little. With up to 8 of them each warp has keys, a maximum and sums of its own, and warps meet only
to fetch a tile and at a stretch's end.

Sources: Dao et al., "Flash-Decoding" (2023), for the split and its merge; Osama et al., "Stream-K" (2023), for the
line.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.arrivals import MAX_ARRIVALS, arrivals
from octavo.kernels.attention.kv_quant import component, part, value_headroom, words
from octavo.kernels.launch import has_pdl, let_successor_start, wait_for_inputs


@triton.jit
def _row_tiles(seq_len, QUERY_LEN: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """The first tile that a row needs, and how many."""
    first = tl.zeros_like(seq_len)
    if WINDOW > 0:
        first = tl.maximum(seq_len - QUERY_LEN + 1 - WINDOW, 0) // TILE
    return first, tl.cdiv(seq_len, TILE) - first


@triton.jit
def _active_programs(total, units, equal, programs, PER_SM: tl.constexpr, LEAST: tl.constexpr):
    """How many of the programs share a line of length `total` with `units` units."""
    # LEAST tiles each at least, if that leaves no multiprocessor idle: each piece costs the merge.
    active = tl.maximum(tl.minimum(programs, total // LEAST), tl.minimum(programs // PER_SM, tl.maximum(total, 1)))
    # Units of equal lengths: whole ones, or whole fractions of one, if that takes few programs away. Then no program
    # has two pieces, or none at all.
    even = tl.where(units > active, tl.cdiv(units, tl.cdiv(units, active)), active // units * units)
    return tl.where(equal & (even * 16 >= active * 15), even, active)


@triton.jit
def _stretch_begin(program, quota, extra):
    """Where a program's stretch begins: `quota` places each, and one more in each of the first `extra` programs."""
    return program * quota + tl.minimum(program, extra)


@triton.jit
def _owner(place, quota, extra):
    """The program whose stretch a place is in."""
    longer = extra * (quota + 1)
    return tl.where(place < longer, place // (quota + 1), extra + (place - longer) // quota)


@triton.jit
def _find_stretch(
    seq_lens_ptr,
    row_slots_ptr,
    num_rows,
    BLOCK_R: tl.constexpr,  # >= num_rows
    QUERY_LEN: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    UNITS: tl.constexpr,
    PER_SM: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT_COST: tl.constexpr,
):
    """The program's stretch of the line (begin, end), how stretches are dealt out (quota, extra), how many places a
    unit has before its tiles, the row that the stretch begins in (with its beginning, length and slot), and whether
    there are rows of no keys.
    """
    rows = tl.arange(0, BLOCK_R)
    # `.cg`: read before the wait for the predecessor, so not from an L1 that may still hold the last step's.
    seq_lens = tl.load(seq_lens_ptr + rows, mask=rows < num_rows, other=0, cache_modifier=".cg")
    slots = tl.load(row_slots_ptr + rows, mask=rows < num_rows, other=0, cache_modifier=".cg")
    _, row_tiles = _row_tiles(seq_lens, QUERY_LEN, WINDOW, TILE)
    has_keys = (row_tiles > 0).to(tl.int32)
    num_filled = tl.sum(has_keys, axis=0)
    # Equal units are dealt out by their tiles alone.
    equal = tl.sum(row_tiles, axis=0) == num_filled * tl.max(row_tiles, axis=0)
    lead = tl.where(equal, 0, UNIT_COST)
    unit_places = (row_tiles + lead) * has_keys
    row_ends = tl.cumsum(unit_places * UNITS, axis=0)
    total = tl.max(row_ends, axis=0)
    active = _active_programs(total, tl.maximum(num_filled * UNITS, 1), equal, tl.num_programs(0), PER_SM, LEAST)
    quota = total // active
    extra = total % active
    program = tl.program_id(0)
    begin = _stretch_begin(tl.minimum(program, active), quota, extra)
    end = _stretch_begin(tl.minimum(program + 1, active), quota, extra)
    # Past the end of the line there is no such row, and nothing follows.
    row_begins = row_ends - unit_places * UNITS
    mine = (row_begins <= begin) & (begin < row_ends)
    row = tl.sum(tl.where(mine, rows, 0), axis=0)
    row_begin = tl.sum(tl.where(mine, row_begins, 0), axis=0)
    seq_len = tl.sum(tl.where(mine, seq_lens, 0), axis=0)
    slot = tl.sum(tl.where(mine, slots, 0), axis=0)
    return begin, end, quota, extra, lead, row, row_begin, seq_len, slot, num_filled < num_rows


@triton.jit
def _sum_of_warps(x):
    """Adds up [4, ...], one part a warp. Split off at the end, where one thread gets all four parts; a reduction would
    take them through shared memory twice.
    """
    if len(x.shape) == 3:
        x = tl.reshape(tl.permute(x, (1, 2, 0)), (x.shape[1], x.shape[2], 2, 2))
    else:
        x = tl.reshape(tl.permute(x, (1, 0)), (x.shape[1], 2, 2))
    even, odd = tl.split(x)
    low, high = tl.split(even + odd)
    return low + high


@triton.jit
def _fetch_to_l2(pointers, mask):
    """Asks for the cache lines that pointers point into to come to the L2."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [pointers, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _fetch_tile(
    head_ptr,  # of the cache: the KV head's
    table,  # the row's
    first_key,
    seq_len,
    cache_block_stride,
    cache_kv_stride,
    BLOCK_SIZE: tl.constexpr,
    OFFSET_STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Asks for a tile of K and V to come to the L2."""
    LINE: tl.constexpr = 128 * 8 // head_ptr.dtype.element_ty.primitive_bitwidth  # words
    key = first_key + tl.arange(0, TILE)
    in_row = key < seq_len
    page = tl.load(table + key // BLOCK_SIZE, mask=in_row, other=0, cache_modifier=".cg").to(tl.int64)
    words = head_ptr + page * cache_block_stride + key % BLOCK_SIZE * OFFSET_STRIDE
    for word in tl.static_range(0, WORDS, LINE):
        _fetch_to_l2(words + word, in_row)
        _fetch_to_l2(words + cache_kv_stride + word, in_row)


@triton.jit
def _write_zeros(seq_lens_ptr, out_ptr, num_rows, ROW: tl.constexpr):
    """The answers of rows of no keys, which have no place in the line: program after program writes one row."""
    BLOCK: tl.constexpr = 1024
    row = tl.program_id(0).to(tl.int64)
    while row < num_rows:
        if tl.load(seq_lens_ptr + row) == 0:
            for start in range(0, ROW, BLOCK):
                place = start + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
                tl.store(out_ptr + row * ROW + place, zeros, mask=place < ROW)
        row += tl.num_programs(0)


@triton.jit
def _load_queries(q_row, w, PART: tl.constexpr, in_q, FORMAT: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """The components of query rows that go with part PART of words `w`: [words, rows], once a split."""
    q = tl.load(q_row[None, :] + component(w, PART, FORMAT, DIM)[:, None], mask=in_q, other=0.0)
    if SPLITS > 1:
        q = tl.broadcast_to(q[None, :, :], (SPLITS, q.shape[0], q.shape[1]))
    return q


@triton.jit(do_not_specialize=["num_rows"])  # it changes from step to step: nothing may be compiled for it
def _decode_attention_kernel(
    # pointers
    q_ptr,  # [R * QUERY_LEN, Hq, D]
    cache_ptr,  # [num_blocks, 2, Hkv, BLOCK_SIZE, W]: numbers, or words of PARTS codes
    scales_ptr,  # [num_blocks, 2, Hkv, BLOCK_SIZE] if FORMAT
    block_table_ptr,  # [slots, max_blocks] int32
    row_slots_ptr,  # [R] int32
    seq_lens_ptr,  # [R] int32
    out_ptr,  # [R * QUERY_LEN, Hq, D]
    partial_ptr,  # [2 * programs, BLOCK_PARTIAL, PARTS * BLOCK_W] fp32: unnormalised sums
    partial_stats_ptr,  # [2 * programs, 2, BLOCK_PARTIAL] fp32: maximum (log2) and sum of weights
    arrivals_ptr,  # [R * units a row] int32, all zero before and after
    scale,  # log2(e) / sqrt(D), or with SOFT_CAP the plain scale / cap
    soft_cap,  # cap * log2(e)
    # dimensions and strides, in elements
    num_rows,
    q_stride,
    table_stride,
    cache_block_stride,
    cache_kv_stride,
    cache_head_stride,
    scales_block_stride,
    scales_kv_stride,
    scales_head_stride,
    # meta-parameters
    QUERY_LEN: tl.constexpr,
    GROUP: tl.constexpr,  # query heads a KV head
    NUM_KV: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    OFFSET_STRIDE: tl.constexpr,  # of the cache: known when compiling, it goes into the load instructions
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FORMAT: tl.constexpr,  # of codes (`kv_quant.py`), or ""
    PARTS: tl.constexpr,  # numbers a word of the cache: 1, 2 or 4
    HEADROOM: tl.constexpr,  # factor of V's scales
    ON_GPU: tl.constexpr,  # may use assembly
    PDL: tl.constexpr,  # starts while its predecessor ends, and lets its successor do so
    BLOCK_R: tl.constexpr,  # a power of two >= R
    SPLITS: tl.constexpr,  # groups of warps with keys of their own: num_warps, or 1
    BLOCK_M: tl.constexpr,  # query rows a unit, padded for the matrix unit
    BLOCK_PARTIAL: tl.constexpr,  # the same, padded to a power of two only
    BLOCK_W: tl.constexpr,  # >= W
    TILE: tl.constexpr,  # keys a tile
    MERGE: tl.constexpr,  # pieces merged at a time
    PER_SM: tl.constexpr,  # programs a multiprocessor
    LEAST_KEYS: tl.constexpr,
    UNIT_COST: tl.constexpr,  # of a unit, in tiles
):
    QUERY_ROWS: tl.constexpr = QUERY_LEN * GROUP
    M_CHUNKS: tl.constexpr = (QUERY_ROWS + BLOCK_M - 1) // BLOCK_M
    UNITS: tl.constexpr = NUM_KV * M_CHUNKS  # a row
    WORDS: tl.constexpr = DIM // PARTS
    BLOCK_D: tl.constexpr = PARTS * BLOCK_W
    program = tl.program_id(0)

    # My stretch of the line, and the row it begins in. Few rows fit into the lanes of each warp, where their sums take
    # no barrier; how many there are changes from step to step, so it is no reason to compile anything.
    LEAST: tl.constexpr = LEAST_KEYS // TILE
    if num_rows <= 32:
        place, end, quota, extra, lead, row, row_begin, seq_len, slot, has_empty = _find_stretch(
            seq_lens_ptr, row_slots_ptr, num_rows, 32, QUERY_LEN, WINDOW, TILE, UNITS, PER_SM, LEAST, UNIT_COST
        )
    else:
        place, end, quota, extra, lead, row, row_begin, seq_len, slot, has_empty = _find_stretch(
            seq_lens_ptr, row_slots_ptr, num_rows, BLOCK_R, QUERY_LEN, WINDOW, TILE, UNITS, PER_SM, LEAST, UNIT_COST
        )
    if PDL:
        # Nearly all keys are old: the first ones are on their way while the predecessor writes the newest.
        first_tile, num_tiles = _row_tiles(seq_len, QUERY_LEN, WINDOW, TILE)
        unit_places = tl.maximum(num_tiles + lead, 1)
        tile = first_tile + tl.maximum((place - row_begin) % unit_places - lead, 0)
        _fetch_tile(
            cache_ptr + ((place - row_begin) // unit_places // M_CHUNKS).to(tl.int64) * cache_head_stride,
            block_table_ptr + slot.to(tl.int64) * table_stride,
            tile * TILE,
            seq_len,
            cache_block_stride,
            cache_kv_stride,
            BLOCK_SIZE,
            OFFSET_STRIDE,
            WORDS,
            TILE,
        )
    wait_for_inputs(PDL)
    let_successor_start(PDL)
    if has_empty:
        _write_zeros(seq_lens_ptr, out_ptr, num_rows, QUERY_LEN * NUM_KV * GROUP * DIM)

    m = tl.arange(0, BLOCK_M)
    w = tl.arange(0, BLOCK_W)
    in_width = w < WORDS
    # From here on what has to do with keys has a leading dimension of SPLITS, if that is not 1: each warp has keys,
    # sums and a maximum of its own, and nothing passes between warps until all tiles are done.
    SUB_TILE: tl.constexpr = TILE // SPLITS
    n = tl.arange(0, SUB_TILE)
    if SPLITS > 1:
        n = (tl.arange(0, SPLITS) * SUB_TILE)[:, None] + n[None, :]
    while place < end:
        first_tile, num_tiles = _row_tiles(seq_len, QUERY_LEN, WINDOW, TILE)
        unit = (place - row_begin) // (num_tiles + lead)
        # Where the unit's tiles begin and end in the line, and which of them are mine: none if my stretch ends before.
        unit_begin = row_begin + unit * (num_tiles + lead) + lead
        unit_end = unit_begin + num_tiles
        first_place = tl.maximum(place, unit_begin)
        here = tl.maximum(tl.minimum(unit_end, end) - first_place, 0)
        kv_head = unit // M_CHUNKS

        query_row = (unit % M_CHUNKS) * BLOCK_M + m
        query_token = row.to(tl.int64) * QUERY_LEN + query_row // GROUP
        query_head = kv_head * GROUP + query_row % GROUP
        in_q = in_width[:, None] & (query_row < QUERY_ROWS)
        q_row = q_ptr + (query_token * q_stride + query_head * DIM)
        q = _load_queries(q_row, w, 0, in_q, FORMAT, DIM, SPLITS)
        if PARTS > 1:
            q1 = _load_queries(q_row, w, 1, in_q, FORMAT, DIM, SPLITS)
        if PARTS > 2:
            q2 = _load_queries(q_row, w, 2, in_q, FORMAT, DIM, SPLITS)
            q3 = _load_queries(q_row, w, 3, in_q, FORMAT, DIM, SPLITS)
        position = seq_len - QUERY_LEN + query_row // GROUP
        first_key = 0
        if WINDOW > 0:
            first_key = tl.maximum(seq_len - QUERY_LEN + 1 - WINDOW, 0)

        if SPLITS > 1:
            maximum = tl.full((SPLITS, BLOCK_M), float("-inf"), tl.float32)
            weights = tl.zeros((SPLITS, BLOCK_M), tl.float32)
            acc = tl.zeros((SPLITS, BLOCK_W, BLOCK_M), tl.float32)
        else:
            maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            weights = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_W, BLOCK_M), tl.float32)
        acc1 = acc  # of further parts, if there are any
        acc2 = acc
        acc3 = acc
        table = block_table_ptr + slot.to(tl.int64) * table_stride
        head_ptr = cache_ptr + kv_head.to(tl.int64) * cache_head_stride
        head_scales_ptr = scales_ptr + kv_head.to(tl.int64) * scales_head_stride
        key_begin = (first_tile + first_place - unit_begin) * TILE
        for start in tl.range(key_begin, key_begin + here * TILE, TILE):
            key = start + n
            # What lies outside the row may be another request's, NaN included: it is never loaded.
            in_row = key < seq_len
            if WINDOW > 0:
                in_row &= key >= first_key
            # The keys' addresses: from where on (once a tile, a warp or a key), and how many keys further.
            if BLOCK_SIZE % TILE == 0:
                # The tile lies in one page. A row of no keys reads its table's first entry and nothing else.
                page = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
                offset = start % BLOCK_SIZE
                further = n
            elif SPLITS > 1 and BLOCK_SIZE % SUB_TILE == 0:
                # A warp's keys lie in one page.
                first = start + tl.arange(0, SPLITS) * SUB_TILE
                page = tl.load(table + first // BLOCK_SIZE, mask=first < seq_len, other=0).to(tl.int64)[:, None]
                offset = (first % BLOCK_SIZE)[:, None]
                further = tl.arange(0, SUB_TILE)[None, :]
            else:
                page = tl.load(table + key // BLOCK_SIZE, mask=in_row, other=0).to(tl.int64)
                offset = key % BLOCK_SIZE
                further = tl.zeros_like(key)
            from_key = head_ptr + (page * cache_block_stride + offset * OFFSET_STRIDE)
            from_value = from_key + cache_kv_stride
            from_scale = head_scales_ptr + (page * scales_block_stride + offset)
            if BLOCK_SIZE % TILE != 0:
                from_key = tl.expand_dims(from_key, -1)
                from_value = tl.expand_dims(from_value, -2)
            k = tl.load(
                from_key + (tl.expand_dims(further * OFFSET_STRIDE, -1) + w),
                mask=tl.expand_dims(in_row, -1) & in_width,
                other=0,
            )
            logits = tl.dot(part(k, 0, FORMAT, q.dtype, ON_GPU), q, input_precision="ieee")
            if PARTS > 1:
                logits = tl.dot(part(k, 1, FORMAT, q.dtype, ON_GPU), q1, logits, input_precision="ieee")
            if PARTS > 2:
                logits = tl.dot(part(k, 2, FORMAT, q.dtype, ON_GPU), q2, logits, input_precision="ieee")
                logits = tl.dot(part(k, 3, FORMAT, q.dtype, ON_GPU), q3, logits, input_precision="ieee")
            if FORMAT != "":
                k_scales = tl.load(from_scale + further, mask=in_row, other=0.0)
                logits *= tl.expand_dims(scale * k_scales, -1)
            else:
                logits *= scale
            if SOFT_CAP:
                logits = (2.0 * tl.sigmoid(2.0 * logits) - 1.0) * soft_cap
            visible = tl.expand_dims(in_row, -1)
            if QUERY_LEN > 1:
                visible &= tl.expand_dims(key, -1) <= position
                if WINDOW > 0:
                    visible &= tl.expand_dims(key, -1) > position - WINDOW
            logits = tl.where(visible, logits, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(logits, axis=-2))
            # A row that has seen nothing yet has no maximum to subtract.
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            probability = tl.exp2(logits - tl.expand_dims(shift, -2))
            rescale = tl.exp2(maximum - shift)
            weights = weights * rescale + tl.sum(probability, axis=-2)
            maximum = new_maximum
            v = tl.load(
                from_value + (tl.expand_dims(further * OFFSET_STRIDE, -2) + w[:, None]),
                mask=tl.expand_dims(in_row, -2) & in_width[:, None],
                other=0,
            )
            if FORMAT != "":
                v_scales = tl.load(from_scale + scales_kv_stride + further, mask=in_row, other=0.0)
                probability *= tl.expand_dims(v_scales * HEADROOM, -1)
            p = probability.to(q.dtype)
            factor = tl.expand_dims(rescale, -2)
            acc = tl.dot(part(v, 0, FORMAT, q.dtype, ON_GPU), p, acc * factor, input_precision="ieee")
            if PARTS > 1:
                acc1 = tl.dot(part(v, 1, FORMAT, q.dtype, ON_GPU), p, acc1 * factor, input_precision="ieee")
            if PARTS > 2:
                acc2 = tl.dot(part(v, 2, FORMAT, q.dtype, ON_GPU), p, acc2 * factor, input_precision="ieee")
                acc3 = tl.dot(part(v, 3, FORMAT, q.dtype, ON_GPU), p, acc3 * factor, input_precision="ieee")

        if SPLITS > 1:
            split_maximum = maximum
            maximum = tl.max(split_maximum, axis=0)
            shift = tl.where(maximum == float("-inf"), 0.0, maximum)
            factor = tl.exp2(split_maximum - shift[None, :])
            weights = _sum_of_warps(weights * factor)
            acc = _sum_of_warps(acc * factor[:, None, :])
            if PARTS > 1:
                acc1 = _sum_of_warps(acc1 * factor[:, None, :])
            if PARTS > 2:
                acc2 = _sum_of_warps(acc2 * factor[:, None, :])
                acc3 = _sum_of_warps(acc3 * factor[:, None, :])
        weights *= HEADROOM
        if here == num_tiles:
            divisor = tl.where(weights > 0.0, weights, 1.0)[None, :]
            out = out_ptr + (query_token * (NUM_KV * GROUP) + query_head) * DIM
            dtype = out_ptr.dtype.element_ty
            tl.store(out[None, :] + component(w, 0, FORMAT, DIM)[:, None], (acc / divisor).to(dtype), mask=in_q)
            if PARTS > 1:
                tl.store(out[None, :] + component(w, 1, FORMAT, DIM)[:, None], (acc1 / divisor).to(dtype), mask=in_q)
            if PARTS > 2:
                tl.store(out[None, :] + component(w, 2, FORMAT, DIM)[:, None], (acc2 / divisor).to(dtype), mask=in_q)
                tl.store(out[None, :] + component(w, 3, FORMAT, DIM)[:, None], (acc3 / divisor).to(dtype), mask=in_q)
        elif here > 0:
            # Piece 0 of a program begins where the program does; the other one ends where it does.
            piece = 2 * program + (place > _stretch_begin(program, quota, extra)).to(tl.int32)
            in_partial = m < BLOCK_PARTIAL
            sums = partial_ptr + (piece * BLOCK_PARTIAL + m)[None, :] * BLOCK_D + w[:, None]
            tl.store(sums, acc, mask=in_partial[None, :])
            if PARTS > 1:
                tl.store(sums + BLOCK_W, acc1, mask=in_partial[None, :])
            if PARTS > 2:
                tl.store(sums + 2 * BLOCK_W, acc2, mask=in_partial[None, :])
                tl.store(sums + 3 * BLOCK_W, acc3, mask=in_partial[None, :])
            tl.store(partial_stats_ptr + piece * (2 * BLOCK_PARTIAL) + m, maximum, mask=in_partial)
            tl.store(partial_stats_ptr + piece * (2 * BLOCK_PARTIAL) + BLOCK_PARTIAL + m, weights, mask=in_partial)
            first_program = _owner(unit_begin, quota, extra)
            pieces = _owner(unit_end - 1, quota, extra) - first_program + 1
            # All threads' stores come before the one thread's release; its acquire comes before all threads' loads.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + row * UNITS + unit, 1, sem="acq_rel", scope="gpu")
            tl.debug_barrier()
            if arrived == pieces - 1:
                tl.store(arrivals_ptr + row * UNITS + unit, 0)
                _merge_pieces(
                    partial_ptr,
                    partial_stats_ptr,
                    out_ptr,
                    first_program,
                    pieces,
                    (unit_begin - lead > _stretch_begin(first_program, quota, extra)).to(tl.int32),
                    row,
                    unit,
                    QUERY_LEN,
                    GROUP,
                    NUM_KV,
                    DIM,
                    FORMAT,
                    PARTS,
                    BLOCK_M,
                    M_CHUNKS,
                    BLOCK_PARTIAL,
                    BLOCK_W,
                    MERGE,
                )
        place = tl.minimum(unit_end, end)
        if (unit == UNITS - 1) & (place == unit_end):
            row_begin = place
            seq_len = tl.zeros_like(seq_len)
            while (seq_len == 0) & (place < end):
                row += 1
                seq_len = tl.load(seq_lens_ptr + row)
            slot = tl.load(row_slots_ptr + row, mask=place < end, other=0)


@triton.jit
def _merge_pieces(
    partial_ptr,
    partial_stats_ptr,
    out_ptr,
    first_program,
    pieces,
    first_is_second,  # 1 if the first program's piece is its second one
    row,
    unit,
    QUERY_LEN: tl.constexpr,
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
    # One stage: loads go straight to registers, where staging them in shared memory would only add latency. Rows come
    # first, then pieces: so warps divide the rows, and each thread adds up what it has loaded.
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
    query_token = row.to(tl.int64) * QUERY_LEN + query_row // GROUP
    query_head = (unit // M_CHUNKS) * GROUP + query_row % GROUP
    inside = (query_row < QUERY_LEN * GROUP)[:, None] & (d % BLOCK_W < DIM // PARTS)[None, :]
    # Sums lie part by part.
    position = component(d % BLOCK_W, d // BLOCK_W, FORMAT, DIM)
    out = out_ptr + (query_token * (NUM_KV * GROUP) + query_head)[:, None] * DIM + position[None, :]
    tl.store(out, answer.to(out_ptr.dtype.element_ty), mask=inside)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter, which runs programs one after another, few; but enough that rows are both split and shared.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _config(query_rows: int, dim: int, parts: int, itemsize: int) -> dict[str, int]:
    """Tile sizes, warps and stages. query_rows = query_len * group; itemsize: of a word of the cache."""
    block_w = max(16, triton.next_power_of_2(dim // parts))
    block_d = block_w * parts
    # The accumulator is BLOCK_M x BLOCK_D fp32: 64 x 128 is 64 registers a thread of 4 warps, as much as leaves room
    # for the rest; a unit with more query rows is cut and its K and V read twice.
    block_m = min(64 if block_d <= 128 else 32, max(8, triton.next_power_of_2(query_rows)))
    block_partial = min(block_m, triton.next_power_of_2(query_rows))
    # A tile of K and V is 32 KiB at most, and two are buffered: two programs a multiprocessor hold 128 KiB, and 64 or
    # more are in flight, thrice what latency x bandwidth (1 us x 23 GB/s a multiprocessor) asks for. 4 bits take more
    # keys a tile, since a tile has costs of its own; 8 bits do not gain by it (8x4k: 31 us with 64 keys, 36 with 128).
    tile = max(16, min(64 if parts <= 2 else 128, 16384 // (block_w * itemsize)))
    if itemsize == 4 and block_m >= 16:
        tile = 16  # products of 32-bit numbers hold all their operands in registers
    # Four warps with sums of their own, if they fit into registers; a product has 16 keys at least.
    split = itemsize == 2 and block_m == 8 and block_d <= 256 and tile >= 64
    # 128 registers a thread of pieces in flight while merging; 32 where the sums or the keys take more.
    merged = 16384 if block_partial <= 8 and itemsize <= 2 else 4096
    return {
        "BLOCK_M": block_m,
        "SPLITS": 4 if split else 1,
        "BLOCK_PARTIAL": block_partial,
        "BLOCK_W": block_w,
        "TILE": tile,
        "MERGE": max(1, min(32, merged // (block_partial * block_d))),
        # One's loads run while another starts a unit or merges.
        "PER_SM": 2,
        "LEAST_KEYS": 256,
        # With none, 256 rows of a chat take 543 us instead of 484, 32 of them 99 instead of 73; 1 to 4 differ little.
        # Measured in bf16, with 64 keys a tile.
        "UNIT_COST": 2,
        "num_warps": 4,
        # 3 would leave one buffer of K and V: the look-up of their page takes stages of its own in front of theirs.
        "num_stages": 5,
    }


def decode_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    row_slots: Tensor,
    seq_lens: Tensor,
    query_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Attention of rows that bring `query_len` new tokens each, over the pages of their slot.

    q [R * query_len, Hq, D] (rows may be strided), row by row; kv_cache [num_blocks, 2, Hkv, block_size, D] of q's
    dtype, or codes with their kv_scales [num_blocks, 2, Hkv, block_size] (formats: `kv_quant.py`); block_table
    [slots, max_blocks] int32; row_slots, seq_lens [R] int32. Token j of a row sits at position
    `seq_len - query_len + j` and sees keys `max(0, position - window + 1) .. position` (window 0: from 0). logits =
    scale * q @ k, then soft_cap * tanh(logits / soft_cap) if soft_cap > 0. Returns [R * query_len, Hq, D]; a token
    that sees nothing gets zeros. Launches of one device must be on one stream: they share counters. Call it once
    before capturing it in a graph, so that the counters exist. block_table, row_slots and seq_lens are read before
    earlier launches have ended (`launch.py`): nothing may write them shortly before. In a step that is `prepare`, many
    launches back.

    Raises ValueError if rows x KV heads exceed 65536 units.
    """
    num_rows, num_q, dim = row_slots.shape[0], q.shape[1], q.shape[2]
    num_kv, block_size = kv_cache.shape[2], kv_cache.shape[3]
    out = torch.empty((q.shape[0], num_q, dim), dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    group = num_q // num_kv
    headroom = value_headroom(q.dtype, kv_cache.dtype)
    kv_cache, kv_format, parts = words(kv_cache)
    scales = q if kv_scales is None else kv_scales
    pdl = has_pdl(q.device)
    config = _config(query_len * group, dim, parts, kv_cache.element_size())
    units = num_rows * num_kv * triton.cdiv(query_len * group, config["BLOCK_M"])
    if units > MAX_ARRIVALS:
        raise ValueError(
            f"decode_attention: {units} units (rows x KV heads) exceed {MAX_ARRIVALS}; use fewer rows a step"
        )
    programs = config["PER_SM"] * _multiprocessors(q.device)
    pieces = (2 * programs, config["BLOCK_PARTIAL"])
    partial = torch.empty((*pieces, parts * config["BLOCK_W"]), dtype=torch.float32, device=q.device)
    partial_stats = torch.empty((pieces[0], 2, pieces[1]), dtype=torch.float32, device=q.device)
    log2_e = 1.4426950408889634
    _decode_attention_kernel[(programs,)](
        q,
        kv_cache,
        scales,
        block_table,
        row_slots,
        seq_lens,
        out,
        partial,
        partial_stats,
        arrivals(q.device),
        scale / soft_cap if soft_cap else scale * log2_e,
        soft_cap * log2_e,
        num_rows,
        q.stride(0),
        block_table.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        scales.stride(0),
        scales.stride(1),
        scales.stride(2),
        query_len,
        group,
        num_kv,
        dim,
        block_size,
        kv_cache.stride(3),
        window,
        soft_cap > 0.0,
        kv_format,
        parts,
        headroom,
        not q.is_cpu,
        pdl,
        # Of the slots, whose number never changes, and not of this step's rows: nothing is compiled while streams wait.
        max(64, triton.next_power_of_2(max(num_rows, block_table.shape[0]))),
        **config,
        enable_fp_fusion=True,
        launch_pdl=pdl,
    )
    return out
