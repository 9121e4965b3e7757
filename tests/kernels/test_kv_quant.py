"""The layout of quantised blocks, and the twin's quantisation against plain arithmetic."""

import pytest
import torch
from tests.kernels.kv_codes import KV_DTYPES

from octavo.kernels.attention import kv_block
from octavo.kernels.reference import layers as reference


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 2 * 3 * 16 * 64 * 2),
        (torch.int8, 2 * 3 * 16 * (64 + 4)),
        (torch.float8_e4m3fn, 2 * 3 * 16 * (64 + 4)),
        (torch.uint8, 2 * 3 * 16 * (32 + 4)),
    ],
)
def test_views_tile_the_block(dtype, size) -> None:
    assert kv_block.block_bytes(3, 16, 64, dtype) == size
    blocks = torch.zeros(4, size + 32, dtype=torch.uint8)
    cache, scales = kv_block.split_cache(blocks[:, :size], 3, 16, 64, dtype)
    assert cache.shape == (4, 2, 3, 16, 32 if dtype == torch.uint8 else 64)
    cache[2, 1].view(torch.uint8).fill_(1)  # V of block 2
    values = size if scales is None else size - 2 * 3 * 16 * 4
    expected = torch.zeros_like(blocks)
    expected[2, values // 2 : values] = 1
    if scales is not None:
        assert scales.shape == (4, 2, 3, 16)
        scales[2, 0].view(torch.uint8).fill_(2)  # scales of K
        expected[2, values : values + (size - values) // 2] = 2
    assert torch.equal(blocks, expected)


def test_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="blocks of 100 bytes"):
        kv_block.split_cache(torch.zeros(4, 100, dtype=torch.uint8), 3, 16, 64, torch.int8)
    size = kv_block.block_bytes(1, 16, 33, torch.uint8)
    with pytest.raises(ValueError, match="head_dim is 33"):
        kv_block.split_cache(torch.zeros(4, size, dtype=torch.uint8), 1, 16, 33, torch.uint8)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_twin_is_near(dtype) -> None:
    x = torch.randn(50, 64)
    x[0] = 0.0
    x[1] *= 1e-6
    codes, scales = reference.quantise_kv(x, dtype)
    back = reference.dequantise_kv(codes, scales)
    largest = x.abs().amax(-1, keepdim=True)
    # Half a step: fp8 has one of 32 below 448; the 4-bit format clips one side by a step.
    step = {torch.float8_e4m3fn: 32 / 448, torch.int8: 1 / 127, torch.uint8: 1 / 4}[dtype] / 2
    assert ((back - x).abs() <= 1.05 * step * largest).all()
    assert (back[0] == 0).all()
    relative = (back - x).norm() / x.norm()
    assert relative < {torch.float8_e4m3fn: 0.03, torch.int8: 0.01, torch.uint8: 0.12}[dtype]
