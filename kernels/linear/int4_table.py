"""How `int4_linear` is cut, by shape and number of tokens (`shape_table.py`)."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from octavo.kernels.linear.shape_table import Entry, Table, all_plans, nearest_entry, plan_for
from octavo.kernels.linear.shape_table import lines as table_lines


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
    # Programmatic dependent launch: "late" starts the next launch's programs when the products are
    # done, so that they read their weights while this one ends; "plain": not at all.
    launch: str = "plain"
    programs: int = 0  # that share all tiles evenly (gluon); 0: each does a tile


_INT4_WIDE = (
    (16, Int4Plan("tiles", 4, 16, 1, 4, 4, 2)),
    (32, Int4Plan("tiles", 4, 32, 1, 4, 4, 2)),
    (64, Int4Plan("tiles", 8, 64, 1, 8, 3, 2)),
    (128, Int4Plan("tiles", 4, 64, 1, 4, 4, 2)),
    (640, Int4Plan("tiles", 8, 64, 1, 8, 4, 2)),
)
# (outputs, inputs): (at most so many tokens, plan) in rising order; None, and more tokens than the
# last: dequantise to 16 bits and call cuBLAS.
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
INT4_PLANS = all_plans(_INT4)
INT4_GLUON_PLANS = all_plans(_INT4_GLUON)


# Looked up once a shape: without a graph every product of every step asks.
@functools.cache
def _entries(rows: int, depth: int) -> tuple[Entry[Int4Plan], Entry[Int4Plan]]:
    return nearest_entry(_INT4, rows, depth), nearest_entry(_INT4_GLUON, rows, depth)


def int4_plan(tokens: int, rows: int, depth: int, gluon: bool) -> Int4Plan | None:
    """For x [tokens, depth] and a weight [rows, depth]; None: dequantise to 16 bits and call
    cuBLAS. gluon: whether the kernel of that name can run.
    """
    general, on_hopper = _entries(rows, depth)
    plan = plan_for(on_hopper, tokens) if gluon else None
    return plan or plan_for(general, tokens)


def int4_token_limits() -> list[int]:
    """The numbers of tokens beyond which `int4_plan` may answer differently, rising."""
    return sorted({most for table in (_INT4, _INT4_GLUON) for entry in table.values() for most, _ in entry})


def lines() -> Iterator[str]:
    """Both tables, a line a plan."""
    yield from table_lines("int4", _INT4, "dequantise, cuBLAS")
    yield from table_lines("int4 on Hopper", _INT4_GLUON, "as elsewhere")
