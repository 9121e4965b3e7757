"""Top-k, top-p and min-p in Triton, for one row, from the group peaks of the first pass; none sorts.

Min-p is a bound on the logits. Top-k gives one too: at least k logits reach the k-th highest peak. And where neither
limits, top-p only has to know the mass above the token drawn from the whole row. So one reading of the groups whose
peak reaches the bound collects what matters in a pool, mostly a few dozen logits, and the rest reads the pool: the k-th
highest logit by bisection over the bits of a float, the top-p set by rejection (FlashInfer's idea, arXiv:2501.01005 and
its blog of 2025-03-10, here with noise that stays): if the highest score of all lies in the set it is the set's
highest, which one sum over the logits above it tells; if not, the set lies strictly above, and the search goes on
there.

Where more logits reach the bound than a pool holds, the rest reads the groups instead.

What counts as equal, and in which order the filters apply, stands in `reference_draw.py`.
"""

import triton
import triton.language as tl

from octavo.kernels.logits import load_raw, process
from octavo.kernels.noise import gumbel
from octavo.kernels.reference_draw import FILTERED_NOISE
from octavo.kernels.sub_tiles import float_of, key_of, list_sub_tiles, listed_ids

_NO_TOKEN = tl.constexpr(2**31 - 1)
_FILTERED_NOISE = tl.constexpr(FILTERED_NOISE)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # below every logit that can be drawn


@triton.jit
def read_logits(source, ids):
    """Processed logits of tokens: # int32 [N] -> f32 [N]."""
    logits_ptr, row_ptr, record_ptr, bias_ptr, drafts_ptr, counts_ptr, masks_ptr, mask_width, vocab, place = source
    return process(
        load_raw(logits_ptr, ids, vocab), ids, row_ptr, record_ptr, bias_ptr, drafts_ptr, counts_ptr, masks_ptr,
        mask_width, vocab, place,
    )  # fmt: skip


@triton.jit
def draw_filtered(
    source, sub_peaks, token, token_logit, peak, total, top_k, top_p, min_p, key_first, key_second,
    listed_ptr, kept_ptr, kept_ids_ptr,
    TILE: tl.constexpr, SUB: tl.constexpr, POOL: tl.constexpr, SUBS: tl.constexpr,
):  # fmt: skip
    """`token`, drawn from the whole row, if the filters allow it, else the token with the highest logit + noise of
    those they allow.

    sub_peaks # [SUBS] f32; total: the row's mass relative to `peak`; listed_ptr # [subs] int32, kept_ptr # [POOL] f32
    and kept_ids_ptr # [POOL] int32 are the row's to write. At least one filter is on.
    """
    limited = (top_k > 0) & (top_k < source[8])
    bounded = limited | (min_p > 0)
    bound = tl.full([], _LOWEST, tl.float32)
    if min_p > 0:
        bound = peak + tl.log(min_p)
    if limited:
        # As keys: at least k peaks reach `low` (or it is the bound), fewer than k reach `high`.
        low = key_of(bound).to(tl.int64)
        high = key_of(peak + 0.0).to(tl.int64) + 1
        while high - low > 1:
            middle = low + (high - low) // 2
            if tl.sum((sub_peaks >= float_of(middle)).to(tl.int32), 0) >= top_k:
                low = middle
            else:
                high = middle
        bound = float_of(low)
    if not bounded:
        bound = _next_above(token_logit)

    count = list_sub_tiles(sub_peaks, bound, listed_ptr, SUBS)
    size = count * SUB
    num_kept = 0
    masses = tl.zeros([TILE], tl.float32)
    masses_ahead = tl.zeros([TILE], tl.float32)
    for start in range(0, size, TILE):
        ids, logits = _tile(source, listed_ptr, kept_ptr, kept_ids_ptr, False, start, size, TILE, SUB)
        hit = logits >= bound
        to = num_kept + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(kept_ptr + to, logits, mask=hit & (to < POOL))
        tl.store(kept_ids_ptr + to, ids, mask=hit & (to < POOL))
        num_kept += tl.sum(hit.to(tl.int32), 0)
        weights = tl.exp(logits - peak)
        masses += tl.where(hit, weights, 0.0)
        masses_ahead += tl.where(logits > token_logit, weights, 0.0)
    tl.debug_barrier()
    pooled = num_kept <= POOL
    if pooled:
        size = num_kept
    if bounded:
        total = tl.sum(masses, 0)
    scanning = _excluded(tl.sum(masses_ahead, 0), top_p, total) | (bounded & (token_logit < bound))

    if limited:
        low = key_of(bound).to(tl.int64)
        high = key_of(peak + 0.0).to(tl.int64) + 1
        while high - low > 1:
            middle = low + (high - low) // 2
            reached = 0
            for start in range(0, size, TILE):
                _, logits = _tile(source, listed_ptr, kept_ptr, kept_ids_ptr, pooled, start, size, TILE, SUB)
                reached += tl.sum((logits >= float_of(middle)).to(tl.int32), 0)
            if reached >= top_k:
                low = middle
            else:
                high = middle
        bound = float_of(low)
        scanning = (top_p < 1) | (token_logit < bound)

    # The first round asks whether the token is allowed; each round finds the highest score of what reaches its bound,
    # the next asks whether the top-p set excludes it.
    first = True
    while scanning:
        mass = 0.0
        ahead = 0.0
        best_score = -float("inf")
        best_token = _NO_TOKEN + 0
        best_logit = -float("inf")
        for start in range(0, size, TILE):
            ids, logits = _tile(source, listed_ptr, kept_ptr, kept_ids_ptr, pooled, start, size, TILE, SUB)
            reaching = logits >= bound
            weights = tl.where(reaching, tl.exp(logits - peak), 0.0)
            mass += tl.sum(weights, 0)
            ahead += tl.sum(tl.where(logits > token_logit, weights, 0.0), 0)
            scores = tl.where(reaching, logits + gumbel(ids + _FILTERED_NOISE, key_first, key_second), -float("inf"))
            score = tl.max(scores, 0)
            if score > best_score:
                best_score = score
                best_token = tl.min(tl.where(scores == score, ids, _NO_TOKEN), 0)
                best_logit = tl.max(tl.where(ids == best_token, logits, -float("inf")), 0)
        if first & bounded:
            total = mass
        scanning = _excluded(ahead, top_p, total) | (first & bounded & (token_logit < bound))
        if scanning:
            token = best_token
            token_logit = best_logit
            bound = _next_above(best_logit)
            scanning = top_p < 1
        first = False
    return token


@triton.jit
def _tile(
    source, listed_ptr, kept_ptr, kept_ids_ptr, pooled, start, size,
    TILE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Ids and processed logits of `TILE` positions of the pool or of the listed groups, -inf from `size` on:
    # [TILE] int32, [TILE] f32.
    """
    if pooled:
        position = start + tl.arange(0, TILE)
        ids = tl.load(kept_ids_ptr + position, mask=position < size, other=0)
        logits = tl.load(kept_ptr + position, mask=position < size, other=-float("inf"))
    else:
        ids = listed_ids(listed_ptr, start, size // SUB, source[8], TILE, SUB)
        logits = read_logits(source, ids)
    return ids, logits


@triton.jit
def _excluded(ahead, top_p, total):
    """Whether the top-p set is above the token: `ahead` is the mass above it."""
    # So written that a mass that is no number excludes nothing.
    return (top_p < 1) & (ahead > 0) & (ahead >= top_p * total)


@triton.jit
def _next_above(value):
    """The next float above; adding 0.0 makes -0.0 equal to 0.0 as a key too."""
    return float_of(key_of(value + 0.0) + 1)
