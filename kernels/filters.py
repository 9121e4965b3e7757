"""Top-k, top-p and min-p in Triton, for one row, from the sub-tile peaks of the first pass; neither sorts.

Top-k: at least k logits reach the k-th highest peak, so only the sub-tiles whose peak reaches it are read again, and
the k-th highest logit is found among the few logits over that bound by bisection over the bits of a float.

Top-p, by rejection (FlashInfer's idea, arXiv:2501.01005 and its blog of 2025-03-10, here with noise that stays): if the
highest score of all lies in the top-p set it is the set's highest, which one sum over the logits above it tells; if
not, the set lies strictly above, and the search goes on there. Only sub-tiles whose peak is above the candidate are
read.

What counts as equal, and in which order the filters apply, stands in `reference_draw.py`.
"""

import triton
import triton.language as tl

from octavo.kernels.logits import load_raw, process
from octavo.kernels.noise import gumbel
from octavo.kernels.sub_tiles import float_of, key_of, list_sub_tiles, listed_ids

_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _listed_logits(source, listed_ptr, start, count, TILE: tl.constexpr, SUB: tl.constexpr):
    """Ids and processed logits of a tile of the listed sub-tiles: # [TILE] int32, [TILE] f32."""
    logits_ptr, row_ptr, record_ptr, bias_ptr, drafts_ptr, counts_ptr, masks_ptr, mask_width, vocab, place = source
    ids = listed_ids(listed_ptr, start, count, vocab, TILE, SUB)
    logits = process(
        load_raw(logits_ptr, ids, vocab), ids, row_ptr, record_ptr, bias_ptr, drafts_ptr, counts_ptr, masks_ptr,
        mask_width, vocab, place,
    )  # fmt: skip
    return ids, logits


@triton.jit
def top_k_threshold(
    source, sub_peaks, threshold, peak, top_k, listed_ptr, kept_ptr,
    TILE: tl.constexpr, SUB: tl.constexpr, KEPT: tl.constexpr, SUBS: tl.constexpr,
):  # fmt: skip
    """The k-th highest logit, or `threshold` if fewer than k logits reach that. sub_peaks # [SUBS] f32; kept_ptr #
    [KEPT] f32.
    """
    # As keys: at least k logits reach `low` (or it is the threshold), fewer than k reach `high`.
    low = key_of(threshold).to(tl.int64)
    high = key_of(peak).to(tl.int64) + 1
    peaks_high = high
    while peaks_high - low > 1:
        middle = low + (peaks_high - low) // 2
        if tl.sum((sub_peaks >= float_of(middle)).to(tl.int32), 0) >= top_k:
            low = middle
        else:
            peaks_high = middle

    bound = float_of(low)
    count = list_sub_tiles(sub_peaks, bound, listed_ptr, SUBS)
    num_kept = 0
    for start in range(0, count * SUB, TILE):
        _, logits = _listed_logits(source, listed_ptr, start, count, TILE, SUB)
        hit = (logits >= bound).to(tl.int32)
        to = num_kept + tl.cumsum(hit, 0) - 1
        tl.store(kept_ptr + to, logits, mask=(hit == 1) & (to < KEPT))
        num_kept += tl.sum(hit, 0)
    tl.debug_barrier()
    lane = tl.arange(0, KEPT)
    kept = tl.load(kept_ptr + lane, mask=lane < num_kept, other=-float("inf"))

    while high - low > 1:
        middle = low + (high - low) // 2
        reached = tl.sum((kept >= float_of(middle)).to(tl.int32), 0)
        if num_kept > KEPT:
            # Many logits reach the bound (a huge k, or equal logits): count them where they are.
            reached = 0
            for start in range(0, count * SUB, TILE):
                _, logits = _listed_logits(source, listed_ptr, start, count, TILE, SUB)
                reached += tl.sum((logits >= float_of(middle)).to(tl.int32), 0)
        if reached >= top_k:
            low = middle
        else:
            high = middle
    return float_of(low)


@triton.jit
def search(
    source, sub_peaks, token, token_logit, threshold, has_threshold, top_p, peak, total, key_first, key_second,
    listed_ptr,
    TILE: tl.constexpr, SUB: tl.constexpr, SUBS: tl.constexpr,
):  # fmt: skip
    """The token with the highest logit + noise among the logits that reach `threshold` and are in the top-p set of
    those.

    token, token_logit: the highest logit + noise of the whole row; total: the row's mass relative to `peak`.
    """
    # Each round scans what is above a pivot: at first, if the threshold cuts what matters, the float below it, which
    # gives a first candidate and the mass; then each candidate, to see whether the top-p set excludes it.
    entering = has_threshold & ((top_p < 1) | (token_logit < threshold))
    pivot = token_logit
    if entering:
        pivot = float_of(key_of(threshold).to(tl.int64) - 1)
    scanning = entering | (top_p < 1)
    while scanning:
        tl.debug_barrier()  # all have read the list before it is written anew
        count = list_sub_tiles(sub_peaks, float_of(key_of(pivot).to(tl.int64) + 1), listed_ptr, SUBS)
        mass = 0.0
        best_score = -float("inf")
        best_token = _NO_TOKEN + 0
        best_logit = -float("inf")
        for start in range(0, count * SUB, TILE):
            ids, logits = _listed_logits(source, listed_ptr, start, count, TILE, SUB)
            above = logits > pivot
            mass += tl.sum(tl.where(above, tl.exp(logits - peak), 0.0), 0)
            scores = tl.where(above, logits + gumbel(ids, key_first, key_second), -float("inf"))
            score = tl.max(scores, 0)
            if score > best_score:
                best_score = score
                best_token = tl.min(tl.where(scores == score, ids, _NO_TOKEN), 0)
                best_logit = tl.max(tl.where(ids == best_token, logits, -float("inf")), 0)
        # So written that an empty rest, or a mass that is no number, ends the search too.
        onward = entering | ((mass >= top_p * total) & (best_token != _NO_TOKEN))
        if entering:
            total = mass
        if onward:
            token = best_token
            pivot = best_logit
        scanning = onward & (top_p < 1)
        entering = False
    return token
