"""The linears with 8-bit weights, compiled for an H100 without one (`compile_sm90.py`)."""

import itertools
from collections.abc import Callable, Iterator

import torch
from tests.kernels.compile_sm90 import meta, report

from octavo.kernels.linear import eight_bit, eight_bit_grouped

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SHAPES = [(12288, 4096), (4096, 11008), (576, 576)]
TOKENS = (1, 16, 32, 128, 2048)


def linear_case(tokens: int, shape: tuple[int, int], dtype: torch.dtype, half: torch.dtype, w8a8: bool) -> None:
    weight, scale = meta(*shape, dtype=dtype), meta(shape[0], dtype=torch.float32)
    if w8a8:
        x, x_scale = meta(tokens, shape[1], dtype=dtype), meta(tokens, dtype=torch.float32)
        eight_bit.linear_w8a8(x, x_scale, weight, scale, half)
    else:
        eight_bit.linear_w8a16(meta(tokens, shape[1], dtype=half), weight, scale)


def grouped_case(tokens: int, group: int, zeros: bool) -> None:
    weight, scales = meta(4096, 11008, dtype=torch.int8), meta(4096, 11008 // group, dtype=torch.float32)
    points = meta(*scales.shape, dtype=torch.int16) if zeros else None
    eight_bit_grouped.linear_w8a16_grouped(meta(tokens, 11008), weight, scales, points)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for (name, dtype), w8a8, tokens, shape in itertools.product(EIGHT_BITS.items(), (False, True), TOKENS, SHAPES):
        yield (
            f"linear {name} {'w8a8' if w8a8 else 'w8a16'} {tokens} {shape}",
            lambda n=tokens, s=shape, t=dtype, a=w8a8: linear_case(n, s, t, torch.bfloat16, a),
        )

    for tokens, (group, zeros) in itertools.product((1, 64, 256), ((128, False), (32, True), (11008, True))):
        yield f"grouped {tokens} g{group}", lambda n=tokens, g=group, z=zeros: grouped_case(n, g, z)
    yield "grouped dequantise", lambda: grouped_case(257, 128, True)


def main() -> None:
    report(cases(), launches_a_case=None)


if __name__ == "__main__":
    main()
