"""Tables of how a linear layer of few tokens is cut (kernel, tile, split, launch), by shape and
number of tokens.

Measured on an H100 (`bench/LOG.md` has the sweep) at the shapes of Llama-2-7B and one of
Llama-3-70B; an H200 has the same multiprocessors and takes the same. A shape that is not in a table
takes the entry of the shape nearest to it, by the ratios of outputs and of inputs.
"""

import math
from collections.abc import Iterator
from typing import TypeVar

Plan = TypeVar("Plan")
# (at most so many tokens, plan) in rising order; None: the table's own way out (cuBLAS, another
# table).
Entry = tuple[tuple[int, Plan | None], ...]
Table = dict[tuple[int, int], Entry[Plan]]  # by (outputs, inputs)


def nearest_entry(table: Table[Plan], rows: int, depth: int) -> Entry[Plan]:
    """The entry of a weight [rows, depth]."""
    if (rows, depth) in table:
        return table[rows, depth]
    nearest = min(table, key=lambda shape: (abs(math.log(shape[0] / rows)) + abs(math.log(shape[1] / depth)), shape))
    return table[nearest]


def plan_for(entry: Entry[Plan], tokens: int) -> Plan | None:
    """The plan of `tokens` tokens; None where the entry says so, and for more than its last."""
    return next((plan for most, plan in entry if tokens <= most), None)


def all_plans(table: Table[Plan]) -> list[Plan]:
    """Every plan of a table once, in a fixed order."""
    return sorted({plan for entry in table.values() for _, plan in entry if plan}, key=str)


def lines(name: str, table: Table[Plan], otherwise: str) -> Iterator[str]:
    """A table to print, a line a plan; `otherwise`: what None stands for."""
    for (rows, depth), entry in table.items():
        for most, plan in entry:
            yield f"{name} {rows:5} x {depth:5}, up to {most:4} tokens: {plan or otherwise}"
