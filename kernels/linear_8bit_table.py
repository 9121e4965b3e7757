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


Config = Gemv | Warps | Tile | Library


def choose(weight_dtype: torch.dtype, w8a8: bool, tokens: int, channels: int, size: int) -> Config:
    if tokens == 1 and not w8a8:
        return Gemv(4, 512, 1, 4, 2048)
    if tokens <= 16:
        return Warps(8 if tokens <= 8 else 16, 16, 512, 4, 4, 1024)
    return Tile(64, 64, 128, 4, 4, 512, 2)
