"""How the linear layers of few tokens are cut: kernel, tile, split and launch by shape and number of tokens.

Measured on an H100 (`bench/LOG.md` has the sweep) at the shapes of Llama-2-7B and one of Llama-3-70B; an H200 has the
same multiprocessors and takes the same. A shape that is not in the table takes the entry of the shape nearest to it, by
the ratios of outputs and of inputs. `lines()` prints it.
"""

import functools
import math
from dataclasses import dataclass
from typing import TypeVar

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Int4Plan:
    """How `int4_linear` cuts a product."""

    kernel: str  # "slices", "tiles" or "gluon"
    tiles: int  # of 16 rows a program
    tokens: int  # a program
    splits: int  # of k over programs; the gluon kernel cuts the work by `programs`
    warps: int
    ahead: int  # rounds whose weights are in flight
    depth: int = 1  # tiles of 64 k a round; the slices kernel takes one a warp
    # Programmatic dependent launch: "late" starts the next launch's programs when the products are done, so that they
    # read their weights while this one ends; "plain": not at all.
    launch: str = "plain"
    programs: int = 0  # that share all tiles evenly (gluon); 0: each does a tile


@dataclass(frozen=True)
class Bf16Plan:
    """How `linear` cuts a product."""

    kernel: str  # "row" (one token), "slices" or "tiles"
    rows: int  # a program
    tokens: int  # a program, as many as there can be
    splits: int  # of k over programs
    warps: int
    depth: int  # k a round, of a warp in the slices kernel
    ahead: int = 1  # rounds in flight, of the program that k cuts
    # As in Int4Plan. The row kernel starts the next launch "early", at once: short programs fill the multiprocessors
    # evenly all the same.
    launch: str = "plain"


Table = dict[tuple[int, int], tuple[tuple[int, Plan | None], ...]]

_INT4_WIDE = (
    (16, Int4Plan("tiles", 4, 16, 1, 4, 4, 2)),
    (32, Int4Plan("tiles", 4, 32, 1, 4, 4, 2)),
    (64, Int4Plan("tiles", 8, 64, 1, 8, 3, 2)),
    (128, Int4Plan("tiles", 4, 64, 1, 4, 4, 2)),
    (640, Int4Plan("tiles", 8, 64, 1, 8, 4, 2)),
)
# (outputs, inputs): (at most so many tokens, plan) in rising order; None, and more tokens than the last: dequantise to
# 16 bits and call cuBLAS.
_INT4: Table[Int4Plan] = {
    (12288, 4096): (
        (1, Int4Plan("tiles", 4, 16, 2, 4, 4, 2, launch="late")),
        (16, Int4Plan("tiles", 4, 16, 2, 4, 4, 2)),
        (32, Int4Plan("tiles", 4, 32, 2, 4, 4, 2, launch="late")),
        (64, Int4Plan("tiles", 4, 64, 2, 4, 3, 2)),
        (128, Int4Plan("tiles", 8, 128, 1, 8, 3, 2)),
        (640, Int4Plan("tiles", 8, 64, 1, 8, 4, 2)),
    ),
    (4096, 4096): (
        (1, Int4Plan("tiles", 4, 16, 4, 4, 4, 2, launch="late")),
        (16, Int4Plan("tiles", 4, 16, 4, 4, 4, 2)),
        (32, Int4Plan("tiles", 4, 32, 4, 4, 4, 2)),
        (64, Int4Plan("tiles", 4, 64, 2, 4, 4, 2)),
        (128, Int4Plan("tiles", 4, 64, 2, 4, 4, 2)),
        (640, Int4Plan("tiles", 8, 64, 1, 8, 4, 2)),
    ),
    (22016, 4096): (
        (1, Int4Plan("tiles", 4, 16, 1, 4, 4, 2, launch="late")),
        *_INT4_WIDE,
    ),
    # Llama-3-70B's: many enough rows that the slices kernel has work for all multiprocessors.
    (57344, 8192): (
        (1, Int4Plan("slices", 1, 8, 1, 4, 4, launch="late")),
        *_INT4_WIDE,
    ),
    (4096, 11008): (
        (1, Int4Plan("tiles", 4, 16, 4, 4, 6, 2, launch="late")),
        (16, Int4Plan("tiles", 4, 16, 4, 4, 6, 2)),
        (32, Int4Plan("tiles", 4, 32, 4, 4, 4, 2)),
        (64, Int4Plan("tiles", 4, 64, 4, 4, 4, 2)),
        (128, Int4Plan("tiles", 4, 64, 2, 4, 4, 2)),
        (640, Int4Plan("tiles", 8, 64, 1, 8, 4, 2)),
    ),
}
# Where the Gluon kernel can run it does these; None: as above.
_INT4_GLUON: Table[Int4Plan] = {
    (12288, 4096): (
        (64, None),
        (128, Int4Plan("gluon", 8, 128, 1, 12, 8)),
        (384, Int4Plan("gluon", 8, 128, 1, 12, 8, programs=132)),
        (512, Int4Plan("gluon", 8, 128, 1, 12, 8)),
        (2048, Int4Plan("gluon", 8, 256, 1, 12, 4)),
    ),
    (4096, 4096): (
        (256, None),
        (512, Int4Plan("gluon", 8, 128, 1, 12, 8)),
        (2048, Int4Plan("gluon", 8, 256, 1, 12, 4)),
    ),
    (22016, 4096): (
        (32, None),
        (64, Int4Plan("gluon", 8, 64, 1, 12, 8, programs=132)),
        (384, Int4Plan("gluon", 8, 128, 1, 12, 8, programs=132)),
        (2048, Int4Plan("gluon", 8, 256, 1, 12, 4)),
    ),
    (4096, 11008): (
        (128, None),
        (384, Int4Plan("gluon", 8, 128, 1, 12, 8, programs=132)),
        (512, Int4Plan("gluon", 8, 128, 1, 12, 8)),
        (2048, Int4Plan("gluon", 8, 256, 1, 12, 4)),
    ),
}
# The same for 16-bit weights; None, and more tokens than the last: cuBLAS.
_BF16: Table[Bf16Plan] = {
    (12288, 4096): (
        (1, Bf16Plan("row", 2, 1, 1, 4, 2048, launch="early")),
        (8, Bf16Plan("slices", 16, 8, 1, 8, 128, 3, launch="late")),
        (16, Bf16Plan("tiles", 128, 16, 1, 8, 128, 3, launch="late")),
        (32, Bf16Plan("tiles", 128, 32, 1, 8, 128, 3, launch="late")),
    ),
    (4096, 4096): (
        (1, Bf16Plan("row", 2, 1, 1, 4, 2048, launch="early")),
        (8, Bf16Plan("slices", 32, 8, 1, 4, 128, 4, launch="late")),
        (16, Bf16Plan("tiles", 64, 16, 1, 4, 128, 5, launch="late")),
    ),
    (22016, 4096): (
        (1, Bf16Plan("row", 2, 1, 1, 4, 2048, launch="early")),
        (8, Bf16Plan("slices", 16, 8, 1, 8, 128, 3, launch="late")),
        (16, Bf16Plan("tiles", 64, 16, 1, 4, 128, 3)),
        (32, Bf16Plan("tiles", 64, 32, 1, 4, 128, 3)),
        (64, Bf16Plan("tiles", 64, 64, 1, 4, 128, 4)),
    ),
    (4096, 11008): (
        (1, Bf16Plan("row", 2, 1, 1, 8, 4096, launch="early")),
        (8, Bf16Plan("tiles", 64, 16, 2, 4, 128, 4, launch="late")),
        (16, Bf16Plan("tiles", 64, 16, 2, 4, 128, 4)),
        (32, Bf16Plan("tiles", 64, 32, 2, 4, 128, 4)),
        (64, Bf16Plan("tiles", 64, 64, 2, 4, 128, 4)),
    ),
}
INT4_PLANS = sorted({plan for entry in _INT4.values() for _, plan in entry if plan}, key=str)
INT4_GLUON_PLANS = sorted({plan for entry in _INT4_GLUON.values() for _, plan in entry if plan}, key=str)
BF16_PLANS = sorted({plan for entry in _BF16.values() for _, plan in entry if plan}, key=str)


def _entry(table: Table[Plan], rows: int, depth: int) -> tuple[tuple[int, Plan | None], ...]:
    if (rows, depth) in table:
        return table[rows, depth]
    nearest = min(table, key=lambda shape: (abs(math.log(shape[0] / rows)) + abs(math.log(shape[1] / depth)), shape))
    return table[nearest]


# Looked up once a shape: without a graph every product of every step asks.
@functools.cache
def _int4_entries(rows: int, depth: int) -> tuple[tuple[tuple[int, Int4Plan | None], ...], ...]:
    return _entry(_INT4, rows, depth), _entry(_INT4_GLUON, rows, depth)


@functools.cache
def _bf16_entry(rows: int, depth: int) -> tuple[tuple[int, Bf16Plan | None], ...]:
    return _entry(_BF16, rows, depth)


def int4_plan(tokens: int, rows: int, depth: int, gluon: bool) -> Int4Plan | None:
    """For x [tokens, depth] and a weight [rows, depth]; None: dequantise to 16 bits and call cuBLAS. gluon: whether the
    kernel of that name can run.
    """
    entries = _int4_entries(rows, depth)
    plan = next((plan for most, plan in entries[1] if tokens <= most), None) if gluon else None
    return plan or next((plan for most, plan in entries[0] if tokens <= most), None)


def bf16_plan(tokens: int, rows: int, depth: int) -> Bf16Plan | None:
    """For x [tokens, depth] and a weight [rows, depth]; None: call cuBLAS."""
    return next((plan for most, plan in _bf16_entry(rows, depth) if tokens <= most), None)


def bf16_token_limits() -> list[int]:
    """The numbers of tokens beyond which `bf16_plan` may answer differently, rising."""
    return sorted({most for entry in _BF16.values() for most, _ in entry})


def lines() -> list[str]:
    """The tables, a line an entry."""
    out = []
    for name, table, other in (
        ("int4", _INT4, "dequantise, cuBLAS"),
        ("int4 on Hopper", _INT4_GLUON, "as elsewhere"),
        ("bf16", _BF16, "cuBLAS"),
    ):
        for (rows, depth), entry in table.items():
            for most, plan in entry:
                out.append(f"{name} {rows:5} x {depth:5}, up to {most:4} tokens: {plan or other}")
    return out
