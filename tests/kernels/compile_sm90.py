"""Compiles kernel variants for an H100 without having one: registers, stack and shared memory of
each.

The modules `compile_sm90_*.py` have the cases.
`python -m tests.kernels.compile_sm90_decode [name part ...]` prints a table of them, and the test
of the same name runs it with `--json`. The launchers are called with tensors that have shapes but
no memory, and what they would launch is compiled: so exactly the variants that exist are tested,
with their real tile sizes, warps and stages.

To compile them all takes more than four minutes of a processor, and gives the same each time: so what
came of each is kept in `known_sm90/`, by the digest of all that it depends on (the kernel's source and
that of what it calls, types, constants, options, Triton's version). With `--json` a variant that is
known is not compiled again, but for one in sixteen, which must come to the same. After a change of a
kernel, `make sm90` compiles everything and writes the files anew; until then, what is in none of them
is compiled by each run of the tests.
"""

import hashlib
import json
import os
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

# The same code, in an eighth less of a processor's time: no lines for debuggers, and no threads that
# share out what is too small for them.
os.environ |= {"TRITON_DISABLE_LINE_INFO": "1", "MLIR_DISABLE_MULTITHREADING": "1"}

Cases = Iterable[tuple[str, Callable[[], None]]]

TARGET = GPUTarget("cuda", 90, 32)
KNOWN = Path(__file__).parent / "known_sm90"
COMPILED_ALL_THE_SAME = "0"
"""First digit of the digests of known variants that are compiled again."""
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


class Compiled:
    """Variants that have been compiled, by their digests: what `resources` says of each."""

    def __init__(self, known: dict[str, dict[str, int]]) -> None:
        self.found: dict[str, dict[str, int]] = {}
        self._known = known

    def of(self, source: ASTSource, options: dict[str, Any]) -> dict[str, int]:
        """Of one variant, which is compiled where it is not known."""
        depends_on = repr((triton.__version__, source.hash(), sorted(options.items())))
        digest = hashlib.sha256(depends_on.encode()).hexdigest()[:32]
        if digest not in self.found:
            known = self._known.get(digest)
            if known is not None and not digest.startswith(COMPILED_ALL_THE_SAME):
                self.found[digest] = known
            else:
                self.found[digest] = resources(triton.compile(source, target=TARGET, options=options))
                if known not in (None, self.found[digest]):
                    raise RuntimeError(f"{source.name}: {self.found[digest]}, and {known} is known: run `make sm90`")
        return self.found[digest]


def variant_of(fn: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """What a launch compiles, and with which options."""
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
    return (GluonASTSource if fn.is_gluon() else ASTSource)(fn, signature, constants, attributes), launch_options


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
    launches, and prints a line a launch, or with `--json` one object. `--remember` writes what came of
    them to the module's file of `KNOWN`. Raises if a case launches more or less than it says
    (None: any number, each named after its kernel too).
    """
    as_json, remembers = "--json" in sys.argv, "--remember" in sys.argv
    wanted = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    known = KNOWN / Path(sys.argv[0]).with_suffix(".json").name
    compiled = Compiled(json.loads(known.read_text()) if as_json and known.exists() else {})
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
            table[name] = compiled.of(*variant_of(fn, args, options))
            if not as_json:
                print(f"{name:75}", *(f"{key} {value:6}" for key, value in table[name].items()), flush=True)
    if as_json:
        print(json.dumps(table))
    if remembers:
        known.parent.mkdir(exist_ok=True)
        lines = (f"{json.dumps(digest)}: {json.dumps(found)}" for digest, found in sorted(compiled.found.items()))
        known.write_text("{\n" + ",\n".join(lines) + "\n}\n")
