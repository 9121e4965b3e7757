"""Compiles the fused GEMVs for an H100 without one, as `compile_sm90.py` does the other ops."""

from collections.abc import Callable, Iterator

import torch
from tests.kernels.compile_sm90 import TYPES, meta, report

from octavo.kernels.linear import fused_gemv


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    llamas = [(12288, 4096), (4096, 11008), (57344, 8192), (8192, 28672)]
    variants = [(torch.bfloat16, rows, size) for rows in (1, 2, 4) for size in llamas]
    variants += [(torch.float32, rows, (960, 576)) for rows in (1, 4)]
    for dtype, rows, (channels, size) in variants:
        x, weight, norm = meta(rows, size, dtype=dtype), meta(channels, size, dtype=dtype), meta(size, dtype=dtype)
        residual = meta(rows, channels, dtype=dtype)
        name = f"{TYPES[dtype]} {rows} x {channels} x {size}"
        yield f"norm_linear {name}", lambda x=x, n=norm, w=weight: fused_gemv.norm_linear(x, n, w, 1e-5)
        yield f"norm_linear_silu {name}", lambda x=x, n=norm, w=weight: fused_gemv.norm_linear_silu(x, n, w, 1e-5)
        yield f"linear_silu {name}", lambda x=x, w=weight: fused_gemv.linear_silu(x, w)
        yield f"linear_add {name}", lambda x=x, w=weight, r=residual: fused_gemv.linear_add(x, w, r)


def main() -> None:
    report(cases())


if __name__ == "__main__":
    main()
