"""Decode attention, compiled for an H100 without one (`compile_sm90.py`): every way to cut its
tiles in each dtype.

Other shapes differ in numbers that are multiplied and divided by; (64, 8, 128) x4 has the tiles of
(32, 8, 128) x8.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tests.kernels.compile_sm90 import TYPES, ints, meta, pages, report

from octavo.kernels.attention import decode, kv_block


def decode_case(
    heads: tuple[int, int, int], block_size: int, query_len: int, dtype: torch.dtype, kv: torch.dtype, **options: Any
) -> None:
    cache, scales = pages(heads, block_size, kv)
    q = meta(32 * query_len, heads[0], heads[2], dtype=dtype)
    rows = (ints(64, 64), ints(32), ints(32))
    decode.decode_attention(q, cache, *rows, query_len, 0.1, kv_scales=scales, **options)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    starts = {"query_start_loc": ints(33)}
    # heads (of queries, of keys, their size), page, dtype of q, dtype of the cache, tokens a row,
    # options
    for heads, block_size, dtype, kv, query_lens, options in (
        ((32, 8, 128), 64, bf16, bf16, (1, 4, 8), {}),
        ((32, 8, 128), 64, bf16, bf16, (1, 4, 8), starts),
        ((32, 8, 128), 64, bf16, bf16, (8,), starts | {"window": 4096}),
        ((32, 8, 128), 16, bf16, bf16, (1, 4), {}),
        ((32, 32, 128), 64, bf16, bf16, (1, 8), {}),
        ((64, 8, 128), 64, bf16, bf16, (1, 8), {}),
        ((9, 3, 64), 16, bf16, bf16, (1,), {}),
        ((9, 3, 64), 16, fp32, fp32, (1,), {}),
        ((16, 8, 256), 64, bf16, bf16, (1,), {"window": 4096, "soft_cap": 50.0}),
        ((8, 4, 256), 64, bf16, bf16, (1,), {"window": 1024}),
        ((32, 32, 96), 64, fp16, fp16, (1,), {"window": 2047}),
        ((32, 32, 80), 64, bf16, bf16, (1,), {}),
        ((32, 8, 128), 64, fp32, fp32, (1, 8), {}),
        *(((32, 8, 128), 64, bf16, kv, (1,), {}) for kv in kv_block.EXTREMES),
        ((8, 4, 256), 64, bf16, torch.float8_e4m3fn, (1,), {}),
        ((9, 3, 64), 16, fp16, torch.uint8, (1,), {}),
    ):
        for query_len in query_lens:
            yield (
                f"decode_attention {TYPES[dtype]} {TYPES[kv]} {heads} page {block_size} x{query_len}"
                f"{''.join(f' {name}' for name in options)}",
                functools.partial(decode_case, heads, block_size, query_len, dtype, kv, **options),
            )


def main() -> None:
    report(cases())


if __name__ == "__main__":
    main()
