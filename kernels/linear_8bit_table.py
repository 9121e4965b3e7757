"""Which kernel serves an 8-bit linear, by shape and number of tokens."""

from typing import NamedTuple

import torch


class Gemv(NamedTuple):
    """One token without the matrix unit: block_n output channels a program."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    prefetch: int  # bytes of each weight row asked for before the predecessor ends


class Warps(NamedTuple):
    """Few output channels a program, K dealt out over its warps."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    prefetch: int


class Tile(NamedTuple):
    """Many output channels a program, K split over `parts` programs."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    prefetch: int
    parts: int


class Stream(NamedTuple):
    """W8A8 on Hopper: every multiprocessor takes an equal stretch of the weights."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    registers: int  # of a thread
    per_multiprocessor: int  # programs
    split: bool  # stretches may begin and end within a tile
    weight_rows: bool  # the matrix unit takes 64 output channels at a time, not tokens
    trigger: int


class Library(NamedTuple):
    """torch's product: of fp8 as it is, of weights dequantised to the activations' dtype otherwise."""


Config = Gemv | Warps | Tile | Stream | Library


def fallback(tokens: int) -> Config:
    """For what the others do not take: unaligned rows, cards that are not Hoppers."""
    if tokens <= 16:
        return Warps(8 if tokens <= 8 else 16, 32, 512, 4, 4, 0)
    return Tile(64 if tokens > 32 else 32, 64, 128, 4, 4, 0, 1)


def choose(weight_dtype: torch.dtype, w8a8: bool, tokens: int, channels: int, size: int) -> Config:
    """The kernel for weights [channels, size]."""
    if w8a8:
        return Stream(8, 64, 128, 4, 11, 128, 1, True, True, 1)
    if tokens == 1:
        return Gemv(4, 1024, 1, 3, 0)
    if tokens <= 8:
        return Warps(8, 16, 512, 4, 4, 0)
    return Stream(16, 128, 128, 8, 5, 80, 1, True, True, 1)
