"""Block copies against plain indexing: whole blocks of bytes, and nothing between or beside them."""

import pytest
import torch

from octavo.kernels.attention import copy_blocks as kernels


@pytest.mark.parametrize("size", [16, 8192, 8208, 19 * 1024 + 4])
def test_copy_blocks(device, size) -> None:
    caches = [torch.randint(256, (7, size + 32), dtype=torch.uint8, device=device) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    blocks = [cache[:, :size] for cache in caches]
    kernels.copy_blocks(blocks, torch.tensor([[1, 4], [1, 5], [2, 0]], dtype=torch.int32, device=device))
    kernels.copy_blocks(blocks, torch.zeros(0, 2, dtype=torch.int32, device=device))
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[:, :size], old[[2, 1, 2, 3, 1, 1, 6], :size])
        assert torch.equal(cache[:, size:], old[:, size:])
