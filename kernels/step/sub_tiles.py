"""Searching a row by the peaks of its sub-tiles, in Triton; and floats as keys in the same order."""

import triton
import triton.language as tl


@triton.jit
def key_of(value):
    """int32 key of a float, ordered as the floats are (-0.0 just below 0.0)."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def float_of(key):
    """The float of an ordered key."""
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def list_sub_tiles(sub_peaks, bound, listed_ptr, SUBS: tl.constexpr):
    """Writes the numbers of the sub-tiles whose peak is >= bound, in order, and returns how many;
    safe to read at once.

    sub_peaks # [SUBS] f32
    """
    hit = (sub_peaks >= bound).to(tl.int32)
    tl.store(listed_ptr + tl.cumsum(hit, 0) - 1, tl.arange(0, SUBS), mask=hit == 1)
    tl.debug_barrier()
    return tl.sum(hit, 0)


@triton.jit
def listed_ids(listed_ptr, start, count, vocab, TILE: tl.constexpr, SUB: tl.constexpr):
    """Token ids of the listed sub-tiles, `TILE` from position `start` of their concatenation on: #
    [TILE] int32.

    Past the end of the list they are `vocab`, as they may be past the end of the vocabulary.
    """
    position = start + tl.arange(0, TILE)
    sub = tl.load(listed_ptr + position // SUB, mask=position < count * SUB, other=0)
    ids = tl.max_contiguous(tl.multiple_of(sub * SUB + position % SUB, [SUB]), [SUB])
    return tl.where(position < count * SUB, ids, vocab)
