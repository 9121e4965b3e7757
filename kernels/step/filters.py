"""Top-k, top-p and min-p in Triton, for one row, from the group peaks of the first pass; none
sorts.

Min-p is a threshold. Top-k gives one too: at least k logits reach the k-th highest peak, so the
groups whose peak does are read once, what reaches it goes into a pool, and the k-th highest logit
is found there by bisection over the bits of a float. Top-p is decided by rejection (FlashInfer's
idea, arXiv:2501.01005 and its blog of 2025-03-10): a drawn token is in the top-p set if the mass
above it is small; if not, the set lies strictly above it, and the next round draws there.

A round is one reading of the groups that have something left: it sums each group inside of one
warp, so nothing waits for anything but memory, and gives both the mass above the last token and
what the next draw needs. Most rounds are spared, since the whole groups that hold the better tokens
already have too little mass to exclude the drawn one.

What counts as equal, and in which order the filters apply, stands in `reference/draw.py`.
"""

import triton
import triton.language as tl

from octavo.kernels.reference.draw import GROUP_NOISE, ROUND_NOISE
from octavo.kernels.step.logits import load_raw, process
from octavo.kernels.step.noise import gumbel
from octavo.kernels.step.sub_tiles import float_of, key_of, list_sub_tiles, listed_ids

_NO_TOKEN = tl.constexpr(2**31 - 1)
_GROUP_NOISE = tl.constexpr(GROUP_NOISE)
_ROUND_NOISE = tl.constexpr(ROUND_NOISE)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # below every logit that can be drawn
_SURELY = tl.constexpr(1 - 2**-12)  # more than the rounding of a sum


@triton.jit
def read_logits(source, ids):
    """Processed logits of tokens: # int32 [N] -> f32 [N]."""
    logits_ptr, row_ptr, record_ptr, bias_ptr, drafts_ptr, counts_ptr, masks_ptr, mask_width, vocab, place = source
    return process(
        load_raw(logits_ptr, ids, vocab), ids, row_ptr, record_ptr, bias_ptr, drafts_ptr, counts_ptr, masks_ptr,
        mask_width, vocab, place,
    )  # fmt: skip


@triton.jit
def draw(source, groups, log_masses, bound, number, key_first, key_second, SUB: tl.constexpr):
    """Draws a token that reaches `bound` and its logit; `number`: which round's noise.

    groups, log_masses # [N] int32 and f32: groups of tokens, and the logarithm of what each has
    left (-inf: nothing).
    """
    base = number * _ROUND_NOISE
    scores = log_masses + gumbel(groups + (base + _GROUP_NOISE), key_first, key_second)
    group = tl.min(tl.where(scores == tl.max(scores, 0), groups, _NO_TOKEN), 0)
    ids = group * SUB + tl.arange(0, SUB)
    logits = read_logits(source, ids)
    scores = tl.where(logits >= bound, logits + gumbel(ids + base, key_first, key_second), -float("inf"))
    token = tl.min(tl.where(scores == tl.max(scores, 0), ids, _NO_TOKEN), 0)
    return token, tl.max(tl.where(ids == token, logits, -float("inf")), 0)


@triton.jit
def draw_filtered(
    source, sub_peaks, sub_masses, token, token_logit, peak, top_k, top_p, min_p, key_first, key_second,
    listed_ptr, left_ptr, kept_ptr,
    READ: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr, POOL: tl.constexpr, SUBS: tl.constexpr,
):  # fmt: skip
    """`token`, drawn from the whole row, if the filters allow it, else one drawn from what they
    allow.

    sub_peaks, sub_masses [SUBS] f32: of each group, masses relative to `peak`; listed_ptr [subs]
    int32, left_ptr [subs] f32 and kept_ptr [POOL] f32 are the row's to write. READ tokens are read
    at a time, TILE where they are pooled.
    """
    threshold = tl.full([], _LOWEST, tl.float32)
    if min_p > 0:
        threshold = peak + tl.log(min_p)
    if (top_k > 0) & (top_k < source[8]):
        threshold = _top_k_threshold(source, sub_peaks, threshold, peak, top_k, listed_ptr, kept_ptr, TILE, SUB, POOL)
    sub = tl.arange(0, SUBS)
    number = 0
    left = sub_masses  # of each group, at most what is above the bound
    total = tl.sum(left, 0)
    below = token_logit < threshold
    need_total = (threshold > _LOWEST) & (top_p < 1)
    scanning = below | (top_p < 1)
    while scanning:
        # A first round may only be for the mass that the threshold leaves.
        bound = threshold
        if (below | need_total) == 0:
            bound = _next_above(token_logit)
        reaching = sub_peaks >= bound
        # Most tokens need no reading: what their betters' groups hold altogether is too little to
        # exclude them.
        if ((below | need_total) == 0) & (tl.sum(tl.where(reaching, left, 0.0), 0) < top_p * total * _SURELY):
            scanning = False
        else:
            tl.debug_barrier()  # all have read the lists before they are written anew
            count = list_sub_tiles(sub_peaks, bound, listed_ptr, SUBS)
            for start in range(0, count * SUB, READ):
                ids = listed_ids(listed_ptr, start, count, source[8], READ, SUB)
                logits = read_logits(source, ids)
                weights = tl.where(logits >= bound, tl.exp(logits - peak), 0.0)
                lane = start // SUB + tl.arange(0, READ // SUB)
                group = tl.load(listed_ptr + lane, mask=lane < count, other=0)
                tl.store(left_ptr + group, tl.sum(tl.reshape(weights, [READ // SUB, SUB]), 1), mask=lane < count)
            tl.debug_barrier()
            left = tl.load(left_ptr + sub, mask=reaching, other=0.0)
            mass = tl.sum(left, 0)
            again = below
            if need_total:
                total = mass
            elif below == 0:
                # So written that an empty rest, or a mass that is no number, ends the search.
                again = (mass > 0) & (mass >= top_p * total)
            if again:
                number += 1
                token, token_logit = draw(source, sub, tl.log(left), bound, number, key_first, key_second, SUB)
            scanning = (again | need_total) & (top_p < 1)
            need_total = False
            below = False
    return token


@triton.jit
def _next_above(value):
    """The next float above; adding 0.0 makes -0.0 equal to 0.0 as a key too."""
    return float_of(key_of(value + 0.0) + 1)


@triton.jit
def _top_k_threshold(
    source, sub_peaks, threshold, peak, top_k, listed_ptr, kept_ptr,
    TILE: tl.constexpr, SUB: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """The k-th highest logit, or `threshold` if fewer than k logits reach that."""
    # As keys: at least k peaks reach `low` (or it is the threshold), fewer than k reach `high`.
    low = key_of(threshold).to(tl.int64)
    high = key_of(peak + 0.0).to(tl.int64) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        if tl.sum((sub_peaks >= float_of(middle)).to(tl.int32), 0) >= top_k:
            low = middle
        else:
            high = middle

    bound = float_of(low)
    count = list_sub_tiles(sub_peaks, bound, listed_ptr, sub_peaks.shape[0])
    num_kept = 0
    for start in range(0, count * SUB, TILE):
        logits = read_logits(source, listed_ids(listed_ptr, start, count, source[8], TILE, SUB))
        hit = logits >= bound
        to = num_kept + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(kept_ptr + to, logits, mask=hit & (to < POOL))
        num_kept += tl.sum(hit.to(tl.int32), 0)
    tl.debug_barrier()

    # The same over logits. If they are too many (a huge k, or equal logits), they are counted where
    # they are.
    size = num_kept
    if num_kept > POOL:
        size = count * SUB
    high = key_of(peak + 0.0).to(tl.int64) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = 0
        for start in range(0, size, TILE):
            if num_kept > POOL:
                logits = read_logits(source, listed_ids(listed_ptr, start, count, source[8], TILE, SUB))
            else:
                position = start + tl.arange(0, TILE)
                logits = tl.load(kept_ptr + position, mask=position < size, other=-float("inf"))
            reached += tl.sum((logits >= float_of(middle)).to(tl.int32), 0)
        if reached >= top_k:
            low = middle
        else:
            high = middle
    return float_of(low)
