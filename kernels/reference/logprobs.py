"""Log-probabilities of drawn tokens, of a prompt's tokens and of the top tokens, in plain PyTorch.
Part of the step's twin.

They are those of the model's own logits, before mask, bias, penalties and temperature (vLLM's
default, `raw_logprobs`).
"""

import math

import torch
from torch import Tensor

from octavo.kernels.step import plan_format as fmt
from octavo.kernels.step.plan_format import Plan


def write_logprobs(logits: Tensor, plan: Plan, rows: Tensor, record: Tensor) -> None:
    """Fills the logprob columns of the result for the valid tokens of rows with `LOGPROBS`; other
    places are left as they were.

    logits [num_logits, vocab]; rows [num_rows, 8] int32: the plan's; record [num_rows, width] int32,
    which has the tokens. The top list is in falling order, lowest id first among equals, and a token's
    rank is its place in that order, from 1; where the vocabulary has fewer than `top` tokens the list
    ends with id -1 and logprob -inf.
    """
    length, top = plan.decode_query_len, plan.max_logprobs
    _, logprob_at, rank_at, ids_at, tops_at = fmt.result_columns(length, top)
    floats = record.view(torch.float32)
    host_tokens = record[:, fmt.RESULT_TOKENS : fmt.RESULT_TOKENS + length].tolist()
    host_valid, flags = record[:, fmt.RESULT_NUM_VALID].tolist(), rows[:, fmt.ROW_FLAGS].tolist()
    host_first = rows[:, fmt.ROW_QUERY_START].tolist()
    host_first[plan.padded_decodes :] = range(plan.num_decode_tokens, plan.num_decode_tokens + plan.num_prefills)
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
                best = _best(raw[None], size)[0]
                ids, tops = (
                    slice(ids_at + place * top, ids_at + place * top + top),
                    slice(tops_at + place * top, tops_at + place * top + top),
                )
                record[row, ids], floats[row, tops] = -1, -math.inf
                record[row, ids][:size] = best.int()
                floats[row, tops][:size] = centred[best] - log_total


def prompt_logprobs(logits: Tensor, targets: Tensor, vocab: int, top: int, record: Tensor) -> None:
    """Fills the result records of prompt targets.

    logits [n, >= vocab], of the token before each target; targets [n, 2] int32: the plan's records;
    record [n, 2 + 2 * top] int32: log probability and rank of the target, then the top ids and their
    log probabilities, as `write_logprobs` has them. Where the logits hold a NaN or +inf, the log
    probability of the target is NaN, and the rest has no meaning.
    """
    raw, tokens = logits[:, :vocab].float(), targets[:, fmt.TARGET_TARGET, None].long()
    floats = record.view(torch.float32)
    peaks = raw.amax(dim=1, keepdim=True)
    centred = raw - peaks
    log_total = centred.exp().sum(dim=1, keepdim=True).log()
    chosen = raw.gather(1, tokens)
    own = (centred.gather(1, tokens) - log_total)[:, 0]
    floats[:, fmt.TARGET_RESULT_LOGPROB] = own.masked_fill(~(peaks[:, 0] < math.inf), math.nan)
    ids = torch.arange(vocab, device=raw.device)
    ahead = (raw > chosen) | ((raw == chosen) & (ids < tokens))
    record[:, fmt.TARGET_RESULT_RANK] = 1 + ahead.sum(dim=1, dtype=torch.int32)
    size = min(top, vocab)
    if not size:
        return
    tops_at = fmt.TARGET_RESULT_TOP + top
    top_ids, tops = record[:, fmt.TARGET_RESULT_TOP : tops_at], floats[:, tops_at : tops_at + top]
    top_ids[:, size:], tops[:, size:] = -1, -math.inf
    best = _best(raw, size)
    top_ids[:, :size] = best.int()
    tops[:, :size] = centred.gather(1, best) - log_total


def _best(raw: Tensor, size: int) -> Tensor:
    """Ids of the `size` highest of each row of raw [n, vocab], falling, lowest id first among
    equals: # [n, size] int64.
    """
    values, found = raw.topk(size, dim=1)
    # topk promises no order among equals, nor which of those at its end it takes.
    found = found.sort(dim=1).values
    found = found.gather(1, raw.gather(1, found).sort(dim=1, descending=True, stable=True).indices)
    for row in ((raw >= values[:, -1:]).sum(dim=1) > size).nonzero()[:, 0].tolist():
        reached = (raw[row] >= values[row, -1]).nonzero()[:, 0]
        found[row] = reached[raw[row][reached].sort(descending=True, stable=True).indices[:size]]
    return found
