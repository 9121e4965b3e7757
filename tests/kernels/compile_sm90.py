"""Compiles every kernel variant for an H100 without having one: registers, spills and shared memory of each.

`python -m tests.kernels.compile_sm90 [name part]` prints the table; `test_compile_sm90.py` runs it with `--json`. The
launchers are called with tensors that have shapes but no memory, and what they would launch is compiled: so exactly the
variants that exist are tested, with their real tile sizes, warps and stages.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.attention import copy_blocks, decode, kv_quant, prefill, prefill_gluon, rope
from octavo.kernels.pointwise import activation, norm

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def pages(heads: tuple[int, int, int], block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    _, num_kv, dim = heads
    blocks = meta(32, kv_quant.block_bytes(num_kv, block_size, dim, dtype), dtype=torch.uint8)
    return kv_quant.split_cache(blocks, num_kv, block_size, dim, dtype)


def rope_case(heads: tuple[int, int, int], rotary: int, norms: bool, kv_dtype: torch.dtype) -> None:
    num_q, num_kv, dim = heads
    q, k = meta(32, num_q, dim), meta(32, num_kv, dim)
    weight = meta(dim) if norms else None
    cache, scales = pages(heads, 64, kv_dtype)
    table, index = meta(32, rotary, dtype=torch.float32), meta(32, dtype=torch.int64)
    rope.rope_and_cache(q, k, k, index, table, cache, index, weight, weight, kv_scales=scales)


def decode_case(
    heads: tuple[int, int, int], block_size: int, query_len: int, dtype: torch.dtype, kv: torch.dtype, **options: Any
) -> None:
    cache, scales = pages(heads, block_size, kv)
    q = meta(32 * query_len, heads[0], heads[2], dtype=dtype)
    rows = (ints(64, 64), ints(32), ints(32))
    decode.decode_attention(q, cache, *rows, query_len, 0.1, kv_scales=scales, **options)


def prefill_case(
    heads: tuple[int, int, int], block_size: int, dtype: torch.dtype, kv: torch.dtype, **options: Any
) -> None:
    cache, scales = pages(heads, block_size, kv)
    q = meta(512, heads[0], heads[2], dtype=dtype)
    prefill.prefill_attention(
        q, cache, ints(64, 64), ints(32), ints(33), ints(32), 512, 0.1, kv_scales=scales, **options
    )


def prefill_gluon_case(dim: int, block_size: int, window: int, dtype: torch.dtype) -> None:
    q, cache = meta(512, 32, dim, dtype=dtype), meta(32, 2, 8, block_size, dim, dtype=dtype)
    prefill_gluon.prefill_attention(q, cache, ints(64, 64), ints(32), ints(33), ints(32), 512, 0.1, window)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, hidden in itertools.product((bf16, fp32), (576, 4096, 8192)):
        x, weight = meta(32, hidden, dtype=dtype), meta(hidden, dtype=dtype)
        yield f"rms_norm {TYPES[dtype]} {hidden}", lambda x=x, w=weight: norm.rms_norm(x, w, 1e-5)
        yield f"add_rms_norm {TYPES[dtype]} {hidden}", lambda x=x, w=weight: norm.add_rms_norm(x, x, w, 1e-5)
    for dtype, size in itertools.product((bf16, fp32), (1536, 14336)):
        x = meta(32, 2 * size, dtype=dtype)
        yield f"silu_and_mul {TYPES[dtype]} {size}", lambda x=x: activation.silu_and_mul(x)
        yield f"gelu_tanh_and_mul {TYPES[dtype]} {size}", lambda x=x: activation.gelu_tanh_and_mul(x)
    for heads, rotary in (((32, 8, 128), 128), ((9, 3, 64), 64), ((8, 4, 256), 256), ((32, 32, 80), 32)):
        for norms in (False, True):
            name = f"rope_and_cache bf16 {heads} rotary {rotary}{' norms' * norms}"
            yield name, lambda h=heads, r=rotary, n=norms: rope_case(h, r, n, bf16)
        for kv in kv_quant.EXTREMES if heads[2] in (80, 128) else ():
            name = f"rope_and_cache {TYPES[kv]} {heads} rotary {rotary} norms"
            yield name, lambda h=heads, r=rotary, k=kv: rope_case(h, r, True, k)
    yield "copy_blocks bf16", lambda: copy_blocks.copy_blocks([meta(32, 2, 8, 64, 128)], ints(4, 2))
    attention = [
        ((32, 8, 128), 64, bf16, bf16, {}),
        ((32, 8, 128), 16, bf16, bf16, {}),
        ((32, 32, 128), 64, bf16, bf16, {}),
        ((64, 8, 128), 64, bf16, bf16, {}),
        ((9, 3, 64), 16, bf16, bf16, {}),
        ((9, 3, 64), 16, fp32, fp32, {}),
        ((16, 8, 256), 64, bf16, bf16, {"window": 4096, "soft_cap": 50.0}),
        ((8, 4, 256), 64, bf16, bf16, {"window": 1024}),
        ((32, 32, 96), 64, fp16, fp16, {"window": 2047}),
        ((32, 32, 80), 64, bf16, bf16, {}),
        ((32, 8, 128), 64, fp32, fp32, {}),
        *(((32, 8, 128), 64, bf16, kv, {}) for kv in kv_quant.EXTREMES),
        ((8, 4, 256), 64, bf16, torch.float8_e4m3fn, {}),
        ((9, 3, 64), 16, fp16, torch.uint8, {}),
    ]
    for heads, block_size, dtype, kv, options in attention:
        name = f"{TYPES[dtype]} {TYPES[kv]} {heads} page {block_size}{''.join(f' {k}' for k in options)}"
        arguments = (dtype, kv)
        yield (
            f"prefill_attention {name}",
            lambda h=heads, b=block_size, a=arguments, o=options: prefill_case(h, b, *a, **o),
        )
        for query_len in (1, 4, 8) if heads[2] == 128 and dtype == kv else (1,):
            yield (
                f"decode_attention {name} x{query_len}",
                lambda h=heads, b=block_size, n=query_len, a=arguments, o=options: decode_case(h, b, n, *a, **o),
            )
    for query_len, window in ((1, 0), (4, 0), (8, 4096)):
        options = {"query_start_loc": ints(33), "window": window}
        yield (
            f"decode_attention bf16 bf16 (32, 8, 128) page 64 x{query_len} ragged{' window' * (window > 0)}",
            lambda n=query_len, o=options: decode_case((32, 8, 128), 64, n, bf16, bf16, **o),
        )
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


def compile_launch(fn: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, int]:
    """Compiles a launch for TARGET; returns registers and spilled bytes a thread, and shared bytes a program."""
    bound = fn.signature.bind(*args, **{name: value for name, value in options.items() if name in fn.arg_names})
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(fn.arg_names, fn.params, strict=True)):
        value = bound.arguments[name]
        specialised = isinstance(value, int) and not isinstance(value, bool) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, GluonDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        aligned = isinstance(value, Tensor) and not parameter.do_not_specialize_on_alignment
        if aligned or (specialised and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    launch_options = {name: value for name, value in options.items() if name not in fn.arg_names}
    variant = repr((fn.fn.__module__, fn.fn.__name__, signature, constants, attributes, launch_options))
    if variant not in _COMPILED:
        source = (GluonASTSource if fn.is_gluon() else ASTSource)(fn, signature, constants, attributes)
        _COMPILED[variant] = resources(triton.compile(source, target=TARGET, options=launch_options))
    return _COMPILED[variant]


_COMPILED: dict[str, dict[str, int]] = {}  # many shapes share a variant


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """What ptxas says a compiled kernel takes, and its matrix instructions."""
    with tempfile.TemporaryDirectory() as folder:
        (ptx := Path(folder) / "kernel.ptx").write_text(kernel.asm["ptx"])
        command = [get_ptxas(TARGET.arch).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", os.devnull]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr)
    return {
        "registers": int(re.search(r"Used (\d+) registers", result.stderr)[1]),
        "spilled": sum(int(number) for number in re.findall(r"(\d+) bytes spill", result.stderr)),
        "shared": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "mma": kernel.asm["ptx"].count("mma.sync"),
        "warps": kernel.metadata.num_warps,
    }


def report(cases: Iterable[tuple[str, Callable[[], None]]], *, launches_a_case: int | None = 1) -> None:
    """Calls each case that has all words of the command line in its name, compiles what it launches, and prints a line
    a launch, or with `--json` one object. Raises if a case launches more or less than it says (None: any number, each
    named after its kernel too).
    """
    as_json = "--json" in sys.argv
    wanted = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    launches: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []
    JITFunction.run = lambda fn, *args, grid, warmup, **options: launches.append((fn, args, options))  # type: ignore
    table: dict[str, dict[str, int]] = {}
    for case, call in cases:
        if not all(part in case for part in wanted):
            continue
        launches.clear()
        call()
        if launches_a_case is not None and len(launches) != launches_a_case:
            raise RuntimeError(f"{case}: {len(launches)} launches")
        for fn, args, options in launches:
            name = case if launches_a_case == 1 else f"{case}: {fn.fn.__name__}"
            table[name] = compile_launch(fn, args, options)
            if not as_json:
                print(f"{name:75}", *(f"{key} {value:6}" for key, value in table[name].items()), flush=True)
    if as_json:
        print(json.dumps(table))


def main() -> None:
    report(cases())


if __name__ == "__main__":
    main()
