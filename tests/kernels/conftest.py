"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter (with small
shapes, and not in bf16).
"""

import functools
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import ismodule
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported, so before the tests' own imports


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With a GPU every test of this folder is a GPU test."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            # numpy warns of what the kernels mean: infinities, NaN that is only reported, the
            # logarithm of no mass.
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
            if torch.cuda.is_available():
                item.add_marker(pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`kernel_dtype`: what kernels are tested in. The interpreter's bf16 products are garbage: bf16
    waits for a GPU.
    """
    if "kernel_dtype" in metafunc.fixturenames:
        dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
        metafunc.parametrize("kernel_dtype", dtypes, ids=[str(dtype).removeprefix("torch.") for dtype in dtypes])


@pytest.fixture(scope="session", autouse=True)
def patch_the_language_once_a_launch() -> None:
    """Triton's interpreter replaces the functions of its language at a launch, and then once more, by
    the same, at each call of a function inside the kernel: half of the time that it takes.
    """
    if torch.cuda.is_available() or find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another version does it in another way
        return
    patch, patched = interpreter._patch_lang, set[ModuleType]()

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            super().restore()
            patched.clear()

    @functools.cache
    def languages(fn: FunctionType) -> frozenset[ModuleType]:
        return frozenset({language, language.core} & {value for value in fn.__globals__.values() if ismodule(value)})

    def patch_once(fn: FunctionType) -> Scope:
        if languages(fn) and languages(fn) <= patched:
            return Scope()
        patched.update(languages(fn))
        return patch(fn)

    interpreter._LangPatchScope, interpreter._patch_lang = Scope, patch_once


@pytest.fixture(autouse=True)
def seed_by_name(request: pytest.FixtureRequest) -> None:
    """A test has the same random numbers whichever tests ran before it, in its process or in
    others.
    """
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher allocates is NaN until its kernel writes it."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def return_large_memory() -> Iterator[None]:
    """A test that took much of the card gives it back, so that the tests can run side by side."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2 << 30:
        torch.cuda.empty_cache()


@dataclass
class PagedRows:
    """Rows with random keys and values scattered over a paged cache; everything outside their
    lengths is NaN.
    """

    kv_cache: Tensor  # [num_blocks, 2, Hkv, block_size, D]
    block_table: Tensor  # [slots, max_blocks] int32
    row_slots: Tensor  # [R] int32
    seq_lens: Tensor  # [R] int32


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def make_rows(device: str) -> Callable[..., PagedRows]:
    def make(
        seq_lens: Sequence[int], num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, seed: int = 0
    ) -> PagedRows:
        random = torch.Generator().manual_seed(seed)
        rows = len(seq_lens)
        counts = [-(-length // block_size) for length in seq_lens]
        num_blocks = sum(counts) + 2  # with a null block, and one of NaN that fills the table
        cache = torch.full((num_blocks, 2, num_kv_heads, block_size, head_dim), float("nan"))
        ids = (torch.randperm(num_blocks - 2, generator=random) + 1).int()
        slots = torch.randperm(rows + 2, generator=random)[:rows]
        table = torch.full((rows + 2, max(counts) + 1), num_blocks - 1, dtype=torch.int32)
        for row, (length, own) in enumerate(zip(seq_lens, ids.split(counts), strict=True)):
            table[slots[row], : len(own)] = own
            for index, block in enumerate(own.tolist()):
                used = min(block_size, length - index * block_size)
                cache[block, :, :, :used] = torch.randn((2, num_kv_heads, used, head_dim), generator=random)
        return PagedRows(
            cache.to(device, dtype),
            table.to(device),
            slots.int().to(device),
            torch.tensor(seq_lens, dtype=torch.int32, device=device),
        )

    return make
