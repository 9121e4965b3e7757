"""How `int4_linear` is cut, by shape and number of tokens (`shape_table.py`)."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from octavo.kernels.linear.shape_table import Table, all_plans, nearest_entry, plan_for
from octavo.kernels.linear.shape_table import lines as table_lines


@dataclass(frozen=True)
class Int4Plan:
    """How `int4_linear` cuts a product."""

    kernel: str  # "slices", "tiles" or "gluon"
    tiles: int  # of 16 rows a program
    tokens: int  # a program
    # Of k over programs; of the gluon kernel: how many programs at most share one of the tiles that
    # are left over.
    splits: int
    warps: int
    ahead: int  # rounds whose weights are in flight
    depth: int = 1  # tiles of 64 k a round; the slices kernel takes one a warp
    # Programmatic dependent launch: "late" starts the next launch's programs when the products are
    # done, so that they read their weights while this one ends; "plain": not at all.
    launch: str = "plain"
    programs: int = 132  # that take tiles in turn (gluon), at most


_MANY = (640, Int4Plan("tiles", 8, 64, 1, 8, 4, 2))
# (outputs, inputs), of Llama-2-7B, Llama-3-8B and 70B: (at most so many tokens, plan) in rising
# order; more tokens than the last: dequantise to 16 bits and call cuBLAS.
_INT4: Table[Int4Plan] = {
    (12288, 4096): (
        (1, Int4Plan("tiles", 4, 16, 2, 4, 4, 2, launch="late")),
        (16, Int4Plan("tiles", 4, 16, 2, 4, 4, 2)),
        (32, Int4Plan("tiles", 4, 32, 2, 4, 4, 2, launch="late")),
        (64, Int4Plan("tiles", 4, 64, 2, 4, 3, 2)),
        (128, Int4Plan("tiles", 8, 128, 1, 8, 3, 2)),
        _MANY,
    ),
    (6144, 4096): (
        (16, Int4Plan("tiles", 4, 16, 4, 4, 4, 2)),
        (32, Int4Plan("tiles", 4, 32, 2, 4, 6, 2, launch="late")),
        (64, Int4Plan("tiles", 4, 64, 4, 4, 3, 2)),
        (128, Int4Plan("tiles", 4, 64, 2, 4, 4, 2)),
        _MANY,
    ),
    (4096, 4096): (
        (1, Int4Plan("tiles", 4, 16, 4, 4, 4, 2, launch="late")),
        (16, Int4Plan("tiles", 4, 16, 4, 4, 4, 2)),
        (32, Int4Plan("tiles", 4, 32, 4, 4, 4, 2)),
        (128, Int4Plan("tiles", 4, 64, 2, 4, 4, 2)),
        _MANY,
    ),
    (22016, 4096): (
        (1, Int4Plan("tiles", 4, 16, 1, 4, 4, 2, launch="late")),
        (16, Int4Plan("tiles", 4, 16, 1, 4, 4, 2)),
        (32, Int4Plan("tiles", 4, 32, 1, 4, 4, 2)),
        (64, Int4Plan("tiles", 8, 64, 1, 8, 3, 2)),
        (128, Int4Plan("tiles", 4, 64, 1, 4, 4, 2)),
        _MANY,
    ),
    (28672, 4096): (
        (1, Int4Plan("tiles", 4, 16, 1, 4, 4, 2, launch="late")),
        (16, Int4Plan("tiles", 4, 16, 1, 4, 4, 2)),
        (32, Int4Plan("tiles", 8, 32, 1, 8, 4, 2, launch="late")),
        (64, Int4Plan("tiles", 8, 64, 1, 8, 3, 2)),
        (128, Int4Plan("tiles", 4, 64, 1, 4, 4, 2)),
        _MANY,
    ),
    (4096, 11008): (
        (1, Int4Plan("tiles", 4, 16, 4, 4, 6, 2, launch="late")),
        (16, Int4Plan("tiles", 4, 16, 4, 4, 6, 2)),
        (32, Int4Plan("tiles", 4, 32, 4, 4, 4, 2)),
        (64, Int4Plan("tiles", 4, 64, 4, 4, 4, 2)),
        (128, Int4Plan("tiles", 4, 64, 2, 4, 4, 2)),
        _MANY,
    ),
    (4096, 14336): (
        (1, Int4Plan("tiles", 4, 16, 8, 4, 4, 2, launch="late")),
        (16, Int4Plan("tiles", 4, 16, 4, 4, 6, 2)),
        (32, Int4Plan("tiles", 4, 32, 4, 4, 6, 2, launch="late")),
        (64, Int4Plan("tiles", 4, 64, 4, 4, 4, 2)),
        (128, Int4Plan("tiles", 4, 64, 2, 4, 4, 2)),
        _MANY,
    ),
    (10240, 8192): (
        (16, Int4Plan("tiles", 4, 16, 4, 4, 4, 2)),
        (32, Int4Plan("tiles", 4, 32, 2, 4, 4, 2, launch="late")),
        (64, Int4Plan("tiles", 4, 64, 2, 4, 3, 2)),
        (128, Int4Plan("tiles", 4, 64, 2, 4, 4, 2)),
        _MANY,
    ),
    (8192, 8192): (
        (1, Int4Plan("tiles", 4, 16, 4, 4, 4, 2, launch="late")),
        (16, Int4Plan("tiles", 4, 16, 4, 4, 4, 2)),
        (32, Int4Plan("tiles", 4, 32, 2, 4, 3, 2, launch="late")),
        (64, Int4Plan("tiles", 4, 64, 2, 4, 4, 2)),
        (128, Int4Plan("tiles", 4, 64, 2, 4, 4, 2)),
        _MANY,
    ),
    (57344, 8192): (
        (1, Int4Plan("tiles", 4, 16, 1, 4, 6, 2)),
        (16, Int4Plan("tiles", 4, 16, 1, 4, 4, 2)),
        (32, Int4Plan("tiles", 4, 32, 1, 4, 4, 2, launch="late")),
        (64, Int4Plan("tiles", 4, 64, 1, 4, 3, 2)),
        (128, Int4Plan("tiles", 4, 64, 1, 4, 4, 2)),
        _MANY,
    ),
    (8192, 28672): (
        (1, Int4Plan("tiles", 4, 16, 4, 4, 4, 2, launch="late")),
        (16, Int4Plan("tiles", 4, 16, 4, 4, 4, 2)),
        (32, Int4Plan("tiles", 4, 32, 4, 4, 6, 2)),
        (64, Int4Plan("tiles", 4, 64, 2, 4, 3, 2)),
        (128, Int4Plan("tiles", 4, 64, 2, 4, 4, 2)),
        _MANY,
    ),
}
# What is tried on Hopper, and how long it takes in us on an H100 (`bench/notes/linear_int4.md`).
_FEWEST_TOKENS, _MOST_TOKENS = 65, 2048  # beyond, dequantising once and cuBLAS cost less
_MULTIPROCESSORS = 132
_BEGINNING = 2.0  # until the first product
# The Gluon kernel's plans: 64 k of a tile; a tile's parts stored and added up.
_GLUON = {Int4Plan("gluon", 8, 128, 1, 12, 8): (0.45, 7.0), Int4Plan("gluon", 8, 256, 1, 12, 4): (0.75, 13.0)}
_SHARERS = 4
# Triton's: 64 k of a tile of 128 x 64, and of one of 64 x 64, two of which run side by side.
_TRITON = {Int4Plan("tiles", 8, 64, 1, 8, 4, 2): 0.33, Int4Plan("tiles", 4, 64, 2, 4, 4, 2): 0.41}
INT4_PLANS = all_plans(_INT4)
INT4_GLUON_PLANS = [replace(plan, splits=splits) for plan in _GLUON for splits in (1, _SHARERS)]


def _quickest(tokens: int, rows: int, depth: int) -> Int4Plan:
    """Of the plans for a hundred tokens and more on Hopper: by how many tiles each multiprocessor
    has.
    """
    rounds, costs = depth // 64, {}
    for plan, (round_time, sharing) in _GLUON.items():
        whole, left = divmod(_cdiv(rows, 16 * plan.tiles) * _cdiv(tokens, plan.tokens), plan.programs)
        costs[plan] = _BEGINNING + rounds * round_time * (whole + (left > 0))
        if left and plan.programs // left > 1:
            part = 1 / min(_SHARERS, plan.programs // left)
            costs[replace(plan, splits=_SHARERS)] = _BEGINNING + rounds * round_time * (whole + part) + sharing
    for plan, round_time in _TRITON.items():
        tiles = _cdiv(rows, 16 * plan.tiles) * _cdiv(tokens, plan.tokens)
        turns = _cdiv(tiles, _MULTIPROCESSORS)  # one whole tile, or both halves of one, in each
        costs[plan] = _BEGINNING + turns * rounds / plan.splits * round_time
    return min(costs, key=lambda plan: costs[plan])


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache  # without a graph every product of every step asks
def int4_plan(tokens: int, rows: int, depth: int, gluon: bool) -> Int4Plan | None:
    """For x [tokens, depth] and a weight [rows, depth]; None: dequantise to 16 bits and call
    cuBLAS. gluon: whether the kernel of that name can run.
    """
    if gluon and _FEWEST_TOKENS <= tokens <= _MOST_TOKENS:
        return _quickest(tokens, rows, depth)
    return plan_for(nearest_entry(_INT4, rows, depth), tokens)


def int4_rehearsal(rows: int, depth: int, gluon: bool) -> list[int]:
    """Numbers of tokens that meet every kernel that any number does."""
    met: dict[Int4Plan | None, int] = {}
    for tokens in (*range(1, _FEWEST_TOKENS), *range(_FEWEST_TOKENS, _MOST_TOKENS + 2, 16)):
        plan = int4_plan(tokens, rows, depth, gluon)
        # How the gluon kernel shares tiles is no other kernel.
        met.setdefault(replace(plan, splits=1) if plan and plan.kernel == "gluon" else plan, tokens)
    return list(met.values())


def lines() -> Iterator[str]:
    """The table, a line a plan."""
    yield from table_lines("int4", _INT4, "dequantise, cuBLAS")
    yield f"int4 on Hopper, {_FEWEST_TOKENS} to {_MOST_TOKENS} tokens: the quickest by `int4_table.py`"
