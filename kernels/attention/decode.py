"""Attention of rows with a few new tokens each (1-8) over paged keys and values: split over the
keys, bound by memory.

The keys of all rows and heads form one line of tiles. A fixed number of programs takes equal
stretches of it, found on the device from the real lengths, so the grid depends on nothing that a
captured graph would freeze, and one very long row is shared by as many programs as its weight. A
*unit* is one row and one KV head: its query heads, times its new tokens (or the most that a row
has, those that it lacks masked), are the columns of one product, so K and V are read once. Where
lengths differ, a unit has places in the line also for what it costs to begin one: else the programs
with the shortest rows would end last. A stretch that holds a whole unit writes the answer; pieces
of a unit go to scratch, and the program that arrives last adds them up. Where programs may start
while the kernel before still runs, they find their stretch and fetch its first tile into the L2
meanwhile.

Keys are the products' rows and queries their columns, since a product has 16 rows at least but only
8 columns: GQA's few query heads pad little. With up to 8 of them each warp has keys, a maximum and
sums of its own, and warps meet only to fetch a tile and at a stretch's end.

Sources: Dao et al., "Flash-Decoding" (2023), for the split and its merge; Osama et al., "Stream-K"
(2023), for the line.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.arrivals import MAX_ARRIVALS, arrivals, arrives_last
from octavo.kernels.attention.decode_pieces import merge_pieces, store_piece, write_answer
from octavo.kernels.attention.decode_stretch import find_stretch, owner, stretch_begin, tiles_of_row, unit_at
from octavo.kernels.attention.kv_quant import component, part, value_headroom, words
from octavo.kernels.launch import has_pdl, let_successor_start, wait_for_inputs


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
def _fill_zeros(token_ptr, SIZE: tl.constexpr):
    """The answer of tokens that see nothing: SIZE numbers."""
    BLOCK: tl.constexpr = 1024
    for start in range(0, SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), token_ptr.dtype.element_ty)
        tl.store(token_ptr + place, zeros, mask=place < SIZE)


@triton.jit
def _write_zeros(
    seq_lens_ptr,
    query_start_loc_ptr,
    out_ptr,
    num_rows,
    SIZE: tl.constexpr,  # of a token's answer
    QUERY_LEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The answers of rows of no keys, which have no place in the line."""
    if query_start_loc_ptr is None:
        # Program after program writes one row.
        row = tl.program_id(0).to(tl.int64)
        while row < num_rows:
            if tl.load(seq_lens_ptr + row) == 0:
                _fill_zeros(out_ptr + row * (QUERY_LEN * SIZE), QUERY_LEN * SIZE)
            row += tl.num_programs(0)
    else:
        # One such row may have most of the tokens, so they make a line of their own, of which
        # program after program writes one token.
        rows = tl.arange(0, BLOCK_R)
        in_rows = rows < num_rows
        begins = tl.load(query_start_loc_ptr + rows, mask=in_rows, other=0)
        counts = tl.load(query_start_loc_ptr + rows + 1, mask=in_rows, other=0) - begins
        counts = tl.where(tl.load(seq_lens_ptr + rows, mask=in_rows, other=1) == 0, counts, 0)
        ends = tl.cumsum(counts, axis=0)
        total = tl.max(ends, axis=0)
        place = tl.program_id(0)
        while place < total:
            mine = (ends - counts <= place) & (place < ends)
            token = place + tl.sum(tl.where(mine, begins - (ends - counts), 0), axis=0)
            _fill_zeros(out_ptr + token.to(tl.int64) * SIZE, SIZE)
            place += tl.num_programs(0)


@triton.jit
def _sum_of_warps(x):
    """Adds up [4, ...], one part a warp. Split off at the end, where one thread gets all four
    parts; a reduction would take them through shared memory twice.
    """
    if len(x.shape) == 3:
        x = tl.reshape(tl.permute(x, (1, 2, 0)), (x.shape[1], x.shape[2], 2, 2))
    else:
        x = tl.reshape(tl.permute(x, (1, 0)), (x.shape[1], 2, 2))
    even, odd = tl.split(x)
    low, high = tl.split(even + odd)
    return low + high


@triton.jit
def _row_tokens(query_start_loc_ptr, row, QUERY_LEN: tl.constexpr):
    """A row's first token, and how many it has."""
    if query_start_loc_ptr is None:
        first = row.to(tl.int64) * QUERY_LEN
        count = QUERY_LEN
    else:
        first = tl.load(query_start_loc_ptr + row).to(tl.int64)
        count = tl.load(query_start_loc_ptr + row + 1) - first.to(tl.int32)
    return first, count


@triton.jit
def _load_queries(q_rows, w, in_q, FORMAT: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr):
    """The components of query rows that go with each part of words `w`: [words, rows] a part, once
    a split.
    """
    queries = ()
    for i in tl.static_range(PARTS):
        q = tl.load(q_rows[None, :] + component(w, i, FORMAT, DIM)[:, None], mask=in_q, other=0.0)
        if SPLITS > 1:
            q = tl.broadcast_to(q[None, :, :], (SPLITS, q.shape[0], q.shape[1]))
        queries = queries + (q,)  # noqa: RUF005 (Triton knows no starred expression)
    return queries


@triton.jit
def _nothing_seen(BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr):
    """Maximum, weights and the sums of each part, before the first key."""
    if SPLITS > 1:
        maximum = tl.full((SPLITS, BLOCK_M), float("-inf"), tl.float32)
        weights = tl.zeros((SPLITS, BLOCK_M), tl.float32)
        acc = tl.zeros((SPLITS, BLOCK_W, BLOCK_M), tl.float32)
    else:
        maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        weights = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_W, BLOCK_M), tl.float32)
    sums = ()
    for _ in tl.static_range(PARTS):
        sums = sums + (acc,)  # noqa: RUF005
    return maximum, weights, sums


@triton.jit
def _find_keys(
    table,  # the row's
    start,
    n,
    in_row,
    seq_len,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Where a tile's keys lie: a page and an offset in it (of the tile, of each warp or of each
    key), and how many keys further each key is.
    """
    SUB_TILE: tl.constexpr = TILE // SPLITS
    if BLOCK_SIZE % TILE == 0:
        # The tile lies in one page. A row of no keys reads its table's first entry and nothing
        # else.
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
        key = start + n
        page = tl.load(table + key // BLOCK_SIZE, mask=in_row, other=0).to(tl.int64)
        offset = key % BLOCK_SIZE
        further = tl.zeros_like(key)
    return page, offset, further


@triton.jit
def _products(k, queries, FORMAT: tl.constexpr, PARTS: tl.constexpr, ON_GPU: tl.constexpr):
    """Keys times query rows: each part of the keys' words with the components that go with it."""
    products = tl.dot(part(k, 0, FORMAT, queries[0].dtype, ON_GPU), queries[0], input_precision="ieee")
    for i in tl.static_range(1, PARTS):
        products = tl.dot(part(k, i, FORMAT, queries[i].dtype, ON_GPU), queries[i], products, input_precision="ieee")
    return products


@triton.jit
def _visible(key, in_row, position, QUERY_LEN: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys each query row sees."""
    visible = tl.expand_dims(in_row, -1)
    if QUERY_LEN > 1:
        visible &= tl.expand_dims(key, -1) <= position
        if WINDOW > 0:
            visible &= tl.expand_dims(key, -1) > position - WINDOW
    return visible


@triton.jit
def _weigh(logits, maximum, weights):
    """The weights of a tile's keys; and the new maximum, the new sum of weights, and what older
    sums take as factor.
    """
    new_maximum = tl.maximum(maximum, tl.max(logits, axis=-2))
    # A row that has seen nothing yet has no maximum to subtract.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    probability = tl.exp2(logits - tl.expand_dims(shift, -2))
    rescale = tl.exp2(maximum - shift)
    return probability, new_maximum, weights * rescale + tl.sum(probability, axis=-2), rescale


@triton.jit
def _add_values(sums, v, p, rescale, FORMAT: tl.constexpr, PARTS: tl.constexpr, ON_GPU: tl.constexpr):
    """The sums so far, rescaled, and a tile's values times the weights `p` of their keys."""
    factor = tl.expand_dims(rescale, -2)
    more = ()
    for i in tl.static_range(PARTS):
        values = part(v, i, FORMAT, p.dtype, ON_GPU)
        more = more + (tl.dot(values, p, sums[i] * factor, input_precision="ieee"),)  # noqa: RUF005
    return more


@triton.jit
def _join_warps(maximum, weights, sums, PARTS: tl.constexpr):
    """Of what each warp has seen, what all have."""
    joined = tl.max(maximum, axis=0)
    shift = tl.where(joined == float("-inf"), 0.0, joined)
    factor = tl.exp2(maximum - shift[None, :])
    joined_sums = ()
    joined_weights = _sum_of_warps(weights * factor)
    for i in tl.static_range(PARTS):
        joined_sums = joined_sums + (_sum_of_warps(sums[i] * factor[:, None, :]),)  # noqa: RUF005
    return joined, joined_weights, joined_sums


@triton.jit(do_not_specialize=["num_rows"])  # it changes from step to step: nothing may be compiled for it
def _decode_attention_kernel(
    # pointers: what attends to what
    q_ptr,  # [tokens, Hq, D]
    cache_ptr,  # [num_blocks, 2, Hkv, BLOCK_SIZE, W]: numbers, or words of PARTS codes
    scales_ptr,  # [num_blocks, 2, Hkv, BLOCK_SIZE] if FORMAT
    block_table_ptr,  # [slots, max_blocks] int32
    row_slots_ptr,  # [R] int32
    seq_lens_ptr,  # [R] int32
    query_start_loc_ptr,  # [R + 1] int32, or None: QUERY_LEN tokens a row
    # pointers: what is written
    out_ptr,  # [tokens, Hq, D]
    partial_ptr,  # [2 * programs, BLOCK_PARTIAL, PARTS * BLOCK_W] fp32: unnormalised sums
    partial_stats_ptr,  # [2 * programs, 2, BLOCK_PARTIAL] fp32: maximum (log2) and sum of weights
    arrivals_ptr,  # [R * units a row] int32, all zero before and after
    # of logits
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
    # meta-parameters: the model and its cache
    QUERY_LEN: tl.constexpr,  # tokens of a row, or the most that one has
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
    # meta-parameters: the device and the launch
    ON_GPU: tl.constexpr,  # may use assembly
    PDL: tl.constexpr,  # starts while its predecessor ends, and lets its successor do so
    BLOCK_R: tl.constexpr,  # a power of two >= R
    # meta-parameters: tiles
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
    M_CHUNKS: tl.constexpr = (QUERY_LEN * GROUP + BLOCK_M - 1) // BLOCK_M
    UNITS: tl.constexpr = NUM_KV * M_CHUNKS  # a row
    WORDS: tl.constexpr = DIM // PARTS
    SUB_TILE: tl.constexpr = TILE // SPLITS
    program = tl.program_id(0)

    # My stretch of the line, and the row it begins in. Few rows fit into the lanes of each warp,
    # where their sums take no barrier; how many there are changes from step to step, so it is no
    # reason to compile anything.
    LEAST: tl.constexpr = LEAST_KEYS // TILE
    if num_rows <= 32:
        place, end, quota, extra, lead, row, row_begin, seq_len, slot, has_empty = find_stretch(
            seq_lens_ptr, row_slots_ptr, num_rows, 32, QUERY_LEN, WINDOW, TILE, UNITS, PER_SM, LEAST, UNIT_COST
        )
    else:
        place, end, quota, extra, lead, row, row_begin, seq_len, slot, has_empty = find_stretch(
            seq_lens_ptr, row_slots_ptr, num_rows, BLOCK_R, QUERY_LEN, WINDOW, TILE, UNITS, PER_SM, LEAST, UNIT_COST
        )
    if PDL:
        # Nearly all keys are old: the first ones are on their way while the predecessor writes the
        # newest.
        first_tile, num_tiles = tiles_of_row(seq_len, QUERY_LEN, WINDOW, TILE)
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
        _write_zeros(seq_lens_ptr, query_start_loc_ptr, out_ptr, num_rows, NUM_KV * GROUP * DIM, QUERY_LEN, BLOCK_R)

    m = tl.arange(0, BLOCK_M)
    w = tl.arange(0, BLOCK_W)
    in_width = w < WORDS
    # From here on what has to do with keys has a leading dimension of SPLITS, if that is not 1:
    # each warp has keys, sums and a maximum of its own, and nothing passes between warps until all
    # tiles are done.
    n = tl.arange(0, SUB_TILE)
    if SPLITS > 1:
        n = (tl.arange(0, SPLITS) * SUB_TILE)[:, None] + n[None, :]
    while place < end:
        # My tiles of the unit: none if my stretch ends before they begin.
        first_tile, num_tiles = tiles_of_row(seq_len, QUERY_LEN, WINDOW, TILE)
        unit, unit_begin, unit_end = unit_at(place, row_begin, num_tiles, lead)
        first_place = tl.maximum(place, unit_begin)
        here = tl.maximum(tl.minimum(unit_end, end) - first_place, 0)
        kv_head = unit // M_CHUNKS

        first_token, num_tokens = _row_tokens(query_start_loc_ptr, row, QUERY_LEN)
        query_row = (unit % M_CHUNKS) * BLOCK_M + m
        query_token = first_token + query_row // GROUP
        query_head = kv_head * GROUP + query_row % GROUP
        in_q = in_width[:, None] & (query_row < num_tokens * GROUP)
        q_rows = q_ptr + (query_token * q_stride + query_head * DIM)
        queries = _load_queries(q_rows, w, in_q, FORMAT, DIM, PARTS, SPLITS)
        position = seq_len - num_tokens + query_row // GROUP
        first_key = 0
        if WINDOW > 0:
            first_key = tl.maximum(seq_len - num_tokens + 1 - WINDOW, 0)

        maximum, weights, sums = _nothing_seen(BLOCK_M, BLOCK_W, PARTS, SPLITS)
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
            page, offset, further = _find_keys(table, start, n, in_row, seq_len, BLOCK_SIZE, TILE, SPLITS)
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
            logits = _products(k, queries, FORMAT, PARTS, ON_GPU)
            if FORMAT != "":
                k_scales = tl.load(from_scale + further, mask=in_row, other=0.0)
                logits *= tl.expand_dims(scale * k_scales, -1)
            else:
                logits *= scale
            if SOFT_CAP:
                logits = (2.0 * tl.sigmoid(2.0 * logits) - 1.0) * soft_cap
            logits = tl.where(_visible(key, in_row, position, QUERY_LEN, WINDOW), logits, float("-inf"))
            probability, maximum, weights, rescale = _weigh(logits, maximum, weights)
            v = tl.load(
                from_value + (tl.expand_dims(further * OFFSET_STRIDE, -2) + w[:, None]),
                mask=tl.expand_dims(in_row, -2) & in_width[:, None],
                other=0,
            )
            if FORMAT != "":
                v_scales = tl.load(from_scale + scales_kv_stride + further, mask=in_row, other=0.0)
                probability *= tl.expand_dims(v_scales * HEADROOM, -1)
            p = probability.to(queries[0].dtype)
            sums = _add_values(sums, v, p, rescale, FORMAT, PARTS, ON_GPU)

        if SPLITS > 1:
            maximum, weights, sums = _join_warps(maximum, weights, sums, PARTS)
        weights *= HEADROOM
        if here == num_tiles:
            write_answer(out_ptr, query_token, query_head, weights, sums, w, in_q, NUM_KV * GROUP, DIM, FORMAT, PARTS)
        elif here > 0:
            # Piece 0 of a program begins where the program does; the other one ends where it does.
            piece = 2 * program + (place > stretch_begin(program, quota, extra)).to(tl.int32)
            store_piece(
                partial_ptr, partial_stats_ptr, piece, maximum, weights, sums, m, w, PARTS, BLOCK_PARTIAL, BLOCK_W
            )
            first_program = owner(unit_begin, quota, extra)
            pieces = owner(unit_end - 1, quota, extra) - first_program + 1
            if arrives_last(arrivals_ptr, row * UNITS + unit, pieces):
                merge_pieces(
                    partial_ptr,
                    partial_stats_ptr,
                    out_ptr,
                    first_program,
                    pieces,
                    (unit_begin - lead > stretch_begin(first_program, quota, extra)).to(tl.int32),
                    first_token,
                    num_tokens,
                    unit,
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


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter, which runs programs one after another, few; but enough that rows are both
    # split and shared.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _config(query_rows: int, dim: int, parts: int, itemsize: int) -> dict[str, int]:
    """Tile sizes, warps and stages. query_rows = query_len * group; itemsize: of a word of the
    cache.
    """
    block_w = max(16, triton.next_power_of_2(dim // parts))
    block_d = block_w * parts
    # The accumulator is BLOCK_M x BLOCK_D fp32: 64 x 128 is 64 registers a thread of 4 warps, as
    # much as leaves room for the rest; a unit with more query rows is cut and its K and V read
    # twice.
    block_m = min(64 if block_d <= 128 else 32, max(8, triton.next_power_of_2(query_rows)))
    block_partial = min(block_m, triton.next_power_of_2(query_rows))
    # A tile of K and V is 32 KiB at most, and two are buffered: two programs a multiprocessor hold
    # 128 KiB, and 64 or more are in flight, thrice what latency x bandwidth (1 us x 23 GB/s a
    # multiprocessor) asks for. 4 bits take more keys a tile, since a tile has costs of its own; 8
    # bits do not gain by it (8x4k: 31 us with 64 keys, 36 with 128).
    tile = max(16, min(64 if parts <= 2 else 128, 16384 // (block_w * itemsize)))
    if itemsize == 4 and block_m >= 16:
        tile = 16  # products of 32-bit numbers hold all their operands in registers
    # Four warps with sums of their own, if they fit into registers; a product has 16 keys at least.
    split = itemsize == 2 and block_m == 8 and block_d <= 256 and tile >= 64
    # 128 registers a thread of pieces in flight while merging; 32 where the sums or the keys take
    # more.
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
        # With none, 256 rows of a chat take 543 us instead of 484, 32 of them 99 instead of 73; 1
        # to 4 differ little. Measured in bf16, with 64 keys a tile.
        "UNIT_COST": 2,
        "num_warps": 4,
        # 3 would leave one buffer of K and V: the look-up of their page takes stages of its own in
        # front of theirs.
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
    query_start_loc: Tensor | None = None,
) -> Tensor:
    """Attention of rows that bring a few new tokens each, over the pages of their slot.

    q [tokens, Hq, D] (rows may be strided), row by row; kv_cache [num_blocks, 2, Hkv, block_size,
    D] of q's dtype, or codes with their kv_scales [num_blocks, 2, Hkv, block_size] (formats:
    `kv_quant.py`); block_table [slots, max_blocks] int32; row_slots, seq_lens [R] int32. Every row
    has `query_len` tokens; or with query_start_loc [R + 1] int32 row r has
    `q[query_start_loc[r] : query_start_loc[r + 1]]`, 1 to `query_len` of them. They are the last of
    its `seq_lens[r]` positions; the one at `position` sees keys
    `max(0, position - window + 1) .. position` (window 0: from 0). logits = scale * q @ k, then
    soft_cap * tanh(logits / soft_cap) if soft_cap > 0. Returns [tokens, Hq, D]; a token that sees
    nothing gets zeros: so does every token of a row with a `seq_len` of 0, which may have any
    number of them, more than `query_len` too.

    Launches of one device must be on one stream: they share counters. Call it once before capturing
    it in a graph, so that the counters exist. block_table, row_slots and seq_lens are read before
    earlier launches have ended (`launch.py`): nothing may write them shortly before. In a step that
    is `prepare`, many launches back.

    Raises ValueError if rows x KV heads exceed 65536 units.
    """
    num_rows, (num_tokens, num_q, dim) = row_slots.shape[0], q.shape
    num_kv, block_size = kv_cache.shape[2], kv_cache.shape[3]
    out = torch.empty((num_tokens, num_q, dim), dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    group = num_q // num_kv
    headroom = value_headroom(q.dtype, kv_cache.dtype)
    kv_cache, kv_format, parts = words(kv_cache)
    scales = q if kv_scales is None else kv_scales
    config = _config(query_len * group, dim, parts, kv_cache.element_size())
    units = num_rows * num_kv * triton.cdiv(query_len * group, config["BLOCK_M"])
    if units > MAX_ARRIVALS:
        raise ValueError(
            f"decode_attention: {units} units (rows x KV heads) exceed {MAX_ARRIVALS}; use fewer rows a step"
        )
    programs = config["PER_SM"] * _multiprocessors(q.device)
    rows = config["BLOCK_PARTIAL"]
    partial = torch.empty((2 * programs, rows, parts * config["BLOCK_W"]), dtype=torch.float32, device=q.device)
    partial_stats = torch.empty((2 * programs, 2, rows), dtype=torch.float32, device=q.device)

    pointers = (q, kv_cache, scales, block_table, row_slots, seq_lens, query_start_loc)
    written = (out, partial, partial_stats, arrivals(q.device))
    log2_e = 1.4426950408889634
    of_logits = (scale / soft_cap if soft_cap else scale * log2_e, soft_cap * log2_e)
    strides = (q.stride(0), block_table.stride(0), *kv_cache.stride()[:3], *scales.stride()[:3])
    model = (query_len, group, num_kv, dim, block_size, kv_cache.stride(3), window, soft_cap > 0.0)
    pdl = has_pdl(q.device)
    # Of the slots, whose number never changes, and not of this step's rows: nothing is compiled
    # while streams wait.
    block_r = max(64, triton.next_power_of_2(max(num_rows, block_table.shape[0])))
    _decode_attention_kernel[(programs,)](
        *pointers,
        *written,
        *of_logits,
        num_rows,
        *strides,
        *model,
        kv_format,
        parts,
        headroom,
        not q.is_cpu,
        pdl,
        block_r,
        **config,
        enable_fp_fusion=True,
        launch_pdl=pdl,
    )
    return out
