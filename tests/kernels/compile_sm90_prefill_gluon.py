"""Prefill attention in Gluon, compiled for an H100 without one (`compile_sm90.py`)."""

from collections.abc import Callable, Iterator

import torch
from tests.kernels.compile_sm90 import TYPES, ints, meta, report

from octavo.kernels.attention import prefill_gluon


def prefill_gluon_case(dim: int, block_size: int, window: int, dtype: torch.dtype) -> None:
    q, cache = meta(512, 32, dim, dtype=dtype), meta(32, 2, 8, block_size, dim, dtype=dtype)
    prefill_gluon.prefill_attention(q, cache, ints(64, 64), ints(32), ints(33), ints(32), 512, 0.1, window)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    bf16, fp16 = torch.bfloat16, torch.float16
    for dtype, dim, block_size, window in (
        (bf16, 128, 64, 0),
        (bf16, 128, 64, 4096),
        (bf16, 128, 16, 4096),
        (fp16, 128, 64, 0),
        (bf16, 64, 64, 0),
        (bf16, 64, 16, 4096),
    ):
        name = f"prefill_gluon {TYPES[dtype]} {dim} page {block_size}{' window' * (window > 0)}"
        yield name, lambda d=dim, b=block_size, w=window, t=dtype: prefill_gluon_case(d, b, w, t)


def main() -> None:
    report(cases())


if __name__ == "__main__":
    main()
