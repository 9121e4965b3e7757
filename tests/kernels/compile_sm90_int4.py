"""Compiles the Gluon kernel of the int4 linear layer for an H100 without having one, as `compile_sm90.py` does for
Triton's kernels: `python -m tests.kernels.compile_sm90_int4 [--json]`.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from tests.kernels.compile_sm90 import TARGET, TYPES, meta, resources
from tests.kernels.compile_sm90_linear import int4_weight
from torch import Tensor
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from octavo.kernels import linear_int4, linear_int4_gluon, linear_table


def cases() -> Iterator[tuple[str, linear_table.Int4Plan, int, int, bool, torch.dtype]]:
    """(name, plan, K, group, zeros, dtype)"""
    variants = [(plan, 4096, 128, False, torch.bfloat16) for plan in linear_table.INT4_GLUON_PLANS]
    first = linear_table.INT4_GLUON_PLANS[0]
    variants += [(first, 11008, 32, True, torch.bfloat16), (first, 11008, 11008, True, torch.float16)]
    for plan, depth, group, zeros, dtype in variants:
        yield f"{plan} {depth} g{group}{' zeros' * zeros} {TYPES[dtype]}", plan, depth, group, zeros, dtype


def compile_launch(fn: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, int]:
    """`compile_sm90.compile_launch` of a Gluon kernel, whose descriptors name their layouts in shared memory."""
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(fn.params, args, strict=True)):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, linear_int4_gluon.TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
        else:
            signature[name] = "*" + TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        aligned = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(fn, signature, constants, attributes)
    return resources(triton.compile(source, target=TARGET, options={"num_warps": options["num_warps"]}))


def main() -> None:
    launches: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []
    JITFunction.run = lambda fn, *args, grid, warmup, **options: launches.append((fn, args, options))  # type: ignore
    table = {}
    for name, plan, depth, group, zeros, dtype in cases():
        launches.clear()
        x, out = meta(plan.tokens, depth, dtype=dtype), meta(plan.tokens, 4096, dtype=dtype)
        linear_int4.launch(x, int4_weight(4096, depth, group, zeros, dtype), None, out, plan)
        ((fn, args, options),) = launches
        table[name] = compile_launch(fn, args, options)
        if "--json" not in sys.argv:
            print(f"{name:130}", *(f"{key} {value:6}" for key, value in table[name].items()), flush=True)
    if "--json" in sys.argv:
        print(json.dumps(table))


if __name__ == "__main__":
    main()
