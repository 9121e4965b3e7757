"""Block copies against plain indexing."""

import torch

from octavo.kernels.attention import copy_blocks as kernels


def test_copy_blocks(device, kernel_dtype) -> None:
    caches = [torch.randn(7, 2, 3, 16, 40, device=device).to(kernel_dtype) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    kernels.copy_blocks(caches, torch.tensor([[1, 4], [1, 5], [2, 0]], dtype=torch.int32, device=device))
    kernels.copy_blocks(caches, torch.zeros(0, 2, dtype=torch.int32, device=device))
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache, old[[2, 1, 2, 3, 1, 1, 6]])
