"""Paged attention by its definition, token by token and head by head in float64."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, soft_cap: float) -> Tensor:
    """One query [D] over keys [N, D], values [N, D]."""
    logits = keys.double() @ q.double() * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    return torch.softmax(logits, 0) @ values.double()


def paged_attention(
    q: Tensor, rows: Any, query_lens: Sequence[int], scale: float, window: int, soft_cap: float
) -> Tensor:
    """q [T, Hq, D], row by row, the last `query_lens` positions of each of `rows` (conftest's
    `PagedRows`); each key is looked up through its row's block table. A token that sees nothing
    gets zeros.
    """
    cache, block_size = rows.kv_cache, rows.kv_cache.shape[3]
    group = q.shape[1] // cache.shape[2]
    out, token = torch.zeros(q.shape, dtype=torch.float64), 0
    for slot, seq_len, query_len in zip(rows.row_slots.tolist(), rows.seq_lens.tolist(), query_lens, strict=True):
        for position in range(seq_len - query_len, seq_len):
            first = max(0, position - window + 1) if window else 0
            for head in range(q.shape[1]):
                seen = [
                    (int(rows.block_table[slot, p // block_size]), p % block_size) for p in range(first, position + 1)
                ]
                if seen:
                    keys = torch.stack([cache[block, 0, head // group, offset] for block, offset in seen])
                    values = torch.stack([cache[block, 1, head // group, offset] for block, offset in seen])
                    out[token, head] = attend(q[token, head], keys, values, scale, soft_cap)
            token += 1
    return out


def forget_before_window(rows: Any, query_lens: Sequence[int], window: int) -> None:
    """Makes NaN of all keys and values that lie before what each row's first new token sees: such
    pages belong to others by then.
    """
    block_size = rows.kv_cache.shape[3]
    for slot, seq_len, query_len in zip(rows.row_slots.tolist(), rows.seq_lens.tolist(), query_lens, strict=True):
        for position in range(max(0, seq_len - query_len - window + 1) if window else 0):
            block = int(rows.block_table[slot, position // block_size])
            rows.kv_cache[block, :, :, position % block_size] = float("nan")
