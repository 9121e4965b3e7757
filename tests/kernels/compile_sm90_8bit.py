"""Compiles every 8-bit variant for an H100 without one, as `compile_sm90.py` does the model's other ops.

`python -m tests.kernels.compile_sm90_8bit [name part]` prints registers, spills and shared memory of each launch; the
test of `test_compile_sm90.py` runs it with `--json`.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from tests.kernels.compile_sm90 import TYPES, meta, report

from octavo.kernels.linear import eight_bit
from octavo.kernels.pointwise import activation, norm, quantize

TYPES.update({torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"})
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


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for (name, dtype), size in itertools.product(EIGHT_BITS.items(), (4096, 28672)):
        x, weight = meta(32, size), meta(size)
        yield f"quantize_rows {name} {size}", lambda x=x, t=dtype: quantize.quantize_rows(x, t)
        if size <= 8192:
            yield f"rms_norm_quant {name} {size}", lambda x=x, w=weight, t=dtype: norm.rms_norm_quant(x, w, 1e-5, t)
            yield (
                f"add_rms_norm_quant {name} {size}",
                lambda x=x, w=weight, t=dtype: norm.add_rms_norm_quant(x, x, w, 1e-5, t),
            )
        gated = meta(32, 2 * size)
        yield f"silu_and_mul_quant {name} {size}", lambda x=gated, t=dtype: activation.silu_and_mul_quant(x, t)
    for (name, dtype), w8a8, tokens, shape in itertools.product(EIGHT_BITS.items(), (False, True), TOKENS, SHAPES):
        yield (
            f"linear {name} {'w8a8' if w8a8 else 'w8a16'} {tokens} {shape}",
            lambda n=tokens, s=shape, t=dtype, a=w8a8: linear_case(n, s, t, torch.bfloat16, a),
        )


def main() -> None:
    report(cases(), launches_a_case=None)


if __name__ == "__main__":
    main()
