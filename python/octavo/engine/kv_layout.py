"""The paged KV cache in bytes: how large a block is, the pool's tensors, and what the layers see of
them.

All that depends on how keys and values are kept is `dtypes` here and the views of `split_cache`:
blocks are counted and copied as bytes, and attention takes numbers, or codes and their scales.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.engine import host_memory
from octavo.kernels.attention.kv_block import FORMAT_NAMES, block_bytes, split_cache
from octavo.models.registry import Model

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,
}
"""Values of `EngineConfig.kv_cache_dtype` -> the dtype of the numbers or codes in the pages."""

FP8_CAPABILITY = (8, 9)  # of the first GPUs that convert to fp8


def refuse_kv_dtype_of_device(wanted: str, device: torch.device) -> None:
    """Raises ValueError if the device cannot keep keys and values as `kv_cache_dtype = wanted`,
    whatever the model.
    """
    if DTYPES.get(wanted) != torch.float8_e4m3fn:
        return
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            raise ValueError(
                f"kv_cache_dtype = {wanted}: needs a GPU of compute capability 8.9 or later, and "
                f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: use --kv-cache-dtype int8"
            )
        return
    try:
        torch.ones(1, device=device).to(torch.float8_e4m3fn).float()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"kv_cache_dtype = {wanted}: this PyTorch ({torch.__version__}) cannot convert to fp8 on a CPU "
            f"({error}): use --kv-cache-dtype int8"
        ) from None


def pick_kv_dtype(wanted: str, *, model_dtype: torch.dtype, head_dim: int, device: torch.device) -> torch.dtype:
    """The dtype of the pages for `kv_cache_dtype = wanted`, of a model that computes in
    `model_dtype`. Raises ValueError if its shape or dtype do not go with it.
    """
    if wanted == "auto":
        return model_dtype
    dtype = DTYPES[wanted]
    if dtype == torch.uint8 and head_dim % 4:
        raise ValueError(
            f"kv_cache_dtype = {wanted}: needs heads of a multiple of 4 components, as many as fill 16 bits, and the "
            f"model's head_dim is {head_dim}: use --kv-cache-dtype int8"
        )
    if dtype not in FORMAT_NAMES and dtype != model_dtype and device.type == "cuda":
        name = str(model_dtype).removeprefix("torch.")
        raise ValueError(
            f"kv_cache_dtype = {wanted}: on a GPU keys and values without scales have the model's type, {name}: "
            f"use --kv-cache-dtype auto, or --dtype {wanted}"
        )
    return dtype


@dataclass(frozen=True)
class KvLayout:
    """One pool of blocks that all groups of layers draw from; a block has room in every layer of
    its group.
    """

    num_groups: int
    num_kv_heads: int
    block_size: int  # tokens
    head_dim: int
    dtypes: tuple[torch.dtype, ...]  # of the numbers or codes in the pages of each layer of a group

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        block_size: int,
        dtype: torch.dtype,
        plain_dtype: torch.dtype | None = None,
        plain_layers: Collection[int] = (),
    ) -> KvLayout:
        """Of a model's layers, in blocks of `block_size` tokens.

        plain_layers: have pages of `plain_dtype`, and so do those that share a place of the pool with
        one.
        """
        places: dict[int, torch.dtype] = {}
        for group in model.kv_groups:
            for place, layer in enumerate(group.layers):
                if plain_dtype is not None and layer in plain_layers:
                    places[place] = plain_dtype
                places.setdefault(place, dtype)
        return cls(
            num_groups=len(model.kv_groups),
            num_kv_heads=model.config.num_kv_heads,
            block_size=block_size,
            head_dim=model.config.head_dim,
            dtypes=tuple(places[place] for place in range(len(places))),
        )

    @property
    def dtype_name(self) -> str:
        """The dtypes as `kv_cache_dtype` calls them, that of most layers first."""
        counts = Counter(FORMAT_NAMES.get(dtype, str(dtype).removeprefix("torch.")) for dtype in self.dtypes)
        return " and ".join(name for name, _ in counts.most_common())

    @property
    def layer_bytes(self) -> list[int]:
        """Bytes of one block in each layer of a group: keys, values and, beside codes, their scales."""
        return [block_bytes(self.num_kv_heads, self.block_size, self.head_dim, dtype) for dtype in self.dtypes]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers of a group."""
        return sum(self.layer_bytes)

    def allocate(self, num_blocks: int, device: torch.device) -> list[Tensor]:
        """The pool, zeroed: a tensor [num_blocks, layer_bytes] uint8 for each layer of a group."""
        shapes = [(num_blocks, size) for size in self.layer_bytes]
        if device.type == "cpu":
            return [host_memory.zeros(shape, torch.uint8) for shape in shapes]
        return [torch.zeros(shape, dtype=torch.uint8, device=device) for shape in shapes]

    def pages(self, pool: list[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """Views of each of the pool's tensors: (kv_cache, kv_scales) as `split_cache` makes them."""
        return [
            split_cache(blocks, self.num_kv_heads, self.block_size, self.head_dim, dtype)
            for blocks, dtype in zip(pool, self.dtypes, strict=True)
        ]
