"""Compiles kernel variants for an H100 without having one: registers, stack and shared memory of
each.

The modules `compile_sm90_*.py` have the cases.
`python -m tests.kernels.compile_sm90_decode [name part ...]` prints a table of them, and the test
of the same name runs it with `--json`. The launchers are called with tensors that have shapes but
no memory, and what they would launch is compiled: so exactly the variants that exist are tested,
with their real tile sizes, warps and stages. Triton keeps what it compiled, by source, options and
version (`TRITON_CACHE_DIR`): a second run of all modules takes 20 seconds of a processor, the first
one more than four minutes.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.attention import kv_block

Cases = Iterable[tuple[str, Callable[[], None]]]

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


class Anywhere(Tensor):
    """A view whose beginning changes from step to step."""


def rows_of_a_step(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """row_slots, query_start_loc and seq_lens of so many rows."""
    slots, starts, lens = (ints(size).as_subclass(Anywhere) for size in (count, count + 1, count))
    return slots, starts, lens


def pages(heads: tuple[int, int, int], block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    _, num_kv, dim = heads
    blocks = meta(32, kv_block.block_bytes(num_kv, block_size, dim, dtype), dtype=torch.uint8)
    return kv_block.split_cache(blocks, num_kv, block_size, dim, dtype)


def compile_launch(fn: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, int]:
    """Compiles a launch for TARGET; returns what `resources` says of it."""
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
        if aligned and isinstance(value, Anywhere):
            raise RuntimeError(f"{fn.fn.__name__}: a variant for each alignment of {name} is compiled inside steps")
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
    """Of a compiled kernel: registers a thread, bytes of stack a thread (what is spilled lies
    there), shared bytes a program, matrix instructions, warps.
    """
    with tempfile.TemporaryDirectory() as folder:
        (cubin := Path(folder) / "kernel.cubin").write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "mma": kernel.asm["ptx"].count("mma.sync"),
        "warps": kernel.metadata.num_warps,
    }


def report(cases: Cases, *, launches_a_case: int | None = 1) -> None:
    """Calls each case that has all words of the command line in its name, compiles what it
    launches, and prints a line a launch, or with `--json` one object. Raises if a case launches
    more or less than it says (None: any number, each named after its kernel too).
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
