"""Plain-PyTorch twins of `prepare.py` and `sample.py`: what runs on CPUs, and what the Triton
kernels are tested against.

`state` and `inputs` are the `DeviceState` and `StepInputs` of `octavo.engine.step_buffers`. The
format of the plan and of the result is in docs/plan.md and `plan_format.py`.
"""

from typing import Any

import torch
from torch import Tensor

from octavo.kernels.reference.draw import Draw, argmax_rows, draw, process
from octavo.kernels.reference.logprobs import write_logprobs
from octavo.kernels.step import plan_format as fmt
from octavo.kernels.step.plan_format import Plan


def prepare(plan: Plan, plan_device: Tensor, state: Any, inputs: Any, *, block_size: int) -> None:
    """Applies the plan's `enters` and `blocks` to `state`, then fills `inputs` for the plan's rows
    and tokens.

    plan_device [>= num_bytes] uint8. Places of a padding row beyond its first, and positions past
    the block table, get token 0, position 0 and the null block, so that they can harm nobody.
    Decode rows of padding have no keys, so that attention reads none. Block copies are
    `copy_blocks`' part and come before.
    """
    words = plan_device.view(torch.int32)
    if plan.num_enters:
        _enter(plan, words, state)
    if plan.num_blocks:
        blocks = _section(words, plan.blocks_offset, plan.num_blocks, fmt.BLOCK_WORDS).long()
        where = (blocks[:, fmt.BLOCK_GROUP], blocks[:, fmt.BLOCK_SLOT], blocks[:, fmt.BLOCK_INDEX])
        state.block_table[where] = blocks[:, fmt.BLOCK_ID].int()
    if plan.has_penalties:
        state.require_penalty_counts()

    num_rows, num_tokens = plan.padded_rows, plan.num_tokens
    num_decodes, decode_tokens = plan.padded_decodes, plan.num_decode_tokens
    rows = _section(words, plan.rows_offset, num_rows, fmt.ROW_WORDS)
    slots, query_start, query_len = rows[:, fmt.ROW_SLOT], rows[:, fmt.ROW_QUERY_START], rows[:, fmt.ROW_QUERY_LEN]
    computed = state.computed_len[slots.long()]
    inputs.row_slots[:num_rows] = slots
    inputs.seq_lens[:num_rows] = computed + query_len
    padding = (rows[:num_decodes, fmt.ROW_FLAGS] & fmt.PADDING) != 0
    inputs.seq_lens[:num_decodes].masked_fill_(padding, 0)
    inputs.query_start_loc[:num_rows] = query_start
    inputs.query_start_loc[num_rows] = num_tokens

    device = words.device
    # A decode step, the common case, has one row a token in order.
    if num_tokens == num_rows and plan.max_query_len == 1:
        row_of_token = torch.arange(num_rows, device=device)
        positions = computed.long()
    else:
        row_of_token = torch.repeat_interleave(torch.arange(num_rows, device=device), query_len, output_size=num_tokens)
        positions = torch.arange(num_tokens, device=device) + (computed - query_start)[row_of_token]
    token_ids = inputs.token_ids[:num_tokens]
    last_tokens = state.last_token[slots.long()]
    token_ids[decode_tokens:] = words[plan.prefill_tokens_offset // 4 :][: plan.num_prefill_tokens]
    used = positions < state.block_table.shape[2] * block_size
    if plan.decode_query_len == 1:
        token_ids[:decode_tokens] = last_tokens[:num_decodes]
    else:
        row = row_of_token[:decode_tokens]
        token = torch.arange(decode_tokens, device=device)
        place = token - query_start[row]
        # Each row before a draft's, and its own, has one token that is no draft.
        drafts = words[plan.drafts_offset // 4 :][: plan.num_drafts]
        ids = drafts[(token - row - 1).clamp(0, plan.num_drafts - 1)]
        token_ids[:decode_tokens] = torch.where(place == 0, last_tokens[row], ids)
        used[:decode_tokens] &= place <= rows[row, fmt.ROW_NUM_DRAFTS]
    token_ids *= used
    positions = positions * used
    inputs.positions[:num_tokens] = positions
    token_slots, block_index, offset = slots.long()[row_of_token], positions // block_size, positions % block_size
    blocks_of_token = state.block_table[:, token_slots, block_index].long() * used
    inputs.slots_of_groups[:, :num_tokens] = blocks_of_token * block_size + offset

    num_logits = decode_tokens + num_rows - num_decodes
    inputs.sample_index[:decode_tokens] = torch.arange(decode_tokens, device=device)
    inputs.sample_index[decode_tokens:num_logits] = (query_start + query_len - 1)[num_decodes:]
    if plan.decode_query_len > 1:
        inputs.sample_rows[:decode_tokens] = row_of_token[:decode_tokens]
        inputs.sample_rows[decode_tokens:num_logits] = torch.arange(num_decodes, num_rows, device=device)


def sample(
    logits: Tensor,
    plan: Plan,
    plan_device: Tensor,
    state: Any,
    inputs: Any,
    result: Tensor,
    masks: Tensor | None = None,
) -> None:
    """Draws a token for each row that asks, writes the result records and advances `state`.

    logits [num_decode_tokens + prefill rows, >= vocab_size]: all places of each decode row, then
    the last place of each prefill row. result int32 [>= padded_rows * result_width], flat. masks
    int32 [mask rows, ceil(vocab / 32)]: bit `t % 32` of word `t // 32` allows token t; place j of a
    row reads mask row `mask_row + j`. `inputs` is not read: the rows are in the plan. How a token
    is chosen is told in `reference/draw.py`, how drafts are accepted in `_accept`.
    """
    del inputs
    words = plan_device.view(torch.int32)
    length, num_decodes, num_rows = plan.decode_query_len, plan.padded_decodes, plan.padded_rows
    rows = _section(words, plan.rows_offset, num_rows, fmt.ROW_WORDS)
    drafts = _drafts_by_row(plan, words, rows)
    logits = logits[: plan.num_decode_tokens + plan.num_prefills, : state.vocab_size]
    if plan.all_greedy:
        found, statuses = argmax_rows(logits)
    else:
        found, statuses = _draw_rows(logits, plan, words, rows, drafts, state, masks)
    # The first row of logits of each row.
    first = torch.arange(num_rows, device=words.device)
    if length > 1:
        first += plan.num_decode_tokens - num_decodes
        first[:num_decodes] = rows[:num_decodes, fmt.ROW_QUERY_START]
    tokens, statuses = _by_row(found, first, length), _by_row(statuses, first, length)

    record = result[: num_rows * plan.result_width].view(num_rows, plan.result_width)
    status, num_valid, last = _accept(rows, tokens, statuses, drafts)
    valid = torch.arange(length, device=words.device) < num_valid[:, None]
    record[:, fmt.RESULT_STATUS] = status
    record[:, fmt.RESULT_NUM_VALID] = num_valid
    record[:, fmt.RESULT_TOKENS : fmt.RESULT_TOKENS + length] = tokens.where(valid, -1)
    _advance(rows, tokens, valid, num_valid, last, state)
    if plan.max_logprobs >= 0:
        write_logprobs(logits, plan, rows, record)


def sample_peak_rehearsal(logits: Tensor) -> None:
    """Allocates and drops what sampling may need at most beside `logits` [rows, vocab]: a table of
    penalty counts and one copy.
    """
    rows, vocab = logits.shape
    torch.empty((rows + 1, vocab), dtype=torch.int32, device=logits.device)
    torch.empty((rows, vocab), dtype=torch.float32, device=logits.device)


def _section(words: Tensor, byte_offset: int, records: int, width: int) -> Tensor:
    """# [records, width] int32, a view of the plan."""
    return words[byte_offset // 4 : byte_offset // 4 + records * width].view(records, width)


def _enter(plan: Plan, words: Tensor, state: Any) -> None:
    enters = _section(words, plan.enters_offset, plan.num_enters, fmt.ENTER_WORDS)
    slots = enters[:, fmt.ENTER_SLOT].long()
    state.records[slots] = enters
    if plan.num_penalty_tokens or state.penalty_counts is not None:
        counts = state.require_penalty_counts()
        # Also where the newcomer has no penalties: whoever held the slot before may have left
        # counts behind.
        counts[slots] = 0
        tokens = _section(words, plan.penalty_tokens_offset, plan.num_penalty_tokens, fmt.PAIR_WORDS)
        for slot, start, size in enters[:, [fmt.ENTER_SLOT, fmt.ENTER_PENALTY_START, fmt.ENTER_PENALTY_LEN]].tolist():
            own = tokens[start : start + size]
            counts[slot, own[:, fmt.PENALTY_TOKEN].long()] = own[:, fmt.PENALTY_SEEN]


def _drafts_by_row(plan: Plan, words: Tensor, rows: Tensor) -> Tensor:
    """# [padded_decodes, decode_query_len - 1] int32; -1 where a row has fewer drafts."""
    num_decodes, most = plan.padded_decodes, plan.decode_query_len - 1
    if not most:
        return words.new_empty((num_decodes, 0))
    row = torch.arange(num_decodes, device=words.device)[:, None]
    place = torch.arange(most, device=words.device)
    section = words[plan.drafts_offset // 4 :][: plan.num_drafts]
    # Each row before has one token that is no draft.
    ids = section[(rows[:num_decodes, fmt.ROW_QUERY_START, None] - row + place).clamp(max=plan.num_drafts - 1)]
    return torch.where(place < rows[:num_decodes, fmt.ROW_NUM_DRAFTS, None], ids, -1)


def _draw_rows(
    logits: Tensor, plan: Plan, words: Tensor, rows: Tensor, drafts: Tensor, state: Any, masks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Token and status of each row of logits # [num_logits] int32 each; -1 where nothing is drawn."""
    host_rows, host_drafts = rows.tolist(), drafts.tolist()
    records = state.records[rows[:, fmt.ROW_SLOT].long()]
    host_records, host_floats = records.tolist(), records.view(torch.float32).tolist()
    bias = _section(words, plan.bias_offset, plan.num_bias, fmt.PAIR_WORDS)
    # One pass for all rows; NaN wins every maximum.
    peaks = logits.amax(dim=1).tolist()
    drawn: list[tuple[int, int]] = []
    for index, row in enumerate(host_rows):
        for place in range(row[fmt.ROW_QUERY_LEN] if index < plan.padded_decodes else 1):
            peak = peaks[len(drawn)]
            if not row[fmt.ROW_FLAGS] & fmt.SAMPLE:
                drawn.append((-1, fmt.STATUS_NO_TOKEN))
            elif peak != peak or peak == float("inf"):
                drawn.append((-1, fmt.STATUS_NAN))
            else:
                params = Draw.from_record(host_records[index], host_floats[index], place)
                start, size = row[fmt.ROW_BIAS_START], row[fmt.ROW_BIAS_LEN]
                penalised = row[fmt.ROW_FLAGS] & fmt.PENALTIES
                processed = process(
                    logits[len(drawn)],
                    params,
                    mask=masks[row[fmt.ROW_MASK_ROW] + place]
                    if masks is not None and row[fmt.ROW_MASK_ROW] >= 0
                    else None,
                    bias=bias[start : start + size] if size else None,
                    counts=state.penalty_counts[row[fmt.ROW_SLOT]] if penalised else None,
                    drafts_before=host_drafts[index][:place] if place else [],
                )
                drawn.append(draw(processed, params))
    tokens, statuses = torch.tensor(drawn, dtype=torch.int32, device=logits.device).unbind(1)
    return tokens, statuses


def _by_row(values: Tensor, first: Tensor, length: int) -> Tensor:
    """# [num_logits] -> [num_rows, length]; what stands in places that a row lacks does not count."""
    if length == 1:
        return values[:, None]
    index = first[:, None] + torch.arange(length, device=values.device)
    return values[index.clamp(max=len(values) - 1)]


def _accept(rows: Tensor, tokens: Tensor, statuses: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Status, number of valid tokens and last valid token (else -1) of each row # [num_rows] int32
    each.

    Each place's token is drawn from the model's own distribution given the drafts before it, so it
    counts exactly if all drafts before it equal the tokens drawn in their places. A row ends at the
    first place that counts and has nothing to draw from.
    """
    alive = rows[:, fmt.ROW_FLAGS] & fmt.SAMPLE != 0
    status = torch.where(alive, fmt.STATUS_OK, fmt.STATUS_NO_TOKEN).int()
    num_valid, last = torch.zeros_like(status), torch.full_like(status, -1)
    for place in range(tokens.shape[1]):
        status = torch.where(alive, statuses[:, place], status)
        good = alive & (statuses[:, place] == fmt.STATUS_OK)
        num_valid += good
        last = torch.where(good, tokens[:, place], last)
        if place < drafts.shape[1]:
            alive = torch.zeros_like(good)
            num_drafts = rows[: drafts.shape[0], fmt.ROW_NUM_DRAFTS]
            matches = (drafts[:, place] == tokens[: drafts.shape[0], place]) & (place < num_drafts)
            alive[: drafts.shape[0]] = good[: drafts.shape[0]] & matches
    return status, num_valid, last


def _advance(rows: Tensor, tokens: Tensor, valid: Tensor, num_valid: Tensor, last: Tensor, state: Any) -> None:
    """Padding rows share one slot; nothing of theirs changes, so the repeated writes agree."""
    flags, slots = rows[:, fmt.ROW_FLAGS], rows[:, fmt.ROW_SLOT].long()
    prefill = flags & fmt.PREFILL != 0
    state.computed_len[slots] += torch.where(prefill, rows[:, fmt.ROW_QUERY_LEN], num_valid)
    state.output_index[slots] += num_valid
    state.last_token[slots] = torch.where(num_valid > 0, last, state.last_token[slots])
    if state.penalty_counts is not None:
        row, place = (valid & (flags & fmt.PENALTIES != 0)[:, None]).nonzero(as_tuple=True)
        two = torch.full_like(row, 2, dtype=torch.int32)
        state.penalty_counts.index_put_((slots[row], tokens[row, place].long()), two, accumulate=True)
