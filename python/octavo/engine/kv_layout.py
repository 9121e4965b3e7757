"""The paged KV cache in bytes: how large a block is, the pool's tensors, and what the layers see of
them.

All that depends on how keys and values are kept is `dtype` here and the views of `split_cache`:
blocks are counted and copied as bytes, and attention takes numbers, or codes and their scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.engine import host_memory
from octavo.kernels.attention.kv_block import block_bytes, split_cache
from octavo.models.registry import Model


@dataclass(frozen=True)
class KvLayout:
    """One pool of blocks that all groups of layers draw from; a block has room in every layer of
    its group.
    """

    num_groups: int
    layers_per_group: int
    num_kv_heads: int
    block_size: int  # tokens
    head_dim: int
    dtype: torch.dtype  # of the numbers or codes in the pages

    @classmethod
    def of(cls, model: Model, *, block_size: int, dtype: torch.dtype) -> KvLayout:
        """Of a model's layers, in blocks of `block_size` tokens."""
        return cls(
            num_groups=len(model.kv_groups),
            layers_per_group=max(len(group.layers) for group in model.kv_groups),
            num_kv_heads=model.config.num_kv_heads,
            block_size=block_size,
            head_dim=model.config.head_dim,
            dtype=dtype,
        )

    @property
    def layer_bytes(self) -> int:
        """Bytes of one block in one layer: keys, values and, beside codes, their scales."""
        return block_bytes(self.num_kv_heads, self.block_size, self.head_dim, self.dtype)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers of a group."""
        return self.layers_per_group * self.layer_bytes

    def allocate(self, num_blocks: int, device: torch.device) -> list[Tensor]:
        """The pool, zeroed: a tensor [num_blocks, layer_bytes] uint8 for each layer of a group."""
        shape = (num_blocks, self.layer_bytes)
        if device.type == "cpu":
            return [host_memory.zeros(shape, torch.uint8) for _ in range(self.layers_per_group)]
        return [torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(self.layers_per_group)]

    def pages(self, pool: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """Views of each of the pool's tensors: (kv_cache, kv_scales) as `split_cache` makes them."""
        return [split_cache(blocks, self.num_kv_heads, self.block_size, self.head_dim, self.dtype) for blocks in pool]
