"""How decode attention deals out its work: the line of tiles, and the stretch of it that a program
takes.

A place of the line is a tile of keys of a unit (a row and a KV head), or one of the places that
stand for what it costs to begin a unit. Rows come one after the other, in each its units, in each
unit `lead` such places and then its tiles.
"""

import triton
import triton.language as tl


@triton.jit
def tiles_of_row(seq_len, QUERY_LEN: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """The first tile that a row of QUERY_LEN tokens needs, and how many. A row of fewer may not
    need the first: what must not be read is masked key by key, and tiles only share out the work.
    """
    first = tl.zeros_like(seq_len)
    if WINDOW > 0:
        first = tl.maximum(seq_len - QUERY_LEN + 1 - WINDOW, 0) // TILE
    return first, tl.cdiv(seq_len, TILE) - first


@triton.jit
def _active_programs(total, units, equal, programs, PER_SM: tl.constexpr, LEAST: tl.constexpr):
    """How many of the programs share a line of length `total` with `units` units."""
    # LEAST tiles each at least, if that leaves no multiprocessor idle: each piece costs the merge.
    active = tl.maximum(tl.minimum(programs, total // LEAST), tl.minimum(programs // PER_SM, tl.maximum(total, 1)))
    # Units of equal lengths: whole ones, or whole fractions of one, if that takes few programs
    # away. Then no program has two pieces, or none at all.
    even = tl.where(units > active, tl.cdiv(units, tl.cdiv(units, active)), active // units * units)
    return tl.where(equal & (even * 16 >= active * 15), even, active)


@triton.jit
def stretch_begin(program, quota, extra):
    """Where a program's stretch begins: `quota` places each, and one more in each of the first
    `extra` programs.
    """
    return program * quota + tl.minimum(program, extra)


@triton.jit
def owner(place, quota, extra):
    """The program whose stretch a place is in."""
    longer = extra * (quota + 1)
    return tl.where(place < longer, place // (quota + 1), extra + (place - longer) // quota)


@triton.jit
def find_stretch(
    seq_lens_ptr,
    row_slots_ptr,
    num_rows,
    BLOCK_R: tl.constexpr,  # >= num_rows
    QUERY_LEN: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    UNITS: tl.constexpr,
    PER_SM: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT_COST: tl.constexpr,
):
    """The program's stretch of the line (begin, end), how stretches are dealt out (quota, extra),
    how many places a unit has before its tiles, the row that the stretch begins in (with its
    beginning, length and slot), and whether there are rows of no keys.
    """
    rows = tl.arange(0, BLOCK_R)
    # `.cg`: read before the wait for the predecessor, so not from an L1 that may still hold the
    # last step's.
    seq_lens = tl.load(seq_lens_ptr + rows, mask=rows < num_rows, other=0, cache_modifier=".cg")
    slots = tl.load(row_slots_ptr + rows, mask=rows < num_rows, other=0, cache_modifier=".cg")
    _, row_tiles = tiles_of_row(seq_lens, QUERY_LEN, WINDOW, TILE)
    has_keys = (row_tiles > 0).to(tl.int32)
    num_filled = tl.sum(has_keys, axis=0)
    # Equal units are dealt out by their tiles alone.
    equal = tl.sum(row_tiles, axis=0) == num_filled * tl.max(row_tiles, axis=0)
    lead = tl.where(equal, 0, UNIT_COST)
    unit_places = (row_tiles + lead) * has_keys
    row_ends = tl.cumsum(unit_places * UNITS, axis=0)
    total = tl.max(row_ends, axis=0)
    active = _active_programs(total, tl.maximum(num_filled * UNITS, 1), equal, tl.num_programs(0), PER_SM, LEAST)
    quota = total // active
    extra = total % active
    program = tl.program_id(0)
    begin = stretch_begin(tl.minimum(program, active), quota, extra)
    end = stretch_begin(tl.minimum(program + 1, active), quota, extra)
    # Past the end of the line there is no such row, and nothing follows.
    row_begins = row_ends - unit_places * UNITS
    mine = (row_begins <= begin) & (begin < row_ends)
    row = tl.sum(tl.where(mine, rows, 0), axis=0)
    row_begin = tl.sum(tl.where(mine, row_begins, 0), axis=0)
    seq_len = tl.sum(tl.where(mine, seq_lens, 0), axis=0)
    slot = tl.sum(tl.where(mine, slots, 0), axis=0)
    return begin, end, quota, extra, lead, row, row_begin, seq_len, slot, num_filled < num_rows


@triton.jit
def unit_at(place, row_begin, num_tiles, lead):
    """The unit that a place lies in, of a row that begins at `row_begin`, and where its tiles begin
    and end.
    """
    unit = (place - row_begin) // (num_tiles + lead)
    begin = row_begin + unit * (num_tiles + lead) + lead
    return unit, begin, begin + num_tiles
