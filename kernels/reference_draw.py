"""How one token is chosen from one row of logits, in plain PyTorch: processing, the draw, and its noise. Part of the
step's twin.

Order, as in vLLM: grammar mask, logit bias, penalties, temperature, min-p, top-k, top-p, draw. Ties have fixed rules:
equal logits are in or out together, for top-k (all tokens equal to the k-th highest stay) as for top-p (a token stays
if the tokens strictly above it hold less than p of the mass that top-k left), and between equal scores the lowest token
id wins.

The draw is Gumbel-max: the token with the highest logit + noise, where the noise is a hash of (seed, output index,
token id) alone. So it does not depend on the batch, the slot, padding, preemption, or on what was cut away. No softmax,
no sort.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels import plan_format as fmt

MASK32 = 0xFFFFFFFF
NOISE_MAX = 22.25  # above every value of `gumbel`: -log(2^-32) = 22.18


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
    """Highest token (lowest id on ties; -1 if none) and status by row. logits [rows, vocab] -> 2 x [rows] int32."""
    rows, vocab = logits.shape
    tile = 128
    if vocab % tile == 0 and not logits.is_cuda:
        # torch's CPU argmax is an order of magnitude slower than its amax: find the tile, then search in it.
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
    """Logits after mask, bias, penalties and temperature. raw [vocab] -> [vocab] f32, a new tensor where anything
    changes.

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
    best = int(argmax_rows(logits[None])[0])
    if params.greedy:
        return best, fmt.STATUS_OK
    key = noise_key(params)
    threshold = -torch.finfo(torch.float32).max
    if params.min_p > 0:
        threshold = max(threshold, peak + math.log(params.min_p))
    if 0 < params.top_k < vocab:
        threshold = max(threshold, logits.topk(params.top_k, sorted=False).values.amin().item())
    if params.top_p >= 1:
        # The best token is in every set, so nothing further below its score than the largest noise can win.
        own = gumbel(torch.tensor([best], dtype=torch.int32, device=logits.device), key).item()
        threshold = max(threshold, peak + own - NOISE_MAX)

    token_ids, kept = _all_ids(vocab, logits.device), logits >= threshold
    if int(kept.sum()) * 8 < vocab:
        token_ids = kept.nonzero()[:, 0].int()
        logits = logits[token_ids]
    else:
        logits = logits.masked_fill(~kept, -math.inf)
    scores = logits + gumbel(token_ids, key)
    if params.top_p >= 1:
        return int(token_ids[argmax_rows(scores[None])[0]]), fmt.STATUS_OK
    return int(token_ids[_first_in_nucleus(logits, scores, peak, params.top_p)]), fmt.STATUS_OK


def _first_in_nucleus(logits: Tensor, scores: Tensor, peak: float, top_p: float) -> int:
    """Index of the highest score within the top-p set, without a sort.

    If the highest score of all is in the set, it is the highest of the set; if not, the set lies strictly above its
    logit, and the search goes on there. The mass outside the set is 1 - top_p, so the first is mostly the last.
    """
    weights = torch.exp(logits - peak)
    wanted = top_p * weights.sum()
    while True:
        index = int(argmax_rows(scores[None])[0])
        above = logits > logits[index]
        mass = (weights * above).sum()
        # So written that an empty rest, or weights that are not numbers, end the search too.
        if not (mass >= wanted and mass > 0):
            return index
        scores = scores.masked_fill(~above, -math.inf)


@functools.lru_cache(maxsize=4)
def _all_ids(vocab: int, device: torch.device) -> Tensor:
    return torch.arange(vocab, dtype=torch.int32, device=device)


def _inverse(value: float) -> float:
    """1 / value rounded to float32, as the kernel has it."""
    return float(1.0 / torch.tensor(value, dtype=torch.float32))


def noise_key(params: Draw) -> tuple[int, int]:
    """Two 32-bit words that select the noise of one draw: a mix of the seed's two words and the output index."""
    low, high, index = params.seed_low & MASK32, params.seed_high & MASK32, params.output_index & MASK32
    first = _mix(index ^ _mix(high ^ _mix(low)))
    second = _mix(
        ((low + 0x85EBCA6B) & MASK32) ^ _mix(((high + 0xC2B2AE35) & MASK32) ^ _mix((index + 0x27D4EB2F) & MASK32))
    )
    return first, second


def gumbel(token_ids: Tensor, key: tuple[int, int]) -> Tensor:
    """Standard Gumbel noise of each token. token_ids int32 [n] -> [n] f32, from -2.8 to NOISE_MAX.

    The hash is Wellons' two-round `lowbias32` with the second key word added between the rounds; integer operations
    wrap, so all devices agree on it bit for bit. Its upper 31 bits become v in (0, 1), and the noise is -log(-log(1 -
    v)): large noise comes from small v, where a float32 still has all its digits.
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
    """Wellons' `lowbias32`: a bijection of words in which each input bit flips each output bit half of the time."""
    x = ((x ^ x >> 16) * 0x21F0AAAD) & MASK32
    x = ((x ^ x >> 15) * 0x735A2D97) & MASK32
    return x ^ x >> 15


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
