"""`sample` in Triton: one pass over the logits, then one program a row that chooses, accepts drafts
and advances the state.

Pass 1, `scan_kernel`, one program a tile of `TILE` tokens: processes the tile (`logits.py`) and
keeps the peak and the mass of every group of `GROUP` tokens, in which a sick number becomes NaN.
Pass 2, `_choose_kernel`, one program a row: the first step of a draw needs those figures only, the
second reads one group again, the filters (`filters.py`) some. A batch that is greedy throughout
keeps the highest logit of each tile instead.

All sums have an order that depends on the vocabulary alone, so a row's draw is the same in any
batch. Twin: `reference.step.sample`, with the rules for order and ties in `reference/draw.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launch import has_pdl, let_successor_start, wait_for_inputs
from octavo.kernels.reference.draw import GROUP
from octavo.kernels.step import plan_format as fmt
from octavo.kernels.step.filters import draw, draw_filtered, read_logits
from octavo.kernels.step.logits import load_float, load_raw, process
from octavo.kernels.step.logprobs import write_logprobs
from octavo.kernels.step.noise import noise_key
from octavo.kernels.step.plan_format import Plan

SUB = GROUP  # tokens that share one kept peak and mass
TILE = 2048  # tokens of one program of the first pass
SCAN_WARPS = 8
# Penalties and biases take 61 registers a thread; at 40 nothing spills, and six programs share a
# multiprocessor.
SCAN_REGISTERS = 40
READ = 2048  # tokens that one program of the second pass reads at a time
POOL_TILE = 2048  # the same where it puts them into a pool
POOL = 8192  # logits that a row's pool holds
CHOOSE_WARPS = 8
CHOOSE_REGISTERS = 128  # two programs a multiprocessor, so that 256 rows are one wave

_ROW_WORDS = tl.constexpr(fmt.ROW_WORDS)
_ROW_SLOT = tl.constexpr(fmt.ROW_SLOT)
_ROW_QUERY_START = tl.constexpr(fmt.ROW_QUERY_START)
_ROW_QUERY_LEN = tl.constexpr(fmt.ROW_QUERY_LEN)
_ROW_FLAGS = tl.constexpr(fmt.ROW_FLAGS)
_ROW_NUM_DRAFTS = tl.constexpr(fmt.ROW_NUM_DRAFTS)
_SAMPLE = tl.constexpr(fmt.SAMPLE)
_PREFILL = tl.constexpr(fmt.PREFILL)
_PENALTIES = tl.constexpr(fmt.PENALTIES)
_ENTER_WORDS = tl.constexpr(fmt.ENTER_WORDS)
_COMPUTED_LEN = tl.constexpr(fmt.ENTER_COMPUTED_LEN)
_OUTPUT_INDEX = tl.constexpr(fmt.ENTER_OUTPUT_INDEX)
_TEMPERATURE = tl.constexpr(fmt.ENTER_TEMPERATURE)
_TOP_K = tl.constexpr(fmt.ENTER_TOP_K)
_TOP_P = tl.constexpr(fmt.ENTER_TOP_P)
_MIN_P = tl.constexpr(fmt.ENTER_MIN_P)
_SEED_LOW = tl.constexpr(fmt.ENTER_SEED_LOW)
_SEED_HIGH = tl.constexpr(fmt.ENTER_SEED_HIGH)
_GREEDY_TEMPERATURE = tl.constexpr(fmt.GREEDY_TEMPERATURE)
_STATUS_OK = tl.constexpr(fmt.STATUS_OK)
_STATUS_NAN = tl.constexpr(fmt.STATUS_NAN)
_STATUS_MASKED = tl.constexpr(fmt.STATUS_MASKED)
_STATUS_NO_TOKEN = tl.constexpr(fmt.STATUS_NO_TOKEN)
_RESULT_TOKENS = tl.constexpr(fmt.RESULT_TOKENS)
_NO_TOKEN = tl.constexpr(2**31 - 1)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # below every logit that can be drawn

_LOG2_E = tl.constexpr(1.4426950408889634)

# Planes of the per-tile figures [planes, num_logits, tiles], and of the per-group ones [planes,
# num_logits, subs].
_BEST, RAW_PEAK, _RAW_MASS = (tl.constexpr(plane) for plane in range(3))
_BEST_ID, SICK = (tl.constexpr(plane) for plane in range(2))
_PEAK, _MASS, RAW_SUB_PEAK = (tl.constexpr(plane) for plane in range(3))


def sample(
    logits: Tensor,
    plan: Plan,
    plan_device: Tensor,
    state: Any,
    inputs: Any,
    result: Tensor,
    masks: Tensor | None = None,
) -> None:
    """As `reference.step.sample`, on CUDA tensors; logits f32 or bf16, rows contiguous."""
    words = plan_device.view(torch.int32)
    length, num_decodes, num_rows = plan.decode_query_len, plan.padded_decodes, plan.padded_rows
    decode_tokens, vocab = plan.num_decode_tokens, state.vocab_size
    num_logits = decode_tokens + plan.num_prefills
    tiles = triton.cdiv(vocab, TILE)
    subs = tiles * (TILE // SUB)
    device, pdl = logits.device, has_pdl(logits.device)
    greedy, with_logprobs = bool(plan.all_greedy), plan.max_logprobs >= 0
    tile_floats = torch.empty((3, num_logits, tiles), dtype=torch.float32, device=device)
    tile_ints = torch.empty((2, num_logits, tiles), dtype=torch.int32, device=device)
    groups = torch.empty((3, num_logits, subs), dtype=torch.float32, device=device)
    rows_at, drafts_at, bias_at = plan.rows_offset // 4, plan.drafts_offset // 4, plan.bias_offset // 4
    # Pointers that no row will follow where the real thing is absent.
    counts = words if state.penalty_counts is None else state.penalty_counts
    mask_width = 0 if masks is None else masks.stride(0)
    masks = words if masks is None else masks
    scan_kernel[(tiles, num_logits)](
        logits, tile_floats, tile_ints, groups, words, inputs.sample_rows, state.records, counts, masks,
        rows_at, drafts_at, bias_at, num_decodes, length, num_logits, vocab, logits.stride(0), mask_width,
        GREEDY=greedy, WITH_LOGPROBS=with_logprobs, TILE=TILE, SUB=SUB, PDL=pdl,
        num_warps=SCAN_WARPS, maxnreg=SCAN_REGISTERS, enable_fp_fusion=False, launch_pdl=pdl,
    )  # fmt: skip
    listed = torch.empty((num_rows, subs), dtype=torch.int32, device=device)
    kept = torch.empty((num_rows, POOL), dtype=torch.float32, device=device)
    left = torch.empty((num_rows, subs), dtype=torch.float32, device=device)
    _choose_kernel[(num_rows,)](
        logits, tile_floats, tile_ints, groups, listed, left, kept, words, state.records, state.last_token,
        counts, masks, result,
        rows_at, drafts_at, bias_at, num_decodes, decode_tokens, length, num_logits, vocab, logits.stride(0),
        mask_width, plan.result_width, tiles, subs,
        GREEDY=greedy, TILES=triton.next_power_of_2(tiles), SUBS=triton.next_power_of_2(subs),
        READ=READ, TILE=POOL_TILE, SUB=SUB, POOL=POOL, PDL=pdl,
        num_warps=1 if greedy else CHOOSE_WARPS, maxnreg=CHOOSE_REGISTERS, enable_fp_fusion=False,
        launch_pdl=pdl,
    )  # fmt: skip
    if with_logprobs:
        raw_peaks, raw_tiles = groups[RAW_SUB_PEAK.value], tile_floats[RAW_PEAK.value :]
        write_logprobs(
            logits, raw_peaks, raw_tiles, words, plan, vocab, result, tile=TILE, sub=SUB,
        )  # fmt: skip


def sample_peak_rehearsal(logits: Tensor) -> None:
    """Allocates and drops what sampling may need at most beside `logits` [rows, vocab]: a table of
    penalty counts and the figures of the first pass.
    """
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, TILE)
    counts = torch.empty((rows + 1, vocab), dtype=torch.int32, device=logits.device)
    figures = torch.empty((rows, 5 * tiles + 5 * tiles * (TILE // SUB) + POOL), device=logits.device)
    del counts, figures


@triton.jit(do_not_specialize=["rows_at", "drafts_at", "bias_at", "num_decodes", "length", "num_logits"])
def scan_kernel(
    logits_ptr, tile_floats_ptr, tile_ints_ptr, groups_ptr, words_ptr, sample_rows_ptr, records_ptr, counts_ptr,
    masks_ptr,
    rows_at, drafts_at, bias_at, num_decodes, length, num_logits, vocab, logits_stride, mask_width,
    GREEDY: tl.constexpr, WITH_LOGPROBS: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, row of logits). GREEDY: the plan's `all_greedy`, so nothing but the peak
    counts.
    """
    wait_for_inputs(PDL)
    let_successor_start(PDL)
    tile = tl.program_id(0)
    index = tl.program_id(1)
    tiles = tl.num_programs(0)
    SUBS_OF_TILE: tl.constexpr = TILE // SUB
    ids = tile * TILE + tl.arange(0, TILE)
    sub = (index * tiles + tile) * SUBS_OF_TILE + tl.arange(0, SUBS_OF_TILE)
    given = load_raw(logits_ptr + index.to(tl.int64) * logits_stride, ids, vocab)
    sick = (given < float("inf")) == 0  # NaN or +inf
    # They would make what follows undefined. The row is only reported, whatever that is.
    raw = tl.where(sick, -float("inf"), given)
    at = index * tiles + tile
    plane = num_logits * tiles

    if WITH_LOGPROBS:
        raw_peak = tl.max(raw, 0)
        raw_mass = tl.sum(tl.exp(raw - tl.maximum(raw_peak, _LOWEST)), 0)
        tl.store(tile_floats_ptr + RAW_PEAK * plane + at, raw_peak)
        tl.store(tile_floats_ptr + _RAW_MASS * plane + at, raw_mass)
        raw_peaks = tl.max(tl.reshape(raw, [SUBS_OF_TILE, SUB]), 1)
        tl.store(groups_ptr + RAW_SUB_PEAK * plane * SUBS_OF_TILE + sub, raw_peaks)

    if GREEDY:
        tl.store(tile_ints_ptr + SICK * plane + at, tl.max(sick.to(tl.int32), 0))
        best = tl.max(raw, 0)
        token = tl.min(tl.where(raw == best, ids, _NO_TOKEN), 0)
        tl.store(tile_floats_ptr + _BEST * plane + at, best)
        tl.store(tile_ints_ptr + _BEST_ID * plane + at, token)
    else:
        row = index
        if length > 1:
            row = tl.load(sample_rows_ptr + index)
        row_ptr = words_ptr + rows_at + row * _ROW_WORDS
        query_start = tl.load(row_ptr + _ROW_QUERY_START)
        place = tl.where(row < num_decodes, index - query_start, 0)
        record_ptr = records_ptr + tl.load(row_ptr + _ROW_SLOT) * _ENTER_WORDS
        if (tl.load(row_ptr + _ROW_FLAGS) & _SAMPLE) != 0:
            logits = process(
                raw, ids, row_ptr, record_ptr, words_ptr + bias_at, words_ptr + drafts_at + query_start - row,
                counts_ptr, masks_ptr, mask_width, vocab, place,
            )  # fmt: skip
            # Within a group all is done inside of one warp: nothing waits.
            logits = tl.reshape(tl.where(sick, float("nan"), logits), [SUBS_OF_TILE, SUB])
            peaks = tl.max(logits, 1)  # of a sick group it may be anything
            shift = tl.maximum(peaks, _LOWEST)[:, None]
            masses = tl.sum(tl.exp2((logits - shift) * _LOG2_E), 1)
            tl.store(groups_ptr + sub, peaks)
            tl.store(groups_ptr + plane * SUBS_OF_TILE + sub, masses)


@triton.jit(
    do_not_specialize=[
        "rows_at", "drafts_at", "bias_at", "num_decodes", "decode_tokens", "length", "num_logits", "result_width",
    ]
)  # fmt: skip
def _choose_kernel(
    logits_ptr, tile_floats_ptr, tile_ints_ptr, groups_ptr, listed_ptr, left_ptr, kept_ptr, words_ptr, records_ptr,
    last_token_ptr, counts_ptr, masks_ptr, result_ptr,
    rows_at, drafts_at, bias_at, num_decodes, decode_tokens, length, num_logits, vocab, logits_stride, mask_width,
    result_width, tiles, subs,
    GREEDY: tl.constexpr, TILES: tl.constexpr, SUBS: tl.constexpr,
    READ: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr, POOL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: draws place by place while the drafts hold, then writes the record and
    advances the slot.
    """
    let_successor_start(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    row_ptr = words_ptr + rows_at + row * _ROW_WORDS
    slot = tl.load(row_ptr + _ROW_SLOT)
    flags = tl.load(row_ptr + _ROW_FLAGS)
    query_start = tl.load(row_ptr + _ROW_QUERY_START)
    query_len = tl.load(row_ptr + _ROW_QUERY_LEN)
    num_drafts = tl.load(row_ptr + _ROW_NUM_DRAFTS)
    record_ptr = records_ptr + slot * _ENTER_WORDS
    result_ptr += row.to(tl.int64) * result_width
    drafts_ptr = words_ptr + drafts_at + query_start - row
    first_index = tl.where(row < num_decodes, query_start, decode_tokens + row - num_decodes)

    alive = (flags & _SAMPLE) != 0
    status = tl.where(alive, _STATUS_OK, _STATUS_NO_TOKEN)
    num_valid = 0
    last = -1
    plane = num_logits * tiles
    while alive:
        index = first_index + num_valid
        if GREEDY:
            tile_lane = tl.arange(0, TILES)
            in_tiles = tile_lane < tiles
            at = index * tiles + tile_lane
            tile_bests = tl.load(tile_floats_ptr + _BEST * plane + at, mask=in_tiles, other=-float("inf"))
            tile_tokens = tl.load(tile_ints_ptr + _BEST_ID * plane + at, mask=in_tiles, other=_NO_TOKEN)
            sick = tl.max(tl.load(tile_ints_ptr + SICK * plane + at, mask=in_tiles, other=0), 0) != 0
            peak = tl.max(tile_bests, 0)
            token = tl.min(tl.where(tile_bests == peak, tile_tokens, _NO_TOKEN), 0)
        else:
            sub = tl.arange(0, SUBS)
            sub_peaks = tl.load(groups_ptr + index * subs + sub, mask=sub < subs, other=-float("inf"))
            masses = tl.load(groups_ptr + (num_logits + index) * subs + sub, mask=sub < subs, other=0.0)
            sick = tl.max((masses != masses).to(tl.int32), 0) != 0
            peak = tl.max(sub_peaks, 0)
            token = -1
        status = tl.where(peak == -float("inf"), _STATUS_MASKED, _STATUS_OK)
        status = tl.where(sick, _STATUS_NAN, status)
        if not GREEDY:  # noqa: SIM102 - decided when compiled, the inner one when run
            if status == _STATUS_OK:
                source = (
                    logits_ptr + index.to(tl.int64) * logits_stride, row_ptr, record_ptr, words_ptr + bias_at,
                    drafts_ptr, counts_ptr, masks_ptr, mask_width, vocab, num_valid,
                )  # fmt: skip
                if load_float(record_ptr + _TEMPERATURE) < _GREEDY_TEMPERATURE:
                    group = tl.min(tl.where(sub_peaks == peak, sub, SUBS), 0)
                    ids = group * SUB + tl.arange(0, SUB)
                    token = tl.min(tl.where(read_logits(source, ids) == peak, ids, _NO_TOKEN), 0)
                else:
                    first, second = noise_key(
                        tl.load(record_ptr + _SEED_LOW),
                        tl.load(record_ptr + _SEED_HIGH),
                        tl.load(record_ptr + _OUTPUT_INDEX) + num_valid,
                    )
                    top_k = tl.load(record_ptr + _TOP_K)
                    top_p = load_float(record_ptr + _TOP_P)
                    min_p = load_float(record_ptr + _MIN_P)
                    token, token_logit = draw(
                        source, sub, sub_peaks + tl.log(masses), -float("inf"), 0, first, second, SUB
                    )
                    if ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0):
                        token = draw_filtered(
                            source, sub_peaks, masses * tl.exp(sub_peaks - peak), token, token_logit, peak, top_k,
                            top_p, min_p, first, second,
                            listed_ptr + row * subs, left_ptr + row * subs, kept_ptr + row * POOL,
                            READ, TILE, SUB, POOL, SUBS,
                        )  # fmt: skip

        alive = False
        if status == _STATUS_OK:
            tl.store(result_ptr + _RESULT_TOKENS + num_valid, token)
            last = token
            num_valid += 1
            if num_valid <= num_drafts:
                alive = tl.load(drafts_ptr + num_valid - 1) == token

    tl.store(result_ptr, status)
    tl.store(result_ptr + 1, num_valid)
    for place in range(num_valid, length):
        tl.store(result_ptr + _RESULT_TOKENS + place, -1)
    # Padding rows share a slot, of which nothing may change: they neither prefill nor draw.
    computed_by = tl.where((flags & _PREFILL) != 0, query_len, num_valid)
    if computed_by > 0:
        tl.store(record_ptr + _COMPUTED_LEN, tl.load(record_ptr + _COMPUTED_LEN) + computed_by)
    if num_valid > 0:
        tl.store(last_token_ptr + slot, last)
        tl.store(record_ptr + _OUTPUT_INDEX, tl.load(record_ptr + _OUTPUT_INDEX) + num_valid)
    if not GREEDY:  # noqa: SIM102 - decided when compiled, the inner one when run
        if (flags & _PENALTIES) != 0:
            for place in range(num_valid):
                # All but the last valid token are the row's own drafts.
                token = last
                if place < num_valid - 1:
                    token = tl.load(drafts_ptr + place)
                tl.atomic_add(counts_ptr + slot.to(tl.int64) * vocab + token, 2)
