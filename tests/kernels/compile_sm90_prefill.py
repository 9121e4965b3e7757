"""Prefill attention in Triton, compiled for an H100 without one (`compile_sm90.py`): every tile
size in each dtype.

How many query heads share a KV head is divided by and no more, so one group and none stand for all.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tests.kernels.compile_sm90 import TYPES, ints, meta, pages, report, rows_of_a_step

from octavo.kernels.attention import kv_block, prefill


def prefill_case(
    heads: tuple[int, int, int], block_size: int, dtype: torch.dtype, kv: torch.dtype, **options: Any
) -> None:
    cache, scales = pages(heads, block_size, kv)
    q = meta(512, heads[0], heads[2], dtype=dtype)
    prefill.prefill_attention(q, cache, ints(64, 64), *rows_of_a_step(32), 512, 0.1, kv_scales=scales, **options)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    # heads (of queries, of keys, their size), page, dtype of q, dtype of the cache, options
    for heads, block_size, dtype, kv, options in (
        ((32, 8, 128), 64, bf16, bf16, {}),
        ((32, 8, 128), 16, bf16, bf16, {}),
        ((32, 32, 128), 64, bf16, bf16, {}),
        ((9, 3, 64), 16, bf16, bf16, {}),
        ((9, 3, 64), 16, fp32, fp32, {}),
        ((16, 8, 256), 64, bf16, bf16, {"window": 4096, "soft_cap": 50.0}),
        ((8, 4, 256), 64, bf16, bf16, {"window": 1024}),
        ((32, 32, 96), 64, fp16, fp16, {"window": 2047}),
        ((32, 32, 80), 64, bf16, bf16, {}),
        ((32, 8, 128), 64, fp32, fp32, {}),
        *(((32, 8, 128), 64, bf16, kv, {}) for kv in kv_block.EXTREMES),
        ((8, 4, 256), 64, bf16, torch.float8_e4m3fn, {}),
        ((9, 3, 64), 16, fp16, torch.uint8, {}),
    ):
        yield (
            f"prefill_attention {TYPES[dtype]} {TYPES[kv]} {heads} page {block_size}"
            f"{''.join(f' {name}' for name in options)}",
            functools.partial(prefill_case, heads, block_size, dtype, kv, **options),
        )


def main() -> None:
    report(cases())


if __name__ == "__main__":
    main()
