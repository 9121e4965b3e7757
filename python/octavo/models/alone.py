"""One decoder layer by itself, over whole sequences: with pages and metadata of its own, in place of an
engine's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.attention.kv_block import block_bytes, split_cache
from octavo.layers.context import StepContext, set_context
from octavo.models.decoder import DecoderLayer

BLOCK_SIZE = 64  # tokens of a block of the pages that attention reads


@torch.inference_mode()
def run_alone(layer: DecoderLayer, hidden: Tensor, kv_dtype: torch.dtype | None = None) -> Tensor:
    """Runs a layer on whole sequences; returns what is still to be added to `hidden`, of its shape.

    hidden [sequences, length, hidden_size]: the stream before the layer, changed in place as
    `DecoderLayer` does. kv_dtype: of the numbers or codes in its pages; None: that of `hidden`.
    """
    sequences, length, size = hidden.shape
    attention, device = layer.attention, hidden.device
    each = -(-length // BLOCK_SIZE)
    table = torch.arange(sequences * each, dtype=torch.int32, device=device).view(sequences, each) + 1
    positions = torch.arange(length, device=device)
    slots = table[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    num_kv_heads, kv_dtype = attention.sizes[1] // attention.head_dim, kv_dtype or hidden.dtype
    pages = torch.zeros(
        (1 + sequences * each, block_bytes(num_kv_heads, BLOCK_SIZE, attention.head_dim, kv_dtype)),
        dtype=torch.uint8,
        device=device,
    )
    attention.bind(*split_cache(pages, num_kv_heads, BLOCK_SIZE, attention.head_dim, kv_dtype))
    groups = attention.kv_group + 1  # of which only the last is looked at
    set_context(
        StepContext(
            num_decode_tokens=0,
            num_decodes=0,
            decode_query_len=1,
            num_prefills=sequences,
            max_query_len=length,
            max_seq_len=length,
            row_slots=torch.arange(sequences, dtype=torch.int32, device=device),
            query_start_loc=torch.arange(sequences + 1, dtype=torch.int32, device=device) * length,
            seq_lens=torch.full((sequences,), length, dtype=torch.int32, device=device),
            slot_mapping=[slots.flatten()] * groups,
            block_tables=[table] * groups,
        )
    )
    try:
        residual = hidden.view(-1, size)
        return layer(layer.input_norm(residual), residual, positions.repeat(sequences)).view_as(hidden)
    finally:
        set_context(None)
        attention.unbind()
