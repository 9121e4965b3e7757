"""How `linear` is cut where weights have 16 bits, by shape and number of tokens (`shape_table.py`)."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from octavo.kernels.linear.shape_table import Entry, Table, all_plans, nearest_entry, plan_for
from octavo.kernels.linear.shape_table import lines as table_lines


@dataclass(frozen=True)
class DensePlan:
    """How `linear` cuts a product."""

    kernel: str  # "row" (one or two tokens), "slices" or "tiles"
    rows: int  # a program
    tokens: int  # a program, as many as there can be
    splits: int  # of k over programs
    warps: int
    depth: int  # k a round, of a warp in the slices kernel
    ahead: int = 1  # rounds in flight, of the program that k cuts
    # Programmatic dependent launch: "late" starts the next launch's programs when the products are
    # done, so that they read their weights while this one ends; "early", of the row kernel, at
    # once: short programs fill the multiprocessors evenly all the same; "plain": not at all.
    launch: str = "plain"


# (outputs, inputs): (at most so many tokens, plan) in rising order; more tokens than the last:
# cuBLAS.
_DENSE: Table[DensePlan] = {
    (12288, 4096): (
        (1, DensePlan("row", 2, 1, 1, 4, 2048, launch="early")),
        (2, DensePlan("row", 2, 2, 1, 8, 2048, launch="early")),
        (8, DensePlan("slices", 16, 8, 1, 8, 128, 3, launch="late")),
        (16, DensePlan("tiles", 128, 16, 1, 8, 128, 3, launch="late")),
        (32, DensePlan("tiles", 128, 32, 1, 8, 128, 3, launch="late")),
    ),
    (4096, 4096): (
        (1, DensePlan("row", 2, 1, 1, 4, 2048, launch="early")),
        (2, DensePlan("row", 2, 2, 1, 8, 2048, launch="early")),
        (8, DensePlan("slices", 32, 8, 1, 4, 128, 4, launch="late")),
        (16, DensePlan("tiles", 64, 16, 1, 4, 128, 5, launch="late")),
    ),
    (22016, 4096): (
        (1, DensePlan("row", 2, 1, 1, 4, 2048, launch="early")),
        (2, DensePlan("row", 2, 2, 1, 8, 2048, launch="early")),
        (8, DensePlan("slices", 16, 8, 1, 8, 128, 3, launch="late")),
        (16, DensePlan("tiles", 64, 16, 1, 4, 128, 3)),
        (32, DensePlan("tiles", 64, 32, 1, 4, 128, 3)),
        (64, DensePlan("tiles", 64, 64, 1, 4, 128, 4)),
    ),
    (4096, 11008): (
        (1, DensePlan("row", 2, 1, 1, 8, 4096, launch="early")),
        (8, DensePlan("tiles", 64, 16, 2, 4, 128, 4, launch="late")),
        (16, DensePlan("tiles", 64, 16, 2, 4, 128, 4)),
        (32, DensePlan("tiles", 64, 32, 2, 4, 128, 4)),
        (64, DensePlan("tiles", 64, 64, 2, 4, 128, 4)),
    ),
}
DENSE_PLANS = all_plans(_DENSE)


# Looked up once a shape: without a graph every product of every step asks.
@functools.cache
def _entry(rows: int, depth: int) -> Entry[DensePlan]:
    return nearest_entry(_DENSE, rows, depth)


def dense_plan(tokens: int, rows: int, depth: int) -> DensePlan | None:
    """For x [tokens, depth] and a weight [rows, depth]; None: call cuBLAS."""
    return plan_for(_entry(rows, depth), tokens)


def dense_token_limits() -> list[int]:
    """The numbers of tokens beyond which `dense_plan` may answer differently, rising."""
    return sorted({most for entry in _DENSE.values() for most, _ in entry})


def lines() -> Iterator[str]:
    """The table, a line a plan."""
    yield from table_lines("dense", _DENSE, "cuBLAS")
