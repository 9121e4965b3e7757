"""Sums of hidden states for embeddings, in Triton: one program a record of `pools` and a block of
columns. It adds one token after another, so that a sum does not depend on where the prompt's chunks
end.

Twin: `reference.pool.pool`.
"""

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.step import plan_format as fmt

COLUMNS = 128  # of one program: a prompt of 8,192 tokens has work for as many programs as columns allow
TOKENS_AHEAD = 8  # loads under way

_WORDS = tl.constexpr(fmt.POOL_WORDS)
_SLOT = tl.constexpr(fmt.POOL_SLOT)
_ROW = tl.constexpr(fmt.POOL_ROW)
_START = tl.constexpr(fmt.POOL_START)
_LEN = tl.constexpr(fmt.POOL_LEN)
_BEGINS = tl.constexpr(fmt.POOL_BEGINS)
_COUNT = tl.constexpr(fmt.POOL_COUNT)
_VECTOR = tl.constexpr(fmt.POOL_VECTOR)
_NO_VECTOR = tl.constexpr(fmt.NO_VECTOR)
_AHEAD = tl.constexpr(TOKENS_AHEAD)


def pool(hidden: Tensor, pools: Tensor, sums: Tensor, vectors: Tensor, *, last_tokens_from: int | None) -> None:
    """As `reference.pool.pool`, on CUDA tensors; hidden float32, float16 or bfloat16, its columns
    and all of the others contiguous.
    """
    size = hidden.shape[1]
    _pool_kernel[(pools.shape[0], triton.cdiv(size, COLUMNS))](
        hidden, pools, sums, vectors, size, hidden.stride(0), last_tokens_from or 0,
        LAST_TOKENS=last_tokens_from is not None, COLUMNS=COLUMNS, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


# Where the plan's records and the vectors begin depends on the step: aligned or not, it is one variant.
@triton.jit(do_not_specialize=["pools_ptr", "vectors_ptr", "last_tokens_from"])
def _pool_kernel(
    hidden_ptr, pools_ptr, sums_ptr, vectors_ptr, size, hidden_stride, last_tokens_from,
    LAST_TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (record, columns)."""
    record_ptr = pools_ptr + tl.program_id(0) * _WORDS
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns < size
    first = tl.load(record_ptr + _START)
    if LAST_TOKENS:
        first = last_tokens_from + tl.load(record_ptr + _ROW)
    hidden_ptr += first.to(tl.int64) * hidden_stride
    sum_ptr = sums_ptr + tl.load(record_ptr + _SLOT).to(tl.int64) * size + columns
    total = tl.where(tl.load(record_ptr + _BEGINS) == 0, tl.load(sum_ptr, mask=exists, other=0.0), 0.0)
    for _ in tl.range(0, tl.load(record_ptr + _LEN), loop_unroll_factor=_AHEAD):
        total += tl.load(hidden_ptr + columns, mask=exists, other=0.0).to(tl.float32)
        hidden_ptr += hidden_stride
    vector = tl.load(record_ptr + _VECTOR)
    if vector == _NO_VECTOR:
        tl.store(sum_ptr, total, mask=exists)
    else:
        mean = tl.div_rn(total, tl.load(record_ptr + _COUNT).to(tl.float32))
        tl.store(vectors_ptr + vector.to(tl.int64) * size + columns, mean, mask=exists)
