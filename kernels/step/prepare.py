"""`prepare` in Triton: what the plan says becomes device state and the inputs of the forward pass,
in two small launches.

The host decides grids from the plan's scalars only; it never reads a row. Twin:
`reference.step.prepare`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.step import plan_format as fmt
from octavo.kernels.step.plan_format import Plan

_ROW_WORDS = tl.constexpr(fmt.ROW_WORDS)
_ROW_SLOT = tl.constexpr(fmt.ROW_SLOT)
_ROW_QUERY_START = tl.constexpr(fmt.ROW_QUERY_START)
_ROW_QUERY_LEN = tl.constexpr(fmt.ROW_QUERY_LEN)
_ROW_FLAGS = tl.constexpr(fmt.ROW_FLAGS)
_ROW_NUM_DRAFTS = tl.constexpr(fmt.ROW_NUM_DRAFTS)
_PADDING = tl.constexpr(fmt.PADDING)
_ENTER_WORDS = tl.constexpr(fmt.ENTER_WORDS)
_ENTER_COMPUTED_LEN = tl.constexpr(fmt.ENTER_COMPUTED_LEN)
_ENTER_PENALTY_START = tl.constexpr(fmt.ENTER_PENALTY_START)
_ENTER_PENALTY_LEN = tl.constexpr(fmt.ENTER_PENALTY_LEN)
_BLOCK_WORDS = tl.constexpr(fmt.BLOCK_WORDS)

BLOCKS_TILE = 128
COUNTS_TILE = 4096
PENALTY_TILE = 512


def prepare(plan: Plan, plan_device: Tensor, state: Any, inputs: Any, *, block_size: int) -> None:
    """As `reference.step.prepare`, on CUDA tensors."""
    words = plan_device.view(torch.int32)
    programs = plan.num_enters + triton.cdiv(plan.num_blocks, BLOCKS_TILE)
    if programs:
        groups, slots, max_blocks = state.block_table.shape
        _apply_kernel[(programs,)](
            words, state.records, state.block_table,
            plan.enters_offset // 4, plan.blocks_offset // 4, plan.num_enters, plan.num_blocks, slots, max_blocks,
            TILE=BLOCKS_TILE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    if plan.num_penalty_tokens or plan.has_penalties:
        state.require_penalty_counts()
    if plan.num_enters and state.penalty_counts is not None:
        vocab = state.vocab_size
        # Also where the newcomer has no penalties: whoever held the slot before may have left
        # counts behind.
        _clear_counts_kernel[(plan.num_enters, triton.cdiv(vocab, COUNTS_TILE))](
            words,
            state.penalty_counts,
            plan.enters_offset // 4,
            vocab,
            TILE=COUNTS_TILE,
            num_warps=4,
            enable_fp_fusion=False,
        )
        if plan.num_penalty_tokens:
            _enter_counts_kernel[(plan.num_enters,)](
                words, state.penalty_counts, plan.enters_offset // 4, plan.penalty_tokens_offset // 4, vocab,
                TILE=PENALTY_TILE, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    groups, slots, max_blocks = state.block_table.shape
    longest = plan.max_query_len
    tile, num_warps = (32, 1) if longest <= 32 else (1024, 4)
    _rows_kernel[(plan.padded_rows, triton.cdiv(longest, tile))](
        words, state.records, state.last_token, state.block_table,
        inputs.token_ids, inputs.positions, inputs.slots_of_groups,
        inputs.row_slots, inputs.seq_lens, inputs.query_start_loc, inputs.sample_index, inputs.sample_rows,
        plan.rows_offset // 4, plan.prefill_tokens_offset // 4, plan.drafts_offset // 4,
        plan.padded_rows, plan.padded_decodes, plan.num_decode_tokens, plan.num_tokens,
        groups, slots, max_blocks, inputs.slots_of_groups.stride(0),
        BLOCK_SIZE=block_size, TILE=tile, num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip


# Offsets and counts change from step to step. Triton would compile a kernel anew for each pattern
# of their divisibility.
@triton.jit(do_not_specialize=["enters_at", "blocks_at", "num_enters", "num_blocks"])
def _apply_kernel(
    words_ptr, records_ptr, table_ptr,
    enters_at, blocks_at, num_enters, num_blocks, slots, max_blocks,
    TILE: tl.constexpr,
):  # fmt: skip
    """The first `num_enters` programs copy one `enters` record each, the others `TILE` `blocks`
    records each.
    """
    program = tl.program_id(0)
    if program < num_enters:
        record_ptr = words_ptr + enters_at + program * _ENTER_WORDS
        word = tl.arange(0, _ENTER_WORDS)
        slot = tl.load(record_ptr)
        tl.store(records_ptr + slot * _ENTER_WORDS + word, tl.load(record_ptr + word))
    else:
        index = (program - num_enters) * TILE + tl.arange(0, TILE)
        inside = index < num_blocks
        block_ptr = words_ptr + blocks_at + index * _BLOCK_WORDS
        groups = tl.load(block_ptr, mask=inside, other=0)
        owners = tl.load(block_ptr + 1, mask=inside, other=0)
        places = tl.load(block_ptr + 2, mask=inside, other=0)
        blocks = tl.load(block_ptr + 3, mask=inside, other=0)
        tl.store(table_ptr + (groups * slots + owners) * max_blocks + places, blocks, mask=inside)


@triton.jit(do_not_specialize=["enters_at"])
def _clear_counts_kernel(words_ptr, counts_ptr, enters_at, vocab, TILE: tl.constexpr):
    slot = tl.load(words_ptr + enters_at + tl.program_id(0) * _ENTER_WORDS).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    tl.store(counts_ptr + slot * vocab + token, tl.zeros([TILE], tl.int32), mask=token < vocab)


@triton.jit(do_not_specialize=["enters_at", "penalty_tokens_at"])
def _enter_counts_kernel(words_ptr, counts_ptr, enters_at, penalty_tokens_at, vocab, TILE: tl.constexpr):
    record_ptr = words_ptr + enters_at + tl.program_id(0) * _ENTER_WORDS
    slot = tl.load(record_ptr).to(tl.int64)
    start = tl.load(record_ptr + _ENTER_PENALTY_START)
    size = tl.load(record_ptr + _ENTER_PENALTY_LEN)
    for first in range(0, size, TILE):
        index = first + tl.arange(0, TILE)
        entry_ptr = words_ptr + penalty_tokens_at + 2 * (start + index)
        token = tl.load(entry_ptr, mask=index < size, other=0)
        value = tl.load(entry_ptr + 1, mask=index < size, other=0)
        tl.store(counts_ptr + slot * vocab + token, value, mask=index < size)


@triton.jit(
    do_not_specialize=[
        "rows_at", "prefill_tokens_at", "drafts_at", "num_rows", "num_decodes", "decode_tokens", "num_tokens",
    ]
)  # fmt: skip
def _rows_kernel(
    words_ptr, records_ptr, last_token_ptr, table_ptr,
    token_ids_ptr, positions_ptr, slot_mapping_ptr, row_slots_ptr, seq_lens_ptr, query_start_ptr, sample_index_ptr,
    sample_rows_ptr,
    rows_at, prefill_tokens_at, drafts_at, num_rows, num_decodes, decode_tokens, num_tokens,
    groups, slots, max_blocks, slot_mapping_stride,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (row, tile): `TILE` tokens of one row; tile 0 also writes what there is once a row."""
    row = tl.program_id(0)
    row_ptr = words_ptr + rows_at + row * _ROW_WORDS
    slot = tl.load(row_ptr + _ROW_SLOT)
    query_start = tl.load(row_ptr + _ROW_QUERY_START)
    query_len = tl.load(row_ptr + _ROW_QUERY_LEN)
    num_drafts = tl.load(row_ptr + _ROW_NUM_DRAFTS)
    computed = tl.load(records_ptr + slot * _ENTER_WORDS + _ENTER_COMPUTED_LEN)
    decode = row < num_decodes

    if tl.program_id(1) == 0:
        tl.store(row_slots_ptr + row, slot)
        padding = (tl.load(row_ptr + _ROW_FLAGS) & _PADDING) != 0
        tl.store(seq_lens_ptr + row, tl.where(decode & padding, 0, computed + query_len))
        tl.store(query_start_ptr + row, query_start)
        if row == num_rows - 1:
            tl.store(query_start_ptr + num_rows, num_tokens)
        if not decode:
            sample_at = decode_tokens + row - num_decodes
            tl.store(sample_index_ptr + sample_at, query_start + query_len - 1)
            tl.store(sample_rows_ptr + sample_at, row)

    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = place < query_len
    token = query_start + place
    position = computed + place
    used = inside & (position < max_blocks * BLOCK_SIZE)
    if decode:
        tl.store(sample_index_ptr + token, token.to(tl.int64), mask=inside)
        tl.store(sample_rows_ptr + token, tl.zeros([TILE], tl.int32) + row, mask=inside)
        # Only a padding row has more tokens; they must not write into blocks that the row does not
        # hold.
        used = used & (place <= num_drafts)
        # Each row before this one has one token that is no draft.
        draft_ptr = words_ptr + drafts_at + query_start - row + place - 1
        token_id = tl.load(draft_ptr, mask=used & (place > 0), other=0)
        token_id = tl.where(place == 0, tl.load(last_token_ptr + slot), token_id)
    else:
        token_id = tl.load(words_ptr + prefill_tokens_at + token - decode_tokens, mask=inside, other=0)
    position = tl.where(used, position, 0)
    tl.store(token_ids_ptr + token, tl.where(used, token_id, 0), mask=inside)
    tl.store(positions_ptr + token, position.to(tl.int64), mask=inside)
    for group in range(groups):
        table_row = table_ptr + (group * slots + slot) * max_blocks
        block = tl.load(table_row + position // BLOCK_SIZE, mask=used, other=0).to(tl.int64)
        mapped = block * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(slot_mapping_ptr + group * slot_mapping_stride + token, mapped, mask=inside)
