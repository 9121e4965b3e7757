"""Sampling by its definition in numpy float64, and a step of prepare and sample for the tests to
hold against it.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from tests.kernels.plan_bytes import Enter, Row, write_plan
from torch import Tensor

from octavo.engine.step_buffers import DeviceState, StepInputs
from octavo.kernels.reference import step


def hash_words(x: np.ndarray) -> np.ndarray:
    """Chris Wellons' lowbias32 (nullprogram.com/blog/2018/07/31, the improved constants) on uint32."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x21F0AAAD)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x735A2D97)
    return x ^ (x >> np.uint32(15))


def noise(ids: np.ndarray, seed: tuple[int, int], output_index: int) -> np.ndarray:
    """Gumbel noise of each id in float64, from the documented hash."""
    low, high, index = (np.array([word], dtype=np.uint32) for word in (*seed, output_index))
    first = hash_words(index ^ hash_words(high ^ hash_words(low)))
    second = hash_words(
        (low + np.uint32(0x85EBCA6B))
        ^ hash_words((high + np.uint32(0xC2B2AE35)) ^ hash_words(index + np.uint32(0x27D4EB2F)))
    )
    x = ids.astype(np.uint32) * np.uint32(0x9E3779B1) + first
    x = x ^ (x >> np.uint32(16))
    x = (x * np.uint32(0x21F0AAAD)) ^ second
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x735A2D97)
    x = x ^ (x >> np.uint32(15))
    v = np.minimum(((x >> np.uint32(1)).astype(np.float64) + 0.5) / 2**31, 1 - 2.0**-24)
    return -np.log(-np.log1p(-v))


def allowed(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens may be drawn, naively: min-p, then top-k of those, then top-p of those; equals
    together. # [vocab] bool.
    """
    weights = np.exp(scaled - scaled.max())
    keep = weights >= min_p * weights.max()
    if 0 < top_k < keep.sum():
        keep &= scaled >= np.sort(scaled[keep])[-top_k]
    if top_p < 1:
        weights = np.where(keep, weights, 0)
        _, place = np.unique(weights, return_inverse=True)  # equals are one value, the least first
        masses = np.bincount(place, weights)
        above = masses[::-1].cumsum()[::-1] - masses  # of all that weigh more
        keep &= above[place] < top_p * weights.sum()
    return keep


def expected_token(logits: np.ndarray, enter: Enter, place: int = 0, *, least_gap: float = 1e-4) -> int | None:
    """The token to draw from processed logits, or None where two scores are so close that float32
    may decide either way.
    """
    logits = logits.astype(np.float64)
    if enter.temperature < 1e-5:
        return winner(logits, least_gap)
    scaled = logits / enter.temperature
    keep = allowed(scaled, enter.top_k, enter.top_p, enter.min_p)
    ids, index, left = np.arange(len(logits)), enter.output_index + place, np.full(len(logits), True)
    threshold = scaled[allowed(scaled, enter.top_k, 1.0, enter.min_p)].min()
    for number in range(1000):
        base, rest = 2**21 * number, np.where(left, scaled, -np.inf)
        with np.errstate(divide="ignore"):
            masses = [np.log(np.exp(rest[start : start + 128] - scaled.max()).sum()) for start in ids[::128]]
        group = winner(np.array(masses) + noise(base + 2**20 + np.arange(len(masses)), enter.seed, index), least_gap)
        if group is None:
            return None
        own = slice(128 * group, 128 * group + 128)
        within = winner(rest[own] + noise(base + ids[own], enter.seed, index), least_gap)
        if within is None:
            return None
        token = 128 * group + within
        if keep[token]:
            return token
        left = scaled >= threshold if scaled[token] < threshold else scaled > scaled[token]
    raise AssertionError("no end")


def winner(scores: np.ndarray, least_gap: float) -> int | None:
    """The index of the highest score, or None where another is closer than `least_gap`."""
    if len(scores) == 1:
        return 0
    best, second = np.sort(scores)[-1:-3:-1]
    return None if best - second < least_gap else int(scores.argmax())


@dataclass
class Record:
    """One row of the result."""

    status: int
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)


@dataclass
class Sampler:
    """A device state and the sample function under test."""

    sample: object
    prepare: object
    device: str
    vocab: int
    slots: int = 33

    def __post_init__(self) -> None:
        self.fresh()

    def fresh(self) -> None:
        device = torch.device(self.device)
        self.state = DeviceState(
            max_num_seqs=self.slots - 1, num_groups=1, max_blocks=64, vocab_size=self.vocab, device=device
        )
        self.inputs = StepInputs(max_tokens=512, max_rows=self.slots + 8, num_groups=1, device=device)

    def step(
        self,
        logits: Tensor,
        decodes: list[Row] | None = None,
        prefills: list[Row] | None = None,
        masks: Tensor | None = None,
        **plan_options,
    ) -> list[Record]:
        plan, data = write_plan(decodes, prefills, device=self.device, padding_slot=self.slots - 1, **plan_options)
        self.prepare(plan, data, self.state, self.inputs, block_size=16)
        result = torch.full((plan.padded_rows * plan.result_width + 5,), -777, dtype=torch.int32, device=self.device)
        if masks is not None:
            masks = masks.to(self.device)
        self.sample(logits.to(self.device), plan, data, self.state, self.inputs, result, masks)
        assert (result[-5:] == -777).all()
        return read_records(result[:-5].cpu().numpy(), plan)


def read_records(words: np.ndarray, plan) -> list[Record]:
    """docs/plan.md, "The result"."""
    places, top, records = plan.decode_query_len, plan.max_logprobs, []
    for line in words.reshape(plan.padded_rows, plan.result_width):
        valid, floats = int(line[1]), line.view(np.float32)
        record = Record(int(line[0]), line[2 : 2 + valid].tolist())
        assert line[2 + valid : 2 + places].tolist() == [-1] * (places - valid)
        if top >= 0:
            at = 2 + places
            record.logprobs = floats[at : at + valid].tolist()
            at += places
            record.ranks = line[at : at + valid].tolist()
            at += places
            record.top_ids = line[at : at + places * top].reshape(places, top)[:valid].tolist()
            at += places * top
            record.top_logprobs = floats[at : at + places * top].reshape(places, top)[:valid].tolist()
        records.append(record)
    return records


def twin(device: str, vocab: int, slots: int = 33) -> Sampler:
    return Sampler(step.sample, step.prepare, device, vocab, slots)
