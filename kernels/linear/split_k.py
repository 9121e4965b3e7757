"""The end of a linear layer whose k is split over programs: the last to arrive adds the parts up in
their order.

So results do not depend on timing. `eight_bit.py` has an end of its own: its scales go on the whole
sum, and how many parts there are it learns at launch, so its parts lie tile by tile and not row by
row as the output does.
"""

import triton
import triton.language as tl

from octavo.kernels.arrivals import arrives_last


@triton.jit
def finish(
    total,  # [ROWS, TOKENS] fp32
    out_ptr,
    bias_ptr,
    partial_ptr,  # [splits, M, N] fp32
    arrivals_ptr,  # [tiles] int32, all zero before and after
    row,  # [ROWS]
    token,  # [TOKENS]
    N,
    M,
    tile,
    split,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Writes a tile of the product, or its part; the last part of a tile to arrive adds them up in
    order.
    """
    inside = (row < N)[:, None] & (token < M)[None, :]
    offset = token[None, :].to(tl.int64) * N + row[:, None]
    last = True
    if SPLITS > 1:
        size = N.to(tl.int64) * M
        tl.store(partial_ptr + split * size + offset, total, mask=inside)
        last = arrives_last(arrivals_ptr, tile, SPLITS)
        if last:
            total = tl.load(partial_ptr + offset, mask=inside, other=0.0, cache_modifier=".cg")
            for part in tl.static_range(1, SPLITS):
                total += tl.load(partial_ptr + part * size + offset, mask=inside, other=0.0, cache_modifier=".cg")
    if last:
        if BIAS:
            total += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask=inside)
