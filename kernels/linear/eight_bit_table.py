"""Which kernel serves an 8-bit linear, by shape and number of tokens: measured on an H100."""

from typing import NamedTuple

import torch


class Gemv(NamedTuple):
    """One token without the matrix unit: block_n output channels a program."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    pdl: bool  # starts while its predecessor ends, and lets its successor start once all weights are read


class Warps(NamedTuple):
    """Few output channels a program, K dealt out over its warps."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    pdl: bool


class Tile(NamedTuple):
    """64 or more output channels a program, K split over `parts` programs."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    parts: int
    pdl: bool


class Matmul(NamedTuple):
    """Tiles of tokens and output channels, both by the copy engine: W8A8 only."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    pdl: bool


class Library(NamedTuple):
    """torch's product: of fp8 by fp8, and of weights dequantised to the activations' dtype."""


Config = Gemv | Warps | Tile | Matmul | Library


TOKEN_LIMITS = (1, 8, 16, 32, 64, 128, 256, 1024, 2048)  # tokens: the first that holds them, else the last


GROUPED_TOKEN_LIMITS = (16, 32, 64, 128, 256)
"""Of `eight_bit_grouped.py`: beyond each another variant of its kernel serves, beyond the last
cuBLAS.
"""


class _Choice(NamedTuple):
    """The kernels of a kind of linear in a bucket."""

    narrow: Config  # up to 8192 output channels, unless listed
    wide: Config
    listed: dict[tuple[int, int], Config]  # by (output channels, K): where another is at least 1.5 % faster


# Medians on an H100 80 GB, weights cold (`bench/kernels/linear_8bit.py` prints a step;
# `bench/LOG.md` has the sweeps).

# 16-bit activations from 16 tokens on: int8 and fp8 are converted alike, so one choice serves both.
_W8A16_MANY: tuple[_Choice, ...] = (
    # 16
    _Choice(Warps(16, 32, 512, 4, 4, False), Warps(16, 32, 512, 4, 3, False), {}),
    # 32
    _Choice(
        Tile(32, 64, 256, 4, 4, 2, False),
        Tile(32, 64, 128, 4, 4, 1, False),
        {(4096, 4096): Warps(32, 32, 512, 4, 4, False)},
    ),
    # 64
    _Choice(Tile(64, 128, 128, 8, 4, 4, False), Tile(64, 64, 128, 4, 5, 1, False), {}),
    # 128
    _Choice(Tile(128, 64, 128, 4, 4, 2, False), Tile(128, 64, 128, 4, 4, 1, False), {}),
    # 256
    _Choice(Tile(128, 64, 128, 4, 4, 1, False), Tile(128, 64, 128, 4, 4, 1, False), {}),
    # 1024
    _Choice(Library(), Library(), {}),
    # 2048
    _Choice(Library(), Library(), {}),
)

_TABLE: dict[tuple[torch.dtype, bool], tuple[_Choice, ...]] = {
    (torch.int8, False): (
        # 1
        _Choice(Warps(8, 16, 512, 2, 4, True), Gemv(2, 1024, 1, 4, True), {}),
        # 8
        _Choice(Warps(8, 16, 512, 2, 4, True), Warps(8, 16, 512, 4, 4, True), {}),
        *_W8A16_MANY,
    ),
    (torch.float8_e4m3fn, False): (
        # 1
        _Choice(Gemv(4, 1024, 2, 4, True), Gemv(4, 1024, 1, 3, True), {}),
        # 8
        _Choice(Warps(8, 16, 512, 4, 4, True), Warps(8, 16, 512, 4, 4, True), {}),
        *_W8A16_MANY,
    ),
    (torch.int8, True): (
        # 1
        _Choice(Warps(8, 16, 512, 2, 4, True), Warps(8, 16, 512, 2, 4, True), {}),
        # 8
        _Choice(Warps(8, 16, 512, 4, 4, True), Warps(8, 16, 512, 4, 4, True), {}),
        # 16
        _Choice(Tile(16, 64, 512, 4, 3, 2, True), Tile(16, 64, 256, 4, 4, 1, True), {}),
        # 32
        _Choice(Tile(32, 64, 512, 4, 3, 2, True), Tile(32, 64, 256, 4, 4, 1, True), {}),
        # 64
        _Choice(Tile(64, 64, 256, 4, 4, 2, True), Tile(64, 64, 128, 4, 5, 1, True), {}),
        # 128
        _Choice(Matmul(128, 64, 128, 4, 5, True), Matmul(128, 64, 128, 4, 4, True), {}),
        # 256
        _Choice(
            Matmul(128, 64, 128, 4, 5, True),
            Matmul(128, 128, 128, 8, 5, True),
            {(12288, 4096): Matmul(256, 128, 128, 8, 4, True)},
        ),
        # 1024
        _Choice(Matmul(128, 128, 128, 8, 3, True), Matmul(128, 128, 128, 8, 3, True), {}),
        # 2048
        _Choice(
            Matmul(128, 256, 128, 8, 4, True),
            Matmul(128, 128, 128, 4, 3, True),
            {(4096, 4096): Matmul(128, 128, 128, 4, 3, True)},
        ),
    ),
    (torch.float8_e4m3fn, True): (
        # 1
        _Choice(Warps(8, 16, 512, 2, 4, True), Warps(8, 16, 512, 2, 4, True), {}),
        # 8
        _Choice(Warps(8, 16, 512, 4, 4, True), Warps(8, 16, 512, 4, 4, True), {}),
        # 16
        _Choice(Tile(16, 64, 512, 4, 3, 2, True), Tile(16, 64, 256, 4, 4, 1, True), {}),
        # 32
        _Choice(Tile(32, 64, 512, 4, 3, 2, True), Tile(32, 64, 256, 4, 4, 1, True), {}),
        # 64
        _Choice(Tile(64, 64, 256, 4, 4, 2, True), Tile(64, 64, 128, 4, 5, 1, True), {}),
        # 128
        _Choice(Library(), Library(), {}),
        # 256
        _Choice(Library(), Library(), {}),
        # 1024
        _Choice(Library(), Library(), {}),
        # 2048
        _Choice(Library(), Library(), {}),
    ),
}


def choose(weight_dtype: torch.dtype, w8a8: bool, tokens: int, channels: int, size: int) -> Config:
    """The kernel for `tokens` activations and weights [channels, size]."""
    bucket = next((index for index, most in enumerate(TOKEN_LIMITS) if tokens <= most), len(TOKEN_LIMITS) - 1)
    choice = _TABLE[weight_dtype, w8a8][bucket]
    return choice.listed.get((channels, size), choice.narrow if channels <= 8192 else choice.wide)
