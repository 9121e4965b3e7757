"""Pages of codes as pages of 16-bit numbers: what prompts see, for the kernel that multiplies fast.

The products of `prefill_gluon.py` want keys and values in 16 bits in shared memory, where the copy
engine puts them; codes would have to pass through registers once for each block of 128 tokens and
each query head. Here each page that a row sees passes once a layer, which costs its bytes: some 5 us
for 2,048 tokens of 8 heads of 128.

The pages lie side by side in work space that has room for a step's own tokens and for prefixes of
`PREFIX_BYTES`. Rows are taken in order as long as they fit; how many did, the kernels after this one
read on the device, so a captured graph serves any lengths.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launch import has_pdl, let_successor_start, wait_for_inputs

PREFIX_BYTES = 128 << 20
_PROGRAMS = 1056  # eight a multiprocessor of an H100
_ROWS = 32  # rows looked through at a time


@triton.jit
def _row_pages(query_start_loc_ptr, seq_lens_ptr, rows, num_rows, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(how many pages the tokens of each of `rows` see, the first of them); none without tokens."""
    inside = rows < num_rows
    starts = tl.load(query_start_loc_ptr + rows, mask=inside, other=0)
    ends = tl.load(query_start_loc_ptr + rows + 1, mask=inside, other=0)
    seq_lens = tl.load(seq_lens_ptr + rows, mask=inside, other=0)
    first = tl.zeros_like(seq_lens)
    if WINDOW > 0:
        first = tl.maximum(seq_lens - (ends - starts) - WINDOW + 1, 0) // BLOCK_SIZE
    return tl.where(ends > starts, tl.cdiv(seq_lens, BLOCK_SIZE) - first, 0), first


# As of `prefill.py`: no variant for each number of rows, and where they begin.
@triton.jit(
    do_not_specialize=["num_rows", "capacity", "table_stride"],
    do_not_specialize_on_alignment=["row_slots_ptr", "query_start_loc_ptr", "seq_lens_ptr"],
)
def _widen_kernel(
    # pointers
    cache_ptr,  # [num_blocks, HEADS, BLOCK_SIZE, D, or D / 2 if PACKED]
    scales_ptr,  # [num_blocks, HEADS, BLOCK_SIZE]
    block_table_ptr,  # [slots, max_blocks] int32
    row_slots_ptr,  # [R] int32
    query_start_loc_ptr,  # [R + 1] int32
    seq_lens_ptr,  # [R] int32
    pages_ptr,  # [capacity, HEADS, BLOCK_SIZE, D]
    table_ptr,  # [slots, max_blocks] int32
    fitting_ptr,  # [1] int32
    # dimensions and strides, in elements
    num_rows,
    capacity,
    table_stride,
    cache_block_stride,
    scales_block_stride,
    # meta-parameters
    HEADS: tl.constexpr,  # of keys and of values
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,  # of a page at a time
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,  # 4 bits
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    let_successor_start(PDL)
    wait_for_inputs(PDL)
    PIECES: tl.constexpr = BLOCK_SIZE // KEYS
    BYTES: tl.constexpr = DIM // 2 if PACKED else DIM
    dtype: tl.constexpr = pages_ptr.dtype.element_ty
    lanes = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    byte = tl.arange(0, BYTES)
    fitting = 0
    total = 0
    first_row = 0
    fits_so_far = True
    while fits_so_far & (first_row < num_rows):
        counts, _ = _row_pages(query_start_loc_ptr, seq_lens_ptr, first_row + lanes, num_rows, WINDOW, BLOCK_SIZE)
        fits = (first_row + lanes < num_rows) & (total + tl.cumsum(counts, axis=0) <= capacity)
        here = tl.sum(fits.to(tl.int32), axis=0)
        total += tl.sum(tl.where(fits, counts, 0), axis=0)
        fitting += here
        first_row += ROWS
        fits_so_far = here == ROWS
    if tl.program_id(0) == 0:
        tl.store(fitting_ptr, fitting)
    for item in range(tl.program_id(0), total * (HEADS * PIECES), tl.num_programs(0)):
        page = item // (HEADS * PIECES)
        head = item // PIECES % HEADS
        first_row = 0
        index = page
        counts, first = _row_pages(query_start_loc_ptr, seq_lens_ptr, lanes, num_rows, WINDOW, BLOCK_SIZE)
        here = tl.sum(counts, axis=0)
        while index >= here:
            index -= here
            first_row += ROWS
            counts, first = _row_pages(
                query_start_loc_ptr, seq_lens_ptr, first_row + lanes, num_rows, WINDOW, BLOCK_SIZE
            )
            here = tl.sum(counts, axis=0)
        before = tl.cumsum(counts, axis=0) <= index
        lane = tl.sum(before.to(tl.int32), axis=0)
        index += tl.sum(tl.where(lanes == lane, first, 0) - tl.where(before, counts, 0), axis=0)
        slot = tl.load(row_slots_ptr + first_row + lane).to(tl.int64)
        block = tl.load(block_table_ptr + slot * table_stride + index).to(tl.int64)
        if item % (HEADS * PIECES) == 0:
            tl.store(table_ptr + slot * table_stride + index, page)
        vector = head * BLOCK_SIZE + item % PIECES * KEYS + key
        codes = tl.load(cache_ptr + block * cache_block_stride + vector[:, None] * BYTES + byte[None, :])
        scale = tl.load(scales_ptr + block * scales_block_stride + vector)[:, None]
        out = pages_ptr + (page.to(tl.int64) * (HEADS * BLOCK_SIZE) + vector)[:, None] * DIM + byte[None, :]
        if PACKED:
            low = (codes & 15).to(tl.float32) - 8.0
            high = (codes >> 4).to(tl.float32) - 8.0
            tl.store(out, (low * scale).to(dtype))
            tl.store(out + BYTES, (high * scale).to(dtype))
        else:
            tl.store(out, (codes.to(tl.float32) * scale).to(dtype))


def widen(
    kv_cache: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    row_slots: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    window: int,
    dtype: torch.dtype,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pages that rows see (arguments as of `prefill_attention`), each number its code times its
    scale, rounded to `dtype`.

    What `widens` takes; heads are a power of two wide and blocks a power of two, or a multiple of
    64, long. capacity: most pages. Returns (pages [capacity, 2, Hkv,
    block_size, D], block_table's like for them, [1] int32: how many rows they are of, the first
    ones). What belongs to none of these rows is undefined.
    """
    num_kv, block_size, width = kv_cache.shape[2:]
    packed = kv_cache.dtype == torch.uint8
    dim = 2 * width if packed else width
    device = kv_cache.device
    pages = torch.empty((capacity, 2, num_kv, block_size, dim), dtype=dtype, device=device)
    table = torch.empty_like(block_table)
    fitting = torch.empty(1, dtype=torch.int32, device=device)
    keys = 64 if block_size % 64 == 0 else block_size
    pdl = has_pdl(device)
    _widen_kernel[(min(_PROGRAMS, capacity * 2 * num_kv * (block_size // keys)),)](
        kv_cache,
        kv_scales,
        block_table,
        row_slots,
        query_start_loc,
        seq_lens,
        pages,
        table,
        fitting,
        row_slots.shape[0],
        capacity,
        block_table.stride(0),
        kv_cache.stride(0),
        kv_scales.stride(0),
        2 * num_kv,
        dim,
        block_size,
        keys,
        window,
        packed,
        _ROWS,
        pdl,
        num_warps=4,
        launch_pdl=pdl,
        enable_fp_fusion=True,
    )
    return pages, table, fitting


def widens(kv_cache: Tensor, kv_scales: Tensor) -> bool:
    """Whether `widen` can take these blocks: a block's codes, and its scales, lie in one piece."""
    return kv_cache[0].is_contiguous() and kv_scales[0].is_contiguous()


def work_space(tokens: int, num_rows: int, max_blocks: int, num_kv: int, block_size: int, dim: int) -> tuple[int, bool]:
    """(pages of work space for a step of so many tokens and rows of at most `max_blocks` pages,
    whether that is enough whatever the rows' lengths). With more rows of a model it is never more
    certain: the largest step meets every kernel that a smaller one does.
    """
    most = num_rows * max_blocks
    others = PREFIX_BYTES // (2 * num_kv * block_size * dim * 2)
    return min(most, triton.cdiv(tokens, block_size) + num_rows + others), most <= others
