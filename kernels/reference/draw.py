"""How one token is chosen from one row of logits, in plain PyTorch: processing, the draw, and its
noise. Part of the step's twin.

Order, as in vLLM: grammar mask, logit bias, penalties, temperature, min-p, top-k, top-p, draw. Ties
have fixed rules: equal logits are in or out together, for top-k (all tokens equal to the k-th
highest stay) as for top-p (a token stays if the tokens strictly above it hold less than p of the
mass that top-k left), and between equal scores the lowest token id wins.

The draw is Gumbel-max in two steps: among the groups of `GROUP` neighbouring tokens the one with
the highest log(mass) + noise, in it the token with the highest logit + noise. That is a draw from
the softmax (the groups' masses times the tokens' shares), for noise of 1/128 of the tokens. If the
filters exclude that token, the next round draws with other noise from what can still be allowed:
the tokens that reach the threshold of min-p and top-k, or, if that is reached, the tokens above the
drawn one, which hold the whole top-p set. A draw from more than the allowed tokens, repeated until
it is one of them, is a draw from them.

All noise is a hash of (seed, output index, group or token id) alone. So a draw does not depend on
the batch, the slot, padding or preemption. No softmax, no sort.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.step import plan_format as fmt

MASK32 = 0xFFFFFFFF
GROUP = 128  # tokens that the first step of a draw takes together
# Ids that are hashed: tokens, from GROUP_NOISE on groups; those of round n follow n * ROUND_NOISE
# later, modulo 2^32.
GROUP_NOISE = 1 << 20
ROUND_NOISE = 1 << 21


@dataclass(frozen=True)
class Draw:
    """The parameters of one draw: a request's, with the output index of the place."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed_low: int
    seed_high: int
    output_index: int

    @classmethod
    def from_record(cls, words: list[int], floats: list[float], place: int) -> "Draw":
        """From a slot's record, read as integers and as floats."""
        return cls(
            temperature=floats[fmt.ENTER_TEMPERATURE],
            top_k=words[fmt.ENTER_TOP_K],
            top_p=floats[fmt.ENTER_TOP_P],
            min_p=floats[fmt.ENTER_MIN_P],
            repetition_penalty=floats[fmt.ENTER_REPETITION_PENALTY],
            presence_penalty=floats[fmt.ENTER_PRESENCE_PENALTY],
            frequency_penalty=floats[fmt.ENTER_FREQUENCY_PENALTY],
            seed_low=words[fmt.ENTER_SEED_LOW],
            seed_high=words[fmt.ENTER_SEED_HIGH],
            output_index=words[fmt.ENTER_OUTPUT_INDEX] + place,
        )

    @property
    def greedy(self) -> bool:
        return self.temperature < fmt.GREEDY_TEMPERATURE


def argmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Highest token (lowest id on ties; -1 if none) and status by row. logits [rows, vocab] -> 2 x
    [rows] int32.
    """
    rows, vocab = logits.shape
    tile = 128
    if vocab % tile == 0 and not logits.is_cuda:
        # torch's CPU argmax is an order of magnitude slower than its amax: find the tile, then
        # search in it.
        tiles = logits.reshape(rows, vocab // tile, tile)
        best = tiles.amax(dim=2).argmax(dim=1)
        peak, within = tiles[torch.arange(rows), best].max(dim=1)
        tokens = best * tile + within
    else:
        peak, tokens = logits.max(dim=1)
    statuses = torch.where(peak.isnan() | peak.isposinf(), fmt.STATUS_NAN, fmt.STATUS_OK)
    statuses = torch.where(peak.isneginf(), fmt.STATUS_MASKED, statuses).int()
    return torch.where(statuses == fmt.STATUS_OK, tokens, -1).int(), statuses


def process(
    raw: Tensor,
    params: Draw,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    counts: Tensor | None,
    drafts_before: list[int],
) -> Tensor:
    """Logits after mask, bias, penalties and temperature. raw [vocab] -> [vocab] f32, a new tensor
    where anything changes.

    mask [ceil(vocab / 32)] int32; bias [n, 2] int32, id and f32 bits; counts [vocab] int32 as in
    `DeviceState.penalty_counts`; drafts_before: the drafts that this place takes for output.
    """
    logits = raw.float()
    if mask is not None:
        bits = torch.arange(32, dtype=torch.int32, device=raw.device)
        allowed = ((mask[:, None] >> bits) & 1).flatten()[: raw.shape[0]]
        logits = logits.masked_fill(allowed == 0, -math.inf)
    if bias is not None:
        logits = logits.index_add(0, bias[:, 0].long(), bias[:, 1].contiguous().view(torch.float32))
    if counts is not None:
        if drafts_before:
            ids = torch.tensor(
                [max(draft, 0) for draft in drafts_before], device=raw.device
            )  # a place after a -1 never counts
            counts = counts.index_add(0, ids, torch.full_like(ids, 2, dtype=counts.dtype))
        repeated = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = torch.where(counts > 0, repeated, logits)
        times = counts >> 1
        logits = logits - params.frequency_penalty * times - params.presence_penalty * (times > 0)
    if not params.greedy and params.temperature != 1.0:
        logits = logits * _inverse(params.temperature)
    return logits


def draw(logits: Tensor, params: Draw) -> tuple[int, int]:
    """Token and status for processed logits [vocab] f32."""
    vocab = logits.shape[0]
    peak = logits.amax().item()
    if peak == -math.inf:
        return -1, fmt.STATUS_MASKED
    if peak == math.inf:
        return -1, fmt.STATUS_NAN  # processed until it overflowed
    if params.greedy:
        return int(argmax_rows(logits[None])[0]), fmt.STATUS_OK
    threshold = -torch.finfo(torch.float32).max
    if params.min_p > 0:
        threshold = max(threshold, peak + math.log(params.min_p))
    if 0 < params.top_k < vocab:
        threshold = max(threshold, logits.topk(params.top_k, sorted=False).values.amin().item())
    key, left, total = noise_key(params), logits, 0.0
    if params.top_p < 1:
        total = _mass(logits.masked_fill(logits < threshold, -math.inf), peak)
    for number in itertools.count():
        token = _draw_from(left, key, number)
        logit = logits[token].item()
        if logit < threshold:
            left = logits.masked_fill(logits < threshold, -math.inf)
            continue
        if params.top_p >= 1:
            break
        left = logits.masked_fill(logits <= logit, -math.inf)
        # So written that an empty rest, or a mass that is no number, ends the search.
        ahead = _mass(left, peak)
        if not (ahead > 0 and ahead >= params.top_p * total):
            break
    return token, fmt.STATUS_OK


def _mass(logits: Tensor, peak: float) -> float:
    return torch.exp(logits - peak).sum().item()


def _draw_from(logits: Tensor, key: tuple[int, int], number: int) -> int:
    """The two steps of a draw from all logits that are not -inf; `number`: which round's noise."""
    vocab, base = logits.shape[0], number * ROUND_NOISE
    groups = torch.nn.functional.pad(logits, (0, -vocab % GROUP), value=-math.inf).view(-1, GROUP)
    peaks = groups.amax(dim=1)
    shifted = groups - peaks.clamp(min=-torch.finfo(torch.float32).max)[:, None]
    scores = peaks + shifted.exp_().sum(dim=1).log_()
    scores += gumbel(_all_ids(groups.shape[0], logits.device) + _signed((base + GROUP_NOISE) & MASK32), key)
    first = int(argmax_rows(scores[None])[0]) * GROUP
    own = logits[first : first + GROUP]
    ids = _all_ids(vocab, logits.device)[first : first + GROUP]
    scores = own + gumbel(ids + _signed(base & MASK32), key)
    return first + int(argmax_rows(scores[None])[0])


@functools.lru_cache(maxsize=4)
def _all_ids(vocab: int, device: torch.device) -> Tensor:
    return torch.arange(vocab, dtype=torch.int32, device=device)


def _inverse(value: float) -> float:
    """1 / value rounded to float32, as the kernel has it."""
    return float(1.0 / torch.tensor(value, dtype=torch.float32))


def noise_key(params: Draw) -> tuple[int, int]:
    """Two 32-bit words that select the noise of one draw: a mix of the seed's two words and the
    output index.
    """
    low, high, index = params.seed_low & MASK32, params.seed_high & MASK32, params.output_index & MASK32
    first = _mix(index ^ _mix(high ^ _mix(low)))
    second = _mix(
        ((low + 0x85EBCA6B) & MASK32) ^ _mix(((high + 0xC2B2AE35) & MASK32) ^ _mix((index + 0x27D4EB2F) & MASK32))
    )
    return first, second


def gumbel(token_ids: Tensor, key: tuple[int, int]) -> Tensor:
    """Standard Gumbel noise of each id. token_ids int32 [n] -> [n] f32, from -2.8 to 22.2.

    The hash is Wellons' two-round `lowbias32` with the second key word added between the rounds;
    integer operations wrap, so all devices agree on it bit for bit. Its upper 31 bits become v in
    (0, 1), and the noise is -log(-log(1 - v)): large noise comes from small v, where a float32
    still has all its digits.
    """
    x = token_ids * _signed(0x9E3779B1)
    x += _signed(key[0])
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x21F0AAAD)
    x ^= _signed(key[1])
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x735A2D97)
    x ^= (x >> 15) & 0x1FFFF
    v = ((x >> 1) & 0x7FFFFFFF).float()
    v += 0.5
    v *= 2.0**-31
    v.clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


def _mix(x: int) -> int:
    """Wellons' `lowbias32`: a bijection of words in which each input bit flips each output bit half
    of the time.
    """
    x = ((x ^ x >> 16) * 0x21F0AAAD) & MASK32
    x = ((x ^ x >> 15) * 0x735A2D97) & MASK32
    return x ^ x >> 15


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
