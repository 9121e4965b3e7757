"""Copies whole KV blocks, for requests that fork: one launch a cache tensor, as forks are rare and
tensors are few. Blocks are bytes here, whatever is in them.
"""

import triton
import triton.language as tl
from torch import Tensor

# 8 KiB by 8 warps: two 16-byte loads a thread. A block of 8 heads x 64 x 128 in bf16 is 32 programs
# a pair.
_BLOCK = 8192


@triton.jit
def _copy_blocks_kernel(
    # pointers
    cache_ptr,  # [num_blocks, size] bytes
    pairs_ptr,  # [N, 2] int32
    # dimensions and strides, in bytes
    size,
    block_stride,
    # meta-parameters
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(pairs_ptr + 2 * pair).to(tl.int64)
    destination = tl.load(pairs_ptr + 2 * pair + 1).to(tl.int64)
    inside = byte < size
    values = tl.load(cache_ptr + source * block_stride + byte, mask=inside)
    tl.store(cache_ptr + destination * block_stride + byte, values, mask=inside)


def copy_blocks(kv_caches: list[Tensor], pairs: Tensor) -> None:
    """kv_caches: [num_blocks, bytes] uint8 each, every block contiguous; pairs [N, 2] int32 =
    (source, destination), contiguous.

    No block may be both a source and a destination: the pairs are copied in no order.
    """
    if pairs.shape[0] == 0:
        return
    for cache in kv_caches:
        size = cache.shape[1]
        grid = (pairs.shape[0], triton.cdiv(size, _BLOCK))
        _copy_blocks_kernel[grid](cache, pairs, size, cache.stride(0), _BLOCK, num_warps=8, enable_fp_fusion=True)
