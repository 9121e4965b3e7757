"""Log-probabilities of drawn tokens and of the top tokens, in Triton, from the sub-tile peaks of
`sample.py`'s only pass. `prompt_logprobs.py` has those of a prompt's tokens.

The top list is taken one by one: the highest peak names the sub-tile, the sub-tile's `SUB` logits
the token, and what is left of the sub-tile its next peak. The rank of the drawn token is counted in
the sub-tiles whose peak reaches it. Twin: `reference_logprobs.write_logprobs`.
"""

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.step import plan_format as fmt
from octavo.kernels.step.logits import load_raw
from octavo.kernels.step.plan_format import Plan
from octavo.kernels.step.sub_tiles import float_of, key_of

_ROW_WORDS = tl.constexpr(fmt.ROW_WORDS)
_ROW_QUERY_START = tl.constexpr(fmt.ROW_QUERY_START)
_ROW_FLAGS = tl.constexpr(fmt.ROW_FLAGS)
_LOGPROBS = tl.constexpr(fmt.LOGPROBS)
_RESULT_TOKENS = tl.constexpr(fmt.RESULT_TOKENS)
_RESULT_NUM_VALID = tl.constexpr(fmt.RESULT_NUM_VALID)
_NO_TOKEN = tl.constexpr(2**31 - 1)
_EXHAUSTED = tl.constexpr(-(2**31))  # key of a sub-tile without tokens left: below that of -inf


def write_logprobs(
    logits: Tensor,
    raw_peaks: Tensor,
    raw_tiles: Tensor,
    words: Tensor,
    plan: Plan,
    vocab: int,
    result: Tensor,
    *,
    tile: int,
    sub: int,
) -> None:
    """Fills the logprob columns of the result for the valid tokens of rows with `LOGPROBS`; leaves
    other places as they are.

    raw_peaks [num_logits, subs] f32: highest raw logit of each sub-tile; raw_tiles [2, num_logits,
    tiles] f32: highest raw logit of each tile, and its sum of exponentials relative to that; words:
    the plan as int32.
    """
    length, top = plan.decode_query_len, plan.max_logprobs
    num_logits, subs = raw_peaks.shape
    tiles = raw_tiles.shape[2]
    _, logprob_at, rank_at, ids_at, tops_at = fmt.result_columns(length, top)
    _logprobs_kernel[(plan.padded_rows, length)](
        logits, raw_peaks, raw_tiles, words, result,
        plan.rows_offset // 4, plan.padded_decodes, plan.num_decode_tokens, num_logits, vocab, logits.stride(0), tiles,
        subs, plan.result_width, logprob_at, rank_at, ids_at, tops_at, top,
        TILES=triton.next_power_of_2(tiles), SUBS=triton.next_power_of_2(subs), TILE=tile, SUB=sub,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "tiles_ptr",  # where it begins depends on the number of rows: aligned or not, it is one variant
        "rows_at", "num_decodes", "decode_tokens", "num_logits", "result_width", "logprob_at", "rank_at", "ids_at",
        "tops_at", "top",
    ]
)  # fmt: skip
def _logprobs_kernel(
    logits_ptr, peaks_ptr, tiles_ptr, words_ptr, result_ptr,
    rows_at, num_decodes, decode_tokens, num_logits, vocab, logits_stride, tiles, subs,
    result_width, logprob_at, rank_at, ids_at, tops_at, top,
    TILES: tl.constexpr, SUBS: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Program (row, place)."""
    row = tl.program_id(0)
    place = tl.program_id(1)
    row_ptr = words_ptr + rows_at + row * _ROW_WORDS
    flags = tl.load(row_ptr + _ROW_FLAGS)
    result_ptr += row.to(tl.int64) * result_width
    if ((flags & _LOGPROBS) != 0) & (place < tl.load(result_ptr + _RESULT_NUM_VALID)):
        first_index = tl.load(row_ptr + _ROW_QUERY_START)
        index = tl.where(row < num_decodes, first_index + place, decode_tokens + row - num_decodes)
        write_token(
            logits_ptr + index.to(tl.int64) * logits_stride, peaks_ptr, tiles_ptr, index, num_logits, vocab, tiles,
            subs, tl.load(result_ptr + _RESULT_TOKENS + place), result_ptr + logprob_at + place,
            result_ptr + rank_at + place, result_ptr + ids_at + place * top, result_ptr + tops_at + place * top, top,
            TILES, SUBS, TILE, SUB,
        )  # fmt: skip


@triton.jit
def write_token(
    logits_row_ptr, peaks_ptr, tiles_ptr,  # as `write_logprobs` has them; the first points to the token's row
    index,  # of the row of logits
    num_logits, vocab, tiles, subs,
    token,
    logprob_ptr, rank_ptr, ids_ptr, tops_ptr,  # where its log probability, its rank and the top ones go
    top,
    TILES: tl.constexpr, SUBS: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Log probability and rank of a token, and the `top` likeliest ones with theirs."""
    tile_lane = tl.arange(0, TILES)
    in_tiles = tile_lane < tiles
    tile_at = index * tiles + tile_lane
    tile_peaks = tl.load(tiles_ptr + tile_at, mask=in_tiles, other=-float("inf"))
    tile_masses = tl.load(tiles_ptr + num_logits * tiles + tile_at, mask=in_tiles, other=0.0)
    peak = tl.max(tile_peaks, 0)
    log_total = tl.log(tl.sum(tile_masses * tl.exp(tile_peaks - peak), 0))

    chosen = tl.load(logits_row_ptr + token).to(tl.float32)
    store_float(logprob_ptr, chosen - peak - log_total)
    before = 0
    for tile in range(tiles):
        if tl.load(tiles_ptr + index * tiles + tile) >= chosen:
            ids = tile * TILE + tl.arange(0, TILE)
            logits = load_raw(logits_row_ptr, ids, vocab)
            ahead = (logits > chosen) | ((logits == chosen) & (ids < token))
            before += tl.sum(ahead.to(tl.int32), 0)
    tl.store(rank_ptr, before + 1)

    sub_lane = tl.arange(0, SUBS)
    sub_peaks = tl.load(peaks_ptr + index * subs + sub_lane, mask=sub_lane < subs, other=0.0)
    # Adding 0.0 makes -0.0 equal to 0.0 as a key too.
    keys = tl.where(sub_lane * SUB < vocab, key_of(sub_peaks + 0.0), _EXHAUSTED)
    lane = tl.arange(0, SUB)
    last_logit = float("inf")
    last_token = -1
    for entry in range(top):
        key = tl.max(keys, 0)
        # The lowest sub-tile with this peak holds the lowest token with it.
        sub = tl.min(tl.where(keys == key, sub_lane, SUBS), 0)
        logit = float_of(key)
        ids = sub * SUB + lane
        logits = load_raw(logits_row_ptr, ids, vocab)
        free = (ids < vocab) & ((logits < last_logit) | ((logits == last_logit) & (ids > last_token)))
        found = tl.min(tl.where(free & (logits == logit), ids, _NO_TOKEN), 0)
        if key == _EXHAUSTED:
            found = -1
            logit = -float("inf")
        tl.store(ids_ptr + entry, found)
        store_float(tops_ptr + entry, logit - peak - log_total)
        left = tl.where(free & (ids != found), key_of(logits + 0.0), _EXHAUSTED)
        keys = tl.where(sub_lane == sub, tl.max(left, 0), keys)
        last_logit = logit
        last_token = found


@triton.jit
def store_float(pointer, value):
    """Stores a float into an int32 buffer."""
    tl.store(pointer, value.to(tl.int32, bitcast=True))
