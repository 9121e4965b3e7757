"""Sums of the hidden states of a prompt's tokens, over as many steps as it is computed in, in plain
PyTorch: what embeddings are made of.
"""

import torch
from torch import Tensor

from octavo.kernels.step import plan_format as fmt


def pool(hidden: Tensor, pools: Tensor, sums: Tensor, vectors: Tensor, *, last_tokens_from: int | None) -> None:
    """Adds the hidden states that the plan's `pools` name to the sums of their slots, and writes the
    means of those that are complete.

    hidden [n, size]: of all tokens of the step; or of the tokens that logits are made of, and then
    that of prefill row r is at `last_tokens_from` + r, and each record has its row's last token
    alone. pools [num_pools, 7] int32: the plan's records; sums [slots, size] float32; vectors
    [num_vectors, size] float32.
    """
    for slot, row, start, length, begins, count, vector in pools.tolist():
        first = start if last_tokens_from is None else last_tokens_from + row
        total = hidden[first : first + length].sum(dim=0, dtype=torch.float32)
        if not begins:
            total += sums[slot]
        if vector == fmt.NO_VECTOR:
            sums[slot] = total
        else:
            vectors[vector] = total / count
