"""Log-probabilities of drawn tokens and of the top tokens, in plain PyTorch. Part of the step's
twin.

They are those of the model's own logits, before mask, bias, penalties and temperature (vLLM's
default, `raw_logprobs`).
"""

import math

import torch
from torch import Tensor

from octavo.kernels.step import plan_format as fmt


def write_logprobs(
    logits: Tensor, rows: Tensor, tokens: Tensor, num_valid: Tensor, first: Tensor, top: int, record: Tensor
) -> None:
    """Fills the logprob columns of the result for the valid tokens of rows with `LOGPROBS`; other
    places are left as they were.

    logits [num_logits, vocab]; rows [num_rows, 8]; tokens [num_rows, L]; num_valid [num_rows];
    first [num_rows]: the row of logits of each row's first place; record [num_rows, width] int32.
    The top list is in falling order, lowest id first among equals, and a token's rank is its place
    in that order, from 1; where the vocabulary has fewer than `top` tokens the list ends with id -1
    and logprob -inf.
    """
    length = tokens.shape[1]
    _, logprob_at, rank_at, ids_at, tops_at = fmt.result_columns(length, top)
    floats = record.view(torch.float32)
    host_tokens, host_valid, flags = tokens.tolist(), num_valid.tolist(), rows[:, fmt.ROW_FLAGS].tolist()
    host_first = first.tolist()
    for row in range(rows.shape[0]):
        if not flags[row] & fmt.LOGPROBS:
            continue
        for place in range(host_valid[row]):
            raw, token = logits[host_first[row] + place].float(), host_tokens[row][place]
            centred = raw - raw.amax()
            log_total = centred.exp().sum().log()
            chosen = raw[token]
            floats[row, logprob_at + place] = centred[token] - log_total
            record[row, rank_at + place] = 1 + (raw > chosen).sum() + (raw[:token] == chosen).sum()
            if top:
                size = min(top, raw.shape[0])
                # topk promises no order among equals, so take all that reach its last value, in id
                # order, and sort stably.
                reached = (raw >= raw.topk(size).values[-1]).nonzero()[:, 0]
                best = reached[raw[reached].sort(descending=True, stable=True).indices[:size]]
                ids, tops = (
                    slice(ids_at + place * top, ids_at + place * top + top),
                    slice(tops_at + place * top, tops_at + place * top + top),
                )
                record[row, ids], floats[row, tops] = -1, -math.inf
                record[row, ids][:size] = best.int()
                floats[row, tops][:size] = centred[best] - log_total
