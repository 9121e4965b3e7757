"""Which kernel serves an 8-bit linear, by shape and number of tokens: measured on an H100."""

from typing import NamedTuple

import torch


class Gemv(NamedTuple):
    """One token without the matrix unit: block_n output channels a program."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    pdl: int  # 0: starts when its predecessor has ended; 1: its successor starts at once, 2: after the loop


class Warps(NamedTuple):
    """Few output channels a program, K dealt out over its warps."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    pdl: int


class Tile(NamedTuple):
    """64 or more output channels a program, K split over `parts` programs."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    parts: int
    pdl: int


class Matmul(NamedTuple):
    """Tiles of tokens and output channels, both by the copy engine: W8A8 only."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    pdl: int


class Library(NamedTuple):
    """torch's product: of fp8 with one scale for all, of weights dequantised to the activations' dtype."""


Config = Gemv | Warps | Tile | Matmul | Library


def choose(weight_dtype: torch.dtype, w8a8: bool, tokens: int, channels: int, size: int) -> Config:
    """The kernel for weights [channels, size]."""
    if tokens == 1 and not w8a8:
        return Gemv(4, 1024, 1, 3, 1)
    if tokens <= 8:
        return Warps(8, 16, 512, 4, 4, 1)
    if tokens <= 16:
        return Warps(16, 32, 512, 4, 4, 1)
    if not w8a8:
        return Library() if tokens >= 1024 else Tile(64, 64, 128, 4, 4, 1, 1)
    if tokens <= 64:
        return Tile(32 if tokens <= 32 else 64, 64, 256, 4, 4, 1, 1)
    return Matmul(128, 128, 128, 8, 3, 1)
