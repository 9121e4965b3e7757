"""Writes plans as DESIGN.md has them, with struct and numpy alone: an independent stand-in for the core in the kernels'
tests."""

import struct
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

SAMPLE, PREFILL, LOGPROBS, PENALTIES, PADDING = 1, 2, 4, 8, 16


@dataclass
class Row:
    slot: int
    query_len: int = 1
    flags: int = SAMPLE
    tokens: list[int] = field(default_factory=list)  # of a prefill row
    drafts: list[int] = field(default_factory=list)
    mask_row: int = -1
    bias: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Enter:
    slot: int
    computed_len: int = 0
    output_index: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: tuple[int, int] = (0, 0)
    num_logprobs: int = -1
    penalty_tokens: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class FakePlan:
    """The scalars of `octavo._core.Plan` that the step's kernels read."""

    num_rows: int
    padded_rows: int
    num_decodes: int
    padded_decodes: int
    decode_query_len: int
    num_tokens: int
    num_prefill_tokens: int
    max_query_len: int
    num_blocks: int
    num_enters: int
    num_bias: int
    num_penalty_tokens: int
    has_masks: bool
    has_penalties: bool
    all_greedy: bool
    max_logprobs: int
    result_width: int
    num_bytes: int = 0
    rows_offset: int = 0
    prefill_tokens_offset: int = 0
    blocks_offset: int = 0
    enters_offset: int = 0
    bias_offset: int = 0
    drafts_offset: int = 0
    penalty_tokens_offset: int = 0


def write_plan(
    decodes: list[Row] | None = None,
    prefills: list[Row] | None = None,
    *,
    enters: list[Enter] | None = None,
    blocks: list[tuple[int, int, int, int]] | None = None,
    padding: int = 0,
    padding_slot: int = -1,
    decode_query_len: int = 1,
    all_greedy: bool = False,
    max_logprobs: int = -1,
    device: str = "cpu",
) -> tuple[FakePlan, Tensor]:
    """A plan and its bytes on `device`. `padding` rows of `padding_slot` follow the decode rows (then there may be no
    prefill row)."""
    decodes, prefills, enters, blocks = decodes or [], prefills or [], enters or [], blocks or []
    pads = [Row(padding_slot, flags=PADDING) for _ in range(padding)]
    rows, bias, row_words, start = [*decodes, *pads, *prefills], [], [], 0
    for index, row in enumerate(rows):
        decode = index < len(decodes) + padding
        length = decode_query_len if decode else len(row.tokens)
        flags = row.flags if decode else row.flags | PREFILL
        row_words += [row.slot, start, length, flags, len(row.drafts), row.mask_row, len(bias), len(row.bias)]
        bias += row.bias
        start += length
    tokens = [token for row in prefills for token in row.tokens]
    drafts = [(row.drafts + [-1] * decode_query_len)[: decode_query_len - 1] for row in [*decodes, *pads]]
    enter_bytes, penalty_tokens = b"", []
    for enter in enters:
        enter_bytes += struct.pack(
            "<3if i5f 2I 4i",
            enter.slot,
            enter.computed_len,
            enter.output_index,
            enter.temperature,
            enter.top_k,
            enter.top_p,
            enter.min_p,
            enter.repetition_penalty,
            enter.presence_penalty,
            enter.frequency_penalty,
            *enter.seed,
            enter.num_logprobs,
            len(penalty_tokens),
            len(enter.penalty_tokens),
            0,
        )
        penalty_tokens += enter.penalty_tokens
    sections = {
        "rows": np.array(row_words, "<i4").tobytes(),
        "prefill_tokens": np.array(tokens, "<i4").tobytes(),
        "blocks": np.array(blocks, "<i4").tobytes(),
        "enters": enter_bytes,
        "bias": b"".join(struct.pack("<if", token, value) for token, value in bias),
        "drafts": np.array(drafts, "<i4").tobytes(),
        "penalty_tokens": np.array(penalty_tokens, "<i4").tobytes(),
    }
    positions, top = decode_query_len, max_logprobs
    plan = FakePlan(
        num_rows=len(rows) - padding,
        padded_rows=len(rows),
        num_decodes=len(decodes),
        padded_decodes=len(decodes) + padding,
        decode_query_len=decode_query_len,
        num_tokens=start,
        num_prefill_tokens=len(tokens),
        max_query_len=max([decode_query_len, *(len(row.tokens) for row in prefills)]),
        num_blocks=len(blocks),
        num_enters=len(enters),
        num_bias=len(bias),
        num_penalty_tokens=len(penalty_tokens),
        has_masks=any(row.mask_row >= 0 for row in rows),
        has_penalties=any(row.flags & PENALTIES for row in rows),
        all_greedy=all_greedy,
        max_logprobs=max_logprobs,
        result_width=2 + positions + (positions * (2 + 2 * top) if top >= 0 else 0),
    )
    data = bytearray()
    for name, section in sections.items():
        data += b"\xee" * (-len(data) % 16)  # garbage between the sections
        setattr(plan, f"{name}_offset", len(data))
        data += section
    plan.num_bytes = len(data)
    data += b"\xee" * (16 + -len(data) % 16)  # what an earlier, longer plan left behind
    return plan, torch.frombuffer(data, dtype=torch.uint8).clone().to(device)
