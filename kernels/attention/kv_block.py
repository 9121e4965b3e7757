"""How a block of KV bytes is cut: `[K | V | K scales | V scales]`, the scales only beside codes.

K and V are `[num_kv_heads, block_size, head_dim]` each, numbers or codes (`kv_quant.py`); scales
are float32, one a token and head. Knows no Triton, so that a CPU needs none.
"""

import torch
from torch import Tensor

#: The dtype of codes -> the code that the component of largest magnitude gets.
EXTREMES = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0, torch.uint8: -8.0}

#: The dtype of codes -> the name of their format.
FORMAT_NAMES = {torch.float8_e4m3fn: "fp8", torch.int8: "int8", torch.uint8: "int4"}


def block_bytes(num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block of one layer, for a cache of `dtype` (16- and 32-bit floats have no
    scales).
    """
    vectors = 2 * num_kv_heads * block_size
    if dtype not in EXTREMES:
        return vectors * head_dim * dtype.itemsize
    return vectors * (head_dim // 2 if dtype == torch.uint8 else head_dim) + vectors * torch.float32.itemsize


def split_cache(
    blocks: Tensor, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Views of one layer's pages: what the attention ops and `rope_and_cache` take.

    blocks [num_blocks, block_bytes(...)] uint8, whose blocks may be strided (by a multiple of 16
    bytes). Returns (kv_cache [num_blocks, 2, Hkv, block_size, D, or D / 2 if dtype is uint8] of
    dtype, kv_scales [num_blocks, 2, Hkv, block_size] float32, or None for 16- and 32-bit floats).

    Raises ValueError if a block has not the bytes it should have, or for 4 bits if head_dim is odd.
    """
    expected = block_bytes(num_kv_heads, block_size, head_dim, dtype)
    if blocks.shape[1] != expected:
        raise ValueError(
            f"split_cache: blocks of {blocks.shape[1]} bytes, but {num_kv_heads} KV heads x {block_size} tokens x "
            f"{head_dim} components of {dtype} take {expected}"
        )
    if dtype == torch.uint8 and head_dim % 2:
        raise ValueError(f"split_cache: 4-bit codes come in pairs, but head_dim is {head_dim}")
    vectors = 2 * num_kv_heads * block_size
    scale_bytes = vectors * torch.float32.itemsize if dtype in EXTREMES else 0
    codes = blocks[:, : expected - scale_bytes].view(dtype).unflatten(1, (2, num_kv_heads, block_size, -1))
    if not scale_bytes:
        return codes, None
    scales = blocks[:, expected - scale_bytes :].view(torch.float32).unflatten(1, (2, num_kv_heads, block_size))
    return codes, scales
