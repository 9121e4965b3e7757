"""Compiles every 8-bit variant for an H100 without one, as `compile_sm90.py` does the model's other ops.

`python -m tests.kernels.compile_sm90_8bit [name part]` prints registers, spills and shared memory of each launch; the
test of `test_compile_sm90.py` runs it with `--json`.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from tests.kernels.compile_sm90 import TARGET, TYPES, compile_launch, meta
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels import activation, linear_8bit, norm, quantize

TYPES.update({torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"})
EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SHAPES = [(12288, 4096), (4096, 11008), (576, 576)]
TOKENS = (1, 16, 32, 128, 2048)


def linear_case(tokens: int, shape: tuple[int, int], dtype: torch.dtype, half: torch.dtype, w8a8: bool) -> None:
    weight, scale = meta(*shape, dtype=dtype), meta(shape[0], dtype=torch.float32)
    if w8a8:
        x, x_scale = meta(tokens, shape[1], dtype=dtype), meta(tokens, dtype=torch.float32)
        linear_8bit.linear_w8a8(x, x_scale, weight, scale, half)
    else:
        linear_8bit.linear_w8a16(meta(tokens, shape[1], dtype=half), weight, scale)


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


def compile_matmul(fn: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, int]:
    """`compile_launch` of a kernel whose first two arguments are descriptors."""
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter, value) in enumerate(zip(fn.arg_names, fn.params, args, strict=True)):
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(fn, signature, constants, attributes)
    kernel = triton.compile(source, target=TARGET, options=options)
    with tempfile.TemporaryDirectory() as folder:
        (ptx := Path(folder) / "kernel.ptx").write_text(kernel.asm["ptx"])
        command = [get_ptxas(TARGET.arch).path, "-v", "--gpu-name=sm_90a", str(ptx), "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled": sum(int(number) for number in re.findall(r"(\d+) bytes spill", log)),
        "shared": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "mma": kernel.asm["ptx"].count("mma.sync"),
        "warps": kernel.metadata.num_warps,
    }


def main() -> None:
    as_json = "--json" in sys.argv
    wanted = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    launches: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []
    JITFunction.run = lambda fn, *args, grid, warmup, **options: launches.append((fn, args, options))  # type: ignore
    table: dict[str, dict[str, int]] = {}
    compiled: dict[str, dict[str, int]] = {}
    for case, call in cases():
        if not all(part in case for part in wanted):
            continue
        launches.clear()
        call()
        for fn, args, options in launches:
            # Shapes share variants: only what the compiler sees tells them apart.
            seen = [
                (value.dtype, value.stride() == (0,))
                if isinstance(value, torch.Tensor)
                else (value.base.dtype, list(value.block_shape))
                if isinstance(value, TensorDescriptor)
                else (value == 1, value % 16 == 0)
                if not parameter.is_constexpr and isinstance(value, int)
                else value
                for value, parameter in zip(args, fn.params, strict=True)
            ]
            key = f"{fn.fn.__name__} {seen} {options}"
            if key not in compiled:
                compile_it = compile_matmul if isinstance(args[0], TensorDescriptor) else compile_launch
                compiled[key] = compile_it(fn, args, options)
                if not as_json:
                    print(f"{case:60}", *(f"{name} {value:6}" for name, value in compiled[key].items()), flush=True)
            table[f"{case}: {fn.fn.__name__}"] = compiled[key]
    if as_json:
        print(json.dumps(table))


if __name__ == "__main__":
    main()
