"""Prefill attention for Hopper, written in Gluon: what the compiler of Triton proper does not
arrange, a softmax that runs under the matrix products.

One program a multiprocessor takes blocks of 128 tokens of a row and one query head, longest first,
until none are left. Its warps have four roles:

- one warp schedules: it draws the next block, finds its row on the device and describes it in
  shared memory (`work`);
- one warp loads: it has the copy engine bring that block's queries, then tiles of keys and values
  through the block table, into rings of shared memory;
- two warp groups, the consumers, attend with 64 tokens each. A consumer issues the product that
  makes the next tile's logits, then that of the last tile's probabilities and values, and computes
  the softmax of the first while the second still runs; where that leaves the tensor cores idle, the
  other consumer has work for them.

Mbarriers hand the rings' slots back and forth: `..._full` says that a slot's content has come,
`..._empty` that all its readers are done. Tiles go from a row's newest keys to its oldest: those
that need a mask come first.

Source: Shah et al., "FlashAttention-3" (2024), sections 3.1 and 3.2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.arrivals import arrivals
from octavo.kernels.gluon_names import barrier, load_async, view_as
from octavo.kernels.launch import multiprocessors

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # tokens a consumer: what one warp group multiplies at a time
BLOCK_M = gl.constexpr(128)  # tokens a program
COLUMNS = gl.constexpr(64)  # components a load: 128 bytes, the widest swizzle
QUERY_SLOTS = gl.constexpr(2)
TILE, STAGES = 128, 2  # keys a tile; tiles of keys, and of values, in shared memory

# What `work` says of a block, in int32:
TOKEN = gl.constexpr(0)  # its first, in q
TOKENS = gl.constexpr(1)  # how many it has, at most BLOCK_M; 0: no more blocks
POSITION = gl.constexpr(2)  # of its first token in the row
SEQ_LEN = gl.constexpr(3)  # of its row
BEGIN = gl.constexpr(4)  # the first key: of the first page (or tile) of which a token sees something
COUNT = gl.constexpr(5)  # tiles from there on
HEAD = gl.constexpr(6)
SLOT = gl.constexpr(7)  # of its row, in the block table
WORK = gl.constexpr(8)


@gluon.jit
def _wait_full(barriers, number, pred=True):
    """Until the ring holds the number-th item."""
    STAGES: gl.constexpr = barriers.shape[0]
    mbarrier.wait(barriers.index(number % STAGES), number // STAGES & 1, pred=pred)


@gluon.jit
def _wait_empty(barriers, number):
    """Until the number-th item may be written: its slot's last one is read. Passes at once in the
    first round.
    """
    STAGES: gl.constexpr = barriers.shape[0]
    mbarrier.wait(barriers.index(number % STAGES), number // STAGES & 1 ^ 1)


@gluon.jit
def _read(work, what: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.sum(work.index(what).load(layout), axis=0)


@gluon.jit
def _write(work, what: gl.constexpr, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    work.index(what).store(gl.zeros([1], gl.int32, layout=layout) + value)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _row_blocks(query_start_loc_ptr, rows, num_rows):
    """Blocks of tokens of each of `rows`; 0 for those that there are not."""
    starts = gl.load(query_start_loc_ptr + rows, mask=rows < num_rows, other=0)
    ends = gl.load(query_start_loc_ptr + rows + 1, mask=rows < num_rows, other=0)
    return (ends - starts + BLOCK_M - 1) // BLOCK_M


@gluon.jit
def _find_block(query_start_loc_ptr, block, num_rows):
    """(row, block of that row, whether there is such a block) of the block-th block of all rows in
    turn.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    lanes = gl.arange(0, 32, layout=layout)
    first_row = 0
    row_blocks = _row_blocks(query_start_loc_ptr, lanes, num_rows)
    total = gl.sum(row_blocks, axis=0)
    while (block >= total) & (first_row + 32 < num_rows):
        block -= total
        first_row += 32
        row_blocks = _row_blocks(query_start_loc_ptr, first_row + lanes, num_rows)
        total = gl.sum(row_blocks, axis=0)
    before = gl.associative_scan(row_blocks, 0, _add) <= block
    row = first_row + gl.sum(before.to(gl.int32), axis=0)
    return row, block - gl.sum(gl.where(before, row_blocks, 0), axis=0), block < total


@gluon.jit
def _schedule(
    row_slots_ptr, query_start_loc_ptr, seq_lens_ptr, drawn_ptr, num_rows, num_heads, num_blocks,
    work, work_full, work_empty, WINDOW: gl.constexpr, KEYS: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    programs = gl.num_programs(0)
    items = num_blocks * num_heads
    item = gl.program_id(0)
    number = 0  # of blocks announced
    drawn = 0
    while item < items:
        # The last blocks of a row see the most keys: they start first.
        row, block, exists = _find_block(query_start_loc_ptr, num_blocks - 1 - item // num_heads, num_rows)
        if exists:
            query_start = gl.load(query_start_loc_ptr + row)
            query_len = gl.load(query_start_loc_ptr + row + 1) - query_start
            seq_len = gl.load(seq_lens_ptr + row)
            slot = gl.load(row_slots_ptr + row)
            position = seq_len - query_len + block * BLOCK_M
            begin = 0
            if WINDOW > 0:
                begin = gl.maximum(position - WINDOW + 1, 0) // KEYS * KEYS
            _write(work, TOKEN, query_start + block * BLOCK_M)
            _write(work, TOKENS, gl.minimum(query_len - block * BLOCK_M, BLOCK_M))
            _write(work, POSITION, position)
            _write(work, SEQ_LEN, seq_len)
            _write(work, BEGIN, begin)
            _write(work, COUNT, (gl.minimum(position + BLOCK_M, seq_len) - begin + TILE - 1) // TILE)
            _write(work, HEAD, item % num_heads)
            _write(work, SLOT, slot)
            mbarrier.arrive(work_full.index(0), count=1)
            number += 1
            _wait_empty(work_empty, number)
        # Each program draws until it draws too much, so there are as many draws as items.
        drawn = gl.atomic_add(drawn_ptr, 1, sem="relaxed")
        item = programs + drawn
    _write(work, TOKENS, 0)
    mbarrier.arrive(work_full.index(0), count=1)
    if drawn == items - 1:
        gl.store(drawn_ptr, 0)


@gluon.jit
def _load_queries(number, token, head, q, smem, full, empty):
    DIM: gl.constexpr = smem.shape[2]
    slot = number % QUERY_SLOTS
    _wait_empty(empty, number)
    mbarrier.expect(full.index(slot), BLOCK_M * DIM * 2)
    for consumer in gl.static_range(CONSUMERS):
        queries = smem.index(slot * CONSUMERS + consumer)
        parts = view_as(queries, smem.dtype, [DIM // COLUMNS, ROWS, COLUMNS], q.layout)
        for part in gl.static_range(DIM // COLUMNS):
            coordinates = [token + consumer * ROWS, head * DIM + part * COLUMNS]
            load_async(q, coordinates, full.index(slot), parts.index(part))


@gluon.jit
def _load_tile(number, start, cache, table, last_page, head_row, smem, full, empty, BLOCK_SIZE: gl.constexpr):
    """Has the number-th tile brought, keys or values from `start` on. A load is the part of a page
    that belongs to the tile, 64 components wide: so it lies in shared memory as if the tile had
    come in one piece.
    """
    STAGES: gl.constexpr = smem.shape[0]
    TILE: gl.constexpr = smem.shape[1]
    DIM: gl.constexpr = smem.shape[2]
    KEYS: gl.constexpr = cache.block_shape[1]
    PIECES: gl.constexpr = TILE // KEYS
    stage = number % STAGES
    pieces = view_as(smem.index(stage), smem.dtype, [DIM // COLUMNS * PIECES, 1, KEYS, COLUMNS], cache.layout)
    pages = ()
    for piece in gl.static_range(PIECES):
        # Past the row's last page the table may say anything; what comes instead is masked.
        pages += (gl.load(table + gl.minimum((start + piece * KEYS) // BLOCK_SIZE, last_page)),)
    _wait_empty(empty, number)
    mbarrier.expect(full.index(stage), TILE * DIM * 2)
    for piece in gl.static_range(PIECES):
        for part in gl.static_range(DIM // COLUMNS):
            coordinates = [pages[piece], head_row + (start + piece * KEYS) % BLOCK_SIZE, part * COLUMNS]
            load_async(cache, coordinates, full.index(stage), pieces.index(part * PIECES + piece))


@gluon.jit
def _load(
    q, cache, block_table_ptr, table_stride, num_heads, q_smem, k_smem, v_smem, work,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, work_full, work_empty,
    GROUP: gl.constexpr, BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = k_smem.shape[1]
    number = 0  # of blocks
    tiles = 0  # brought so far
    _wait_full(work_full, number)
    while _read(work, TOKENS) > 0:
        token, head = _read(work, TOKEN), _read(work, HEAD)
        count = _read(work, COUNT)
        start = _read(work, BEGIN) + (count - 1) * TILE
        last_page = (_read(work, SEQ_LEN) - 1) // BLOCK_SIZE
        table = block_table_ptr + _read(work, SLOT).to(gl.int64) * table_stride
        key_row = head // GROUP * BLOCK_SIZE
        value_row = (num_heads // GROUP + head // GROUP) * BLOCK_SIZE
        for i in range(count):
            # Near the end the next block may be drawn: not earlier, so that programs share the last
            # ones evenly.
            mbarrier.arrive(work_empty.index(0), count=1, pred=i == gl.maximum(count - 2, 0))
            _load_tile(tiles + i, start, cache, table, last_page, key_row, k_smem, k_full, k_empty, BLOCK_SIZE)
            if i == 0:
                _load_queries(number, token, head, q, q_smem, q_full, q_empty)
            _load_tile(tiles + i, start, cache, table, last_page, value_row, v_smem, v_full, v_empty, BLOCK_SIZE)
            start -= TILE
        tiles += count
        number += 1
        _wait_full(work_full, number)


@gluon.jit
def _softmax(logits, maximum, key, position, scale, WINDOW: gl.constexpr, MASKED: gl.constexpr):
    """(probabilities before division, new maximum, what earlier sums are to be multiplied by)."""
    if MASKED:
        visible = key[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        logits = gl.where(visible, logits, float("-inf"))
    new_maximum = gl.maximum(maximum, gl.max(logits, axis=1))
    shift = new_maximum * scale
    if MASKED:
        # A token that has seen nothing yet has no maximum to subtract.
        shift = gl.where(new_maximum == float("-inf"), 0.0, shift)
    return gl.exp2(logits * scale - shift[:, None]), new_maximum, gl.exp2(maximum * scale - shift)


@gluon.jit
def _thread_sums(probability):
    """[ROWS, TILE] -> [ROWS, 8], of which each thread holds sums over its own elements only."""
    TILE: gl.constexpr = probability.shape[1]
    return gl.sum(gl.reshape(probability, [ROWS, TILE // 8, 8]), axis=1)


@gluon.jit
def _attend_tiles(
    first, last, tiles, count, begin, acc, p, maximum, weights, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    position, scale, WINDOW: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Tiles [first, last) of a block's `count`, the first of which is number `tiles` of the rings.
    p: probabilities of the tile before, whose product with its values is still to come. The first
    tile's keys have come.
    """
    STAGES: gl.constexpr = k_smem.shape[0]
    TILE: gl.constexpr = k_smem.shape[1]
    logits_layout: gl.constexpr = maximum.type.layout.parent
    acc_layout: gl.constexpr = acc.type.layout
    sums_layout: gl.constexpr = weights.type.layout
    key = gl.arange(0, TILE, layout=gl.SliceLayout(0, logits_layout))
    zeros = gl.zeros([ROWS, TILE], gl.float32, layout=logits_layout)
    for i in range(first, last):
        tile = tiles + i
        keys = k_smem.index(tile % STAGES).permute((1, 0))
        logits = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
        _wait_full(v_full, tile - 1)
        acc = warpgroup_mma(p, v_smem.index((tile - 1) % STAGES), acc, is_async=True)
        logits = warpgroup_mma_wait(1, deps=[logits])
        mbarrier.arrive(k_empty.index(tile % STAGES), count=1)
        start = begin + (count - 1 - i) * TILE
        probability, maximum, rescale = _softmax(logits, maximum, start + key, position, scale, WINDOW, MASKED)
        weights = weights * gl.convert_layout(rescale, gl.SliceLayout(1, sums_layout))[:, None]
        weights += _thread_sums(probability)
        next_p = gl.convert_layout(probability.to(k_smem.dtype), p.type.layout)
        # Here and not at the loop's head, because ptxas moves no arithmetic across a branch:
        # without one it puts the softmax behind the wait for the second product, and nothing
        # overlaps.
        _wait_full(k_full, tile + 1, pred=i + 1 < count)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index((tile - 1) % STAGES), count=1)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc_layout))[:, None]
        p = next_p
    return acc, p, maximum, weights


@gluon.jit
def _attend(
    CONSUMER: gl.constexpr, out_ptr, out_stride, scale, q_smem, k_smem, v_smem, work,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, work_full, work_empty, WINDOW: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = k_smem.shape[0]
    TILE: gl.constexpr = k_smem.shape[1]
    DIM: gl.constexpr = k_smem.shape[2]
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = k_smem.dtype
    logits_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    # 16 bytes a thread
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [WARPS, 1], [1, 0])
    number = 0
    tiles = 0
    _wait_full(work_full, number)
    while _read(work, TOKENS) > 0:
        token, tokens, head = _read(work, TOKEN), _read(work, TOKENS), _read(work, HEAD)
        first_position, seq_len = _read(work, POSITION), _read(work, SEQ_LEN)
        begin, count = _read(work, BEGIN), _read(work, COUNT)
        mbarrier.arrive(work_empty.index(0), count=1)
        # Tiles [unmasked, unmasked_end), counted from the newest keys, are seen whole by all tokens
        # of the block. The first tile is always masked: it may lie past the row's end.
        unmasked = gl.maximum(count - (first_position + 1 - begin) // TILE, 1)
        unmasked_end = count
        if WINDOW > 0:
            left_edge = gl.maximum(first_position + BLOCK_M - WINDOW - begin, 0)
            unmasked_end = gl.maximum(count - (left_edge + TILE - 1) // TILE, unmasked)
        position = first_position + CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, logits_layout))
        queries = q_smem.index(number % QUERY_SLOTS * CONSUMERS + CONSUMER)
        start = begin + (count - 1) * TILE
        stage = tiles % STAGES

        _wait_full(k_full, tiles)
        _wait_full(q_full, number)
        zeros = gl.zeros([ROWS, TILE], gl.float32, layout=logits_layout)
        logits = warpgroup_mma(queries, k_smem.index(stage).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(k_empty.index(stage), count=1)
        maximum = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, logits_layout))
        key = start + gl.arange(0, TILE, layout=gl.SliceLayout(0, logits_layout))
        probability, maximum, _ = _softmax(logits, maximum, key, position, scale, WINDOW, True)
        weights = _thread_sums(probability)
        p = gl.convert_layout(probability.to(dtype), p_layout)
        acc = gl.zeros([ROWS, DIM], gl.float32, layout=acc_layout)
        _wait_full(v_full, tiles)
        if start + TILE > seq_len:
            # Values past the row's end may be another request's, NaN included, and 0 * NaN is NaN.
            # Both consumers write the same.
            v = v_smem.index(stage)
            value_key = start + gl.arange(0, TILE, layout=gl.SliceLayout(1, rows_layout))
            v.store(gl.where((value_key < seq_len)[:, None], v.load(rows_layout), 0.0))
            fence_async_shared()
            barrier()
        _wait_full(k_full, tiles + 1, pred=count > 1)
        acc, p, maximum, weights = _attend_tiles(
            1, unmasked, tiles, count, begin, acc, p, maximum, weights, queries, k_smem, v_smem,
            k_full, k_empty, v_full, v_empty, position, scale, WINDOW, True,
        )  # fmt: skip
        acc, p, maximum, weights = _attend_tiles(
            unmasked, unmasked_end, tiles, count, begin, acc, p, maximum, weights, queries, k_smem, v_smem,
            k_full, k_empty, v_full, v_empty, position, scale, WINDOW, False,
        )  # fmt: skip
        if WINDOW > 0:
            acc, p, maximum, weights = _attend_tiles(
                unmasked_end, count, tiles, count, begin, acc, p, maximum, weights, queries, k_smem, v_smem,
                k_full, k_empty, v_full, v_empty, position, scale, WINDOW, True,
            )  # fmt: skip
        tiles += count
        _wait_full(v_full, tiles - 1)
        acc = warpgroup_mma(p, v_smem.index((tiles - 1) % STAGES), acc)
        mbarrier.arrive(v_empty.index((tiles - 1) % STAGES), count=1)

        # Through the queries' place in shared memory, so that threads store whole 16 bytes.
        divisor = gl.convert_layout(gl.sum(weights, axis=1), gl.SliceLayout(1, acc_layout))
        queries.store((acc * (1.0 / divisor)[:, None]).to(dtype))
        out = queries.load(rows_layout)
        fence_async_shared()
        mbarrier.arrive(q_empty.index(number % QUERY_SLOTS), count=1)
        row = CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, rows_layout))
        component = gl.arange(0, DIM, layout=gl.SliceLayout(0, rows_layout))
        at = (token + row).to(gl.int64) * out_stride + head * DIM
        gl.store(out_ptr + at[:, None] + component[None, :], out, mask=(row < tokens)[:, None])
        number += 1
        _wait_full(work_full, number)


@gluon.jit
def _ring(STAGES: gl.constexpr, READERS: gl.constexpr):
    """(full, empty) mbarriers of a ring's slots."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty


# How many rows there are and where the prefill rows begin changes from step to step. Triton would
# compile a variant for each pattern of their divisibility, while streams wait.
@gluon.jit(
    do_not_specialize=["num_rows", "num_blocks", "num_heads", "table_stride"],
    do_not_specialize_on_alignment=["row_slots_ptr", "query_start_loc_ptr", "seq_lens_ptr", "first_rows_ptr"],
)
def _prefill_kernel(
    q,  # descriptor of [T, Hq * D], [ROWS, COLUMNS] a load
    cache,  # descriptor of [num_blocks, 2 * Hkv * BLOCK_SIZE, D], [1, keys of a page in a tile, COLUMNS] a load
    # pointers
    block_table_ptr,  # [slots, max_blocks] int32
    row_slots_ptr,  # [R] int32
    query_start_loc_ptr,  # [R + 1] int32
    seq_lens_ptr,  # [R] int32
    drawn_ptr,  # [1] int32, zero before and after
    first_rows_ptr,  # [1] int32 if FIRST_ROWS: how many of the rows it takes, the first ones
    out_ptr,  # [T, Hq, D]
    scale,  # log2(e) / sqrt(D)
    # dimensions and strides, in elements
    num_rows,
    num_heads,  # Hq
    num_blocks,  # of tokens, at most, in all rows
    out_stride,
    table_stride,
    # meta-parameters
    GROUP: gl.constexpr,  # query heads a KV head
    DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    WINDOW: gl.constexpr,
    TILE: gl.constexpr,  # keys a tile
    STAGES: gl.constexpr,  # tiles of keys, and of values, in shared memory
    FIRST_ROWS: gl.constexpr,
    PDL: gl.constexpr,
):
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    KEYS: gl.constexpr = cache.block_shape[1]
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(cache.dtype, [QUERY_SLOTS * CONSUMERS, ROWS, DIM], layout)
    k_smem = gl.allocate_shared_memory(cache.dtype, [STAGES, TILE, DIM], layout)
    v_smem = gl.allocate_shared_memory(cache.dtype, [STAGES, TILE, DIM], layout)
    work = gl.allocate_shared_memory(gl.int32, [WORK, 1], mbarrier.MBarrierLayout())
    q_full, q_empty = _ring(QUERY_SLOTS, CONSUMERS)
    k_full, k_empty = _ring(STAGES, CONSUMERS)
    v_full, v_empty = _ring(STAGES, CONSUMERS)
    work_full, work_empty = _ring(1, CONSUMERS + 1)
    fence_async_shared()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if FIRST_ROWS:
        num_rows = gl.load(first_rows_ptr)
    gl.warp_specialize(
        [
            (_attend, (
                FIRST, out_ptr, out_stride, scale, q_smem, k_smem, v_smem, work,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, work_full, work_empty, WINDOW,
            )),
            (_attend, (
                SECOND, out_ptr, out_stride, scale, q_smem, k_smem, v_smem, work,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, work_full, work_empty, WINDOW,
            )),
            (_load, (
                q, cache, block_table_ptr, table_stride, num_heads, q_smem, k_smem, v_smem, work,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, work_full, work_empty, GROUP, BLOCK_SIZE,
            )),
            (_schedule, (
                row_slots_ptr, query_start_loc_ptr, seq_lens_ptr, drawn_ptr, num_rows, num_heads, num_blocks,
                work, work_full, work_empty, WINDOW, KEYS, TILE,
            )),
        ],
        [4, 1, 1],  # warps of all roles but the first, which has the launch's four
        [232, 40, 40],  # their registers a thread; the first has what is left, 232
    )  # fmt: skip


def fits_queries(q: Tensor, block_size: int) -> bool:
    """Whether the kernel can take queries of this shape, dtype and strides over such pages."""
    dim = q.shape[2]
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and dim in (64, 128)
        and (block_size in (16, 32, 64) or block_size % TILE == 0)
        # The copy engine wants addresses and strides of whole 16 bytes.
        and q.stride(1) == dim
        and q.stride(2) == 1
        and q.stride(0) % 8 == 0
        and q.data_ptr() % 16 == 0
    )


def fits(q: Tensor, kv_cache: Tensor) -> bool:
    """Whether it can take these (arguments as of `prefill_attention`)."""
    return (
        fits_queries(q, kv_cache.shape[3])
        and kv_cache.dtype == q.dtype
        and kv_cache[0].is_contiguous()
        and kv_cache.stride(0) % 8 == 0
        and kv_cache.data_ptr() % 16 == 0
    )


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
    first_rows: Tensor | None = None,
) -> Tensor:
    """`prefill_attention.prefill_attention` of what `fits`, on a Hopper GPU. There must be rows and
    tokens. first_rows [1] int32: only so many of the rows, the first ones; what belongs to the
    others is left undefined.
    """
    num_rows, (tokens, num_q, dim) = row_slots.shape[0], q.shape
    num_kv, block_size = kv_cache.shape[2], kv_cache.shape[3]
    out = torch.empty((tokens, num_q, dim), dtype=q.dtype, device=q.device)
    # Each row wastes at most one block, and none is longer than max_query_len.
    block_m = BLOCK_M.value
    blocks = min(tokens // block_m + num_rows, num_rows * triton.cdiv(max_query_len, block_m))
    columns = COLUMNS.value
    q_load = [ROWS.value, columns]
    q_blocks = TensorDescriptor(
        q, [tokens, num_q * dim], [q.stride(0), 1], q_load, gl.NVMMASharedLayout(128, 16, rank=2)
    )
    pages = TensorDescriptor(
        kv_cache,
        [kv_cache.shape[0], 2 * num_kv * block_size, dim],
        [kv_cache.stride(0), dim, 1],
        [1, min(block_size, TILE), columns],
        gl.NVMMASharedLayout(128, 16, rank=3),
    )
    log2_e = 1.4426950408889634
    _prefill_kernel[(min(multiprocessors(q.device), num_q * blocks),)](
        q_blocks,
        pages,
        block_table,
        row_slots,
        query_start_loc,
        seq_lens,
        arrivals(q.device),
        row_slots if first_rows is None else first_rows,
        out,
        scale * log2_e,
        num_rows,
        num_q,
        blocks,
        out.stride(0),
        block_table.stride(0),
        num_q // num_kv,
        dim,
        block_size,
        window,
        TILE,
        STAGES,
        first_rows is not None,
        True,
        num_warps=4,
        launch_pdl=True,
    )
    return out
