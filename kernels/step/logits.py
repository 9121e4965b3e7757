"""What happens to logits before a draw, in Triton, on one tile in registers: mask, bias, penalties,
temperature.

Nothing is written back: the sampling kernels process each tile as they read it, so the raw logits
stay for logprobs. Every kernel that calls this must be compiled without fused multiply-adds
(`enable_fp_fusion=False`): a logit that two kernels compute has to be the same number. Twin:
`process` of `reference/draw.py`.
"""

import triton
import triton.language as tl

from octavo.kernels.step import plan_format as fmt

_TEMPERATURE = tl.constexpr(fmt.ENTER_TEMPERATURE)
_GREEDY_TEMPERATURE = tl.constexpr(fmt.GREEDY_TEMPERATURE)
_REPETITION = tl.constexpr(fmt.ENTER_REPETITION_PENALTY)
_PRESENCE = tl.constexpr(fmt.ENTER_PRESENCE_PENALTY)
_FREQUENCY = tl.constexpr(fmt.ENTER_FREQUENCY_PENALTY)
_PENALTIES = tl.constexpr(fmt.PENALTIES)
_ROW_SLOT = tl.constexpr(fmt.ROW_SLOT)
_ROW_FLAGS = tl.constexpr(fmt.ROW_FLAGS)
_ROW_MASK = tl.constexpr(fmt.ROW_MASK_ROW)
_ROW_BIAS_START = tl.constexpr(fmt.ROW_BIAS_START)
_ROW_BIAS_LEN = tl.constexpr(fmt.ROW_BIAS_LEN)
_ENTER_WORDS = tl.constexpr(fmt.ENTER_WORDS)


@triton.jit
def load_float(pointer):
    """A float that lies in an int32 buffer."""
    return tl.load(pointer).to(tl.float32, bitcast=True)


@triton.jit
def load_raw(logits_ptr, ids, vocab):
    """Raw logits of a row in f32, -inf outside of the vocabulary. logits_ptr points to the row."""
    return tl.load(logits_ptr + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)


@triton.jit
def process(
    logits,  # [N] f32: raw
    ids,  # [N] int32: their tokens; those from `vocab` on are at -inf already
    row_ptr,  # the row's record in the plan
    record_ptr,  # the slot's parameters
    bias_ptr,  # the plan's bias section
    drafts_ptr,  # the row's drafts
    counts_ptr,  # penalty counts [slots, vocab]
    masks_ptr,  # grammar masks [mask rows, mask_width]
    mask_width,  # 0: no masks
    vocab,
    place,  # which of the row's places; drafts before it count as output
):
    """The tile's logits after mask, bias, penalties and temperature: # [N] f32."""
    # All that decides is requested at once.
    mask_row = tl.load(row_ptr + _ROW_MASK)
    bias_len = tl.load(row_ptr + _ROW_BIAS_LEN)
    flags = tl.load(row_ptr + _ROW_FLAGS)
    temperature = load_float(record_ptr + _TEMPERATURE)
    if (mask_row >= 0) & (mask_width > 0):
        words = masks_ptr + (mask_row + place).to(tl.int64) * mask_width + (ids >> 5)
        bits = tl.load(words, mask=ids < vocab, other=0) >> (ids & 31)
        logits = tl.where((bits & 1) == 1, logits, -float("inf"))

    if bias_len > 0:
        entries_ptr = bias_ptr + 2 * tl.load(row_ptr + _ROW_BIAS_START)
        lowest = tl.min(ids, 0)
        highest = tl.max(ids, 0)
        lane = tl.arange(0, 64)
        for start in range(0, bias_len, 64):
            inside = start + lane < bias_len
            tokens = tl.load(entries_ptr + 2 * (start + lane), mask=inside, other=-1)
            values = tl.load(entries_ptr + 2 * (start + lane) + 1, mask=inside, other=0).to(tl.float32, bitcast=True)
            # Only entries that fall into this tile cost a pass over it.
            hits = (inside & (tokens >= lowest) & (tokens <= highest)).to(tl.int32)
            for _ in range(tl.sum(hits, 0)):
                first = tl.min(tl.where(hits == 1, lane, 64), 0)
                token = tl.sum(tl.where(lane == first, tokens, 0), 0)
                value = tl.sum(tl.where(lane == first, values, 0.0), 0)
                logits += tl.where(ids == token, value, 0.0)
                hits = tl.where(lane == first, 0, hits)

    if (flags & _PENALTIES) != 0:
        slot = tl.load(row_ptr + _ROW_SLOT).to(tl.int64)
        counts = tl.load(counts_ptr + slot * vocab + ids, mask=ids < vocab, other=0)
        for before in range(place):
            counts += tl.where(ids == tl.load(drafts_ptr + before), 2, 0)
        repetition = load_float(record_ptr + _REPETITION)
        repeated = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
        logits = tl.where(counts > 0, repeated, logits)
        times = (counts >> 1).to(tl.float32)
        logits = logits - load_float(record_ptr + _FREQUENCY) * times
        logits = logits - load_float(record_ptr + _PRESENCE) * tl.minimum(times, 1.0)

    if temperature >= _GREEDY_TEMPERATURE:
        logits = logits * tl.div_rn(1.0, temperature)
    return logits
