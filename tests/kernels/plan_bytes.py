"""Writes plans as docs/plan.md has them, with struct and numpy alone: an independent stand-in for
the core in the kernels' tests.
"""

import struct
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.step.plan_format import Plan

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


HEADER = (
    "step_id_low", "step_id_high", "num_rows", "padded_rows", "num_decodes", "padded_decodes", "decode_query_len",
    "num_decode_tokens", "num_prefill_tokens", "num_tokens", "max_query_len", "max_seq_len", "max_logprobs",
    "num_mask_rows", "has_penalties", "all_greedy", "result_width", "num_bytes", "num_blocks", "num_enters",
    "num_copies", "num_bias", "num_drafts", "num_penalty_tokens", "rows_offset", "prefill_tokens_offset",
    "blocks_offset", "enters_offset", "copies_offset", "bias_offset", "drafts_offset", "penalty_tokens_offset",
    "max_prompt_logprobs", "num_prompt_targets", "prompt_targets_offset", "num_vectors", "vector_size",
    "has_wide_pools", "num_pools", "pools_offset",
    "num_follow_rows", "num_follow_tokens", "max_follow_len", "follow_rows_offset", "follow_tokens_offset",
)  # fmt: skip


def write_plan(
    decodes: list[Row] | None = None,
    prefills: list[Row] | None = None,
    *,
    enters: list[Enter] | None = None,
    blocks: list[tuple[int, int, int, int]] | None = None,
    padding: int = 0,
    padding_slot: int = -1,
    padding_tokens: int | None = None,
    all_greedy: bool = False,
    max_logprobs: int = -1,
    device: str = "cpu",
) -> tuple[Plan, Tensor]:
    """A plan's header as the engine reads it, and its bytes on `device`. `padding` rows of
    `padding_slot` follow the decode rows, one token each, or the first of them with all
    `padding_tokens`.
    """
    decodes, prefills, enters, blocks = decodes or [], prefills or [], enters or [], blocks or []
    pads = [Row(padding_slot, flags=PADDING) for _ in range(padding)]
    rows, bias, row_words, start = [*decodes, *pads, *prefills], [], [], 0
    for index, row in enumerate(rows):
        decode = index < len(decodes) + padding
        length = 1 + len(row.drafts) if decode else len(row.tokens)
        if row.flags & PADDING and padding_tokens is not None:
            length = padding_tokens if index == len(decodes) else 0
        flags = row.flags if decode else row.flags | PREFILL
        row_words += [row.slot, start, length, flags, len(row.drafts), row.mask_row, len(bias), len(row.bias)]
        bias += row.bias
        start += length
    tokens = [token for row in prefills for token in row.tokens]
    drafts = [token for row in decodes for token in row.drafts]
    decode_query_len = max([1, *(1 + len(row.drafts) for row in decodes)])
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
    numbers = dict.fromkeys(HEADER, 0) | dict(
        step_id_low=1,
        num_rows=len(rows) - padding,
        padded_rows=len(rows),
        num_decodes=len(decodes),
        padded_decodes=len(decodes) + padding,
        decode_query_len=decode_query_len,
        num_decode_tokens=start - len(tokens),
        num_prefill_tokens=len(tokens),
        num_tokens=start,
        max_query_len=max(row_words[2::8]),
        max_logprobs=max_logprobs,
        num_mask_rows=max((row.mask_row + 1 for row in rows), default=0),
        has_penalties=any(row.flags & PENALTIES for row in rows),
        all_greedy=all_greedy,
        result_width=2 + positions + (positions * (2 + 2 * top) if top >= 0 else 0),
        num_blocks=len(blocks),
        num_enters=len(enters),
        num_bias=len(bias),
        num_drafts=len(drafts),
        num_penalty_tokens=len(penalty_tokens),
        max_prompt_logprobs=-1,
    )
    data = bytearray(4 * len(HEADER))
    for name, section in sections.items():
        data += b"\xee" * (-len(data) % 16)  # garbage between the sections
        numbers[f"{name}_offset"] = len(data)
        data += section
    numbers["num_bytes"] = len(data)
    data[: 4 * len(HEADER)] = struct.pack(f"<{len(HEADER)}i", *(int(numbers[name]) for name in HEADER))
    data += b"\xee" * (16 + -len(data) % 16)  # what an earlier, longer plan left behind
    return Plan.read(np.frombuffer(data, np.uint8)), torch.frombuffer(data, dtype=torch.uint8).clone().to(device)
