"""Norms, activations, quantising, rotary and block copies, compiled for an H100 without one
(`compile_sm90.py`).
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from tests.kernels.compile_sm90 import TYPES, ints, meta, pages, report

from octavo.kernels.attention import copy_blocks, kv_block, rope
from octavo.kernels.pointwise import activation, norm, quantize


def rope_case(heads: tuple[int, int, int], rotary: int, norms: bool, kv_dtype: torch.dtype) -> None:
    num_q, num_kv, dim = heads
    q, k = meta(32, num_q, dim), meta(32, num_kv, dim)
    weight = meta(dim) if norms else None
    cache, scales = pages(heads, 64, kv_dtype)
    table, index = meta(32, rotary, dtype=torch.float32), meta(32, dtype=torch.int64)
    rope.rope_and_cache(q, k, k, index, table, cache, index, weight, weight, kv_scales=scales)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, hidden in itertools.product((bf16, fp32), (576, 4096, 8192)):
        x, weight = meta(32, hidden, dtype=dtype), meta(hidden, dtype=dtype)
        yield f"rms_norm {TYPES[dtype]} {hidden}", lambda x=x, w=weight: norm.rms_norm(x, w, 1e-5)
        yield f"add_rms_norm {TYPES[dtype]} {hidden}", lambda x=x, w=weight: norm.add_rms_norm(x, x, w, 1e-5)
    for dtype, size in itertools.product((bf16, fp32), (1536, 14336)):
        x = meta(32, 2 * size, dtype=dtype)
        yield f"silu_and_mul {TYPES[dtype]} {size}", lambda x=x: activation.silu_and_mul(x)
        yield f"gelu_tanh_and_mul {TYPES[dtype]} {size}", lambda x=x: activation.gelu_tanh_and_mul(x)
    for dtype, size in itertools.product((torch.int8, torch.float8_e4m3fn), (4096, 28672)):
        x, gated, of = meta(32, size), meta(32, 2 * size), f"{TYPES[dtype]} {size}"
        yield f"quantize_rows {of}", lambda x=x, t=dtype: quantize.quantize_rows(x, t)
        yield f"quantize_static {of}", lambda x=x, t=dtype: quantize.quantize_static(x, meta(1, dtype=fp32), t)
        yield f"silu_and_mul_quant {of}", lambda x=gated, t=dtype: activation.silu_and_mul_quant(x, t)
        yield f"gelu_tanh_and_mul_quant {of}", lambda x=gated, t=dtype: activation.gelu_tanh_and_mul_quant(x, t)
        if size <= 8192:
            weight = meta(size)
            yield f"rms_norm_quant {of}", lambda x=x, w=weight, t=dtype: norm.rms_norm_quant(x, w, 1e-5, t)
            yield f"add_rms_norm_quant {of}", lambda x=x, w=weight, t=dtype: norm.add_rms_norm_quant(x, x, w, 1e-5, t)
    for heads, rotary in (((32, 8, 128), 128), ((9, 3, 64), 64), ((8, 4, 256), 256), ((32, 32, 80), 32)):
        for norms in (False, True):
            name = f"rope_and_cache bf16 {heads} rotary {rotary}{' norms' * norms}"
            yield name, lambda h=heads, r=rotary, n=norms: rope_case(h, r, n, bf16)
        for kv in kv_block.EXTREMES if heads[2] in (80, 128) else ():
            name = f"rope_and_cache {TYPES[kv]} {heads} rotary {rotary} norms"
            yield name, lambda h=heads, r=rotary, k=kv: rope_case(h, r, True, k)
    blocks = meta(32, 2 * 8 * 64 * 128 * 2, dtype=torch.uint8)
    yield "copy_blocks", lambda: copy_blocks.copy_blocks([blocks], ints(4, 2))


def main() -> None:
    report(cases())


if __name__ == "__main__":
    main()
