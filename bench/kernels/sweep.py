"""`python -m bench.kernels.sweep decode|prefill|small`: the launch constants tried one by one, the
best marked.

Tuning happens here, at development time; what wins is written into the op's file with its figure
beside it.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench.kernels import cases
from bench.kernels.timing import microseconds

from octavo.kernels.attention import decode, prefill, rope
from octavo.kernels.pointwise import activation, norm


def decode_settings() -> Iterator[tuple[str, Callable[[], None]]]:
    default = decode._config
    for programs, tile, stages, warps in itertools.product((1, 2, 3), (32, 64, 128), (5, 7), (4, 8)):
        changes = {"PER_SM": programs, "TILE": tile, "num_stages": stages, "num_warps": warps}

        def apply(changes: dict[str, int] = changes) -> None:
            decode._config = lambda *args: default(*args) | changes

        yield f"programs {programs} tile {tile} stages {stages} warps {warps}", apply


def prefill_settings() -> Iterator[tuple[str, Callable[[], None]]]:
    default = prefill._config
    for block_m, tile, stages, warps in itertools.product((64, 128), (64, 128), (2, 3, 4), (4, 8)):
        changes = {"BLOCK_M": block_m, "TILE": tile, "num_stages": stages, "num_warps": warps}

        def apply(changes: dict[str, int] = changes) -> None:
            prefill._config = lambda *args: default(*args) | changes

        yield f"block {block_m} tile {tile} stages {stages} warps {warps}", apply


def small_settings() -> Iterator[tuple[str, Callable[[], None]]]:
    def apply(elements: int, block: int, components: int) -> None:
        norm._num_warps = lambda size: min(32, max(1, size // (32 * elements)))
        activation._BLOCK = block
        rope._COMPONENTS = components

    for elements, block, components in (
        (4, 256, 256),
        (8, 512, 512),
        (16, 1024, 1024),
        (32, 2048, 2048),
        (64, 4096, 4096),
    ):
        name = f"norm elements {elements}, silu block {block}, rope components {components}"
        yield name, lambda e=elements, b=block, c=components: apply(e, b, c)


def best_of(case: cases.Case, settings: list[tuple[str, Callable[[], None]]]) -> None:
    results: list[tuple[float, str]] = []
    for name, apply in settings:
        apply()
        try:
            results.append((microseconds(case.calls), name))
        except Exception as error:  # a setting that does not fit the card is a result too
            print(f"  {name}: {type(error).__name__}", flush=True)
            torch.cuda.synchronize()
    results.sort()
    print(f"{case.op} {case.shape}: " + "; ".join(f"{time:.2f} ({name})" for time, name in results[:4]), flush=True)


def main() -> None:
    plan: dict[str, tuple[Any, Any]] = {
        "decode": (decode_settings, decode_cases),
        "prefill": (prefill_settings, prefill_cases),
        "small": (small_settings, cases.small_ops),
    }
    settings, chosen = plan[sys.argv[1]]
    tried = list(settings())
    print(torch.cuda.get_device_name(), f"{len(tried)} settings")
    for case in chosen():
        best_of(case, tried)


def decode_cases() -> Iterator[cases.Case]:
    for heads, name in itertools.product(((32, 8), (32, 32)), ("1x1k", "1x8k", "32x1k", "32x4k", "31x512+1x32k")):
        yield cases.decode_case(heads, name, cases.DECODE[name])


def prefill_cases() -> Iterator[cases.Case]:
    for name in ("512", "2048", "8192", "16x512"):
        yield cases.prefill_case((32, 8), name, cases.PREFILL[name])


if __name__ == "__main__":
    main()
