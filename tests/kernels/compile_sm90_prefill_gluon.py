"""Prefill attention in Gluon and what widens codes for it, compiled for an H100 without one
(`compile_sm90.py`).
"""

from collections.abc import Callable, Iterator

import torch
from tests.kernels.compile_sm90 import TYPES, ints, meta, pages, report, rows_of_a_step

from octavo.kernels.attention import kv_block, prefill_gluon, widen


def prefill_gluon_case(dim: int, block_size: int, window: int, dtype: torch.dtype, widened: bool = False) -> None:
    q, cache = meta(512, 32, dim, dtype=dtype), meta(32, 2, 8, block_size, dim, dtype=dtype)
    first_rows = ints(1) if widened else None
    prefill_gluon.prefill_attention(q, cache, ints(64, 64), *rows_of_a_step(32), 512, 0.1, window, first_rows)


def widen_case(dim: int, block_size: int, window: int, dtype: torch.dtype, codes: torch.dtype) -> None:
    cache, scales = pages((32, 8, dim), block_size, codes)
    assert scales is not None
    widen.widen(cache, scales, ints(64, 64), *rows_of_a_step(32), window, dtype, 100)


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
    yield "prefill_gluon bf16 128 page 64 widened", lambda: prefill_gluon_case(128, 64, 0, bf16, widened=True)
    for codes, name in kv_block.FORMAT_NAMES.items():
        yield f"widen {name} to bf16 128 page 64", lambda c=codes: widen_case(128, 64, 0, bf16, c)
        yield f"widen {name} to fp16 64 page 16 window", lambda c=codes: widen_case(64, 16, 4096, fp16, c)


def main() -> None:
    report(cases())


if __name__ == "__main__":
    main()
