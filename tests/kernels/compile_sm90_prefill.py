"""Compiles every variant of the Gluon prefill kernel for an H100 without having one, as `compile_sm90.py` does for
Triton's kernels: `python -m tests.kernels.compile_sm90_prefill [--json]`.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from tests.kernels.compile_sm90 import TARGET, TYPES, ints, meta, resources
from torch import Tensor
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from octavo.kernels import prefill_gluon


def cases() -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """(name, q, kv_cache, window)"""
    for dtype, dim, block_size, window in (
        (torch.bfloat16, 128, 64, 0),
        (torch.bfloat16, 128, 64, 4096),
        (torch.bfloat16, 128, 16, 4096),
        (torch.float16, 128, 64, 0),
        (torch.bfloat16, 64, 64, 0),
        (torch.bfloat16, 64, 16, 4096),
    ):
        name = f"prefill_gluon {TYPES[dtype]} {dim} page {block_size}{' window' * (window > 0)}"
        yield name, meta(512, 32, dim, dtype=dtype), meta(32, 2, 8, block_size, dim, dtype=dtype), window


def compile_launch(fn: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, int]:
    """`compile_sm90.compile_launch` of a Gluon kernel, whose descriptors name their layouts in shared memory."""
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(fn.params, args, strict=True)):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, prefill_gluon.TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(fn, signature, constants, attributes)
    return resources(triton.compile(source, target=TARGET, options={"num_warps": options["num_warps"]}))


def main() -> None:
    launches: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []
    JITFunction.run = lambda fn, *args, grid, warmup, **options: launches.append((fn, args, options))  # type: ignore
    table = {}
    for name, q, kv_cache, window in cases():
        launches.clear()
        prefill_gluon.prefill_attention(q, kv_cache, ints(64, 64), ints(32), ints(33), ints(32), 512, 0.1, window)
        ((fn, args, options),) = launches
        table[name] = compile_launch(fn, args, options)
        if "--json" not in sys.argv:
            print(f"{name:50}", *(f"{key} {value:6}" for key, value in table[name].items()), flush=True)
    if "--json" in sys.argv:
        print(json.dumps(table))


if __name__ == "__main__":
    main()
