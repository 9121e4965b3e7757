"""Tokens that come over drafts, right ones and wrong ones, have the target's distribution: chi-square
over a small vocabulary, 100,000 rows a case.

The op draws row by row. So its draws are held against the definition, written for all rows at once,
on some of them; which then stands in for them while the op accepts, for all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.kernels.plan_bytes import PENALTIES, SAMPLE, Enter, Row, write_plan
from tests.kernels.sampling_oracle import allowed, noise
from torch import Tensor

from octavo.engine.step_buffers import DeviceState, StepInputs
from octavo.kernels.reference import step
from octavo.kernels.step import plan_format as fmt

VOCAB, DRAFTS = 8, 2
ROWS, TURNS = 10_000, 10
LEAST_P_VALUE = 1e-4

CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.3},
    "top-k": {"temperature": 1.0, "top_k": 4},
    "top-p": {"temperature": 0.8, "top_p": 0.8},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "all": {"temperature": 1.1, "top_k": 6, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"temperature": 1.0, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "bias": {"temperature": 0.9, "top_p": 0.95, "bias": [(2, 1.5), (5, -2.0)]},
}


class Rows:
    """Decode rows with two drafts each, all of one request's parameters: each with a seed of its own."""

    def __init__(self, case: dict[str, Any], count: int) -> None:
        self.case = {name: value for name, value in case.items() if name != "bias"}
        bias = case.get("bias", [])
        self.has_penalties = "presence_penalty" in case
        flags = SAMPLE | (PENALTIES if self.has_penalties else 0)
        rows = [Row(slot, flags=flags, drafts=[0] * DRAFTS, bias=bias) for slot in range(count)]
        # Token 3 stands in the prompt, and token 1 was output twice.
        seen = [(3, 1), (1, 4)] if self.has_penalties else []
        enters = [Enter(slot, output_index=5, penalty_tokens=seen, **self.case) for slot in range(count)]
        self.plan, self.data = write_plan(rows, enters=enters)
        device = torch.device("cpu")
        self.state = DeviceState(max_num_seqs=count, num_groups=1, max_blocks=1, vocab_size=VOCAB, device=device)
        tokens = count * (1 + DRAFTS)
        self.inputs = StepInputs(max_tokens=tokens, max_rows=count, num_groups=1, device=device)
        logits = torch.randn(1 + DRAFTS, VOCAB, generator=torch.Generator().manual_seed(1))
        self.logits = logits.repeat(count, 1)
        counts = np.array([0, 4, 0, 1, 0, 0, 0, 0]) if self.has_penalties else np.zeros(VOCAB, dtype=int)
        biased = logits.double().numpy().copy()
        for token, value in bias:
            biased[:, token] += value
        # Of each place, by the drafts before it: logits to draw from [VOCAB].
        self.processed = {
            (place, before): self.penalised(biased[place], counts, before) / self.case["temperature"]
            for place in range(1 + DRAFTS)
            for before in np.ndindex((VOCAB,) * place)
        }
        self.generator = np.random.default_rng(3)
        self.proposed = self.generator.dirichlet(np.ones(VOCAB))

    def penalised(self, logits: np.ndarray, counts: np.ndarray, before: tuple[int, ...]) -> np.ndarray:
        if not self.has_penalties:
            return logits
        counts = counts.copy()
        np.add.at(counts, list(before), 2)
        repetition = self.case["repetition_penalty"]
        repeated = np.where(logits > 0, logits / repetition, logits * repetition)
        logits = np.where(counts > 0, repeated, logits)
        times = counts >> 1
        return logits - self.case["frequency_penalty"] * times - self.case["presence_penalty"] * (times > 0)

    def allowed(self, scaled: np.ndarray, top_p: float | None = None) -> np.ndarray:
        case = self.case
        top_p = case.get("top_p", 1.0) if top_p is None else top_p
        return allowed(scaled, case.get("top_k", 0), top_p, case.get("min_p", 0.0))

    def probabilities(self, place: int, before: tuple[int, ...]) -> np.ndarray:
        """Of the target, at a place behind those drafts # [VOCAB]."""
        scaled = self.processed[place, before]
        weights = np.where(self.allowed(scaled), np.exp(scaled), 0)
        return weights / weights.sum()

    def run(self, turn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Drafts [rows, DRAFTS], the tokens drawn [rows, 1 + DRAFTS] and how many of them count [rows]."""
        count = self.plan.num_rows
        drafts = self.generator.choice(VOCAB, (count, DRAFTS), p=self.proposed).astype(np.int32)
        start = self.plan.drafts_offset // 4
        self.data.view(torch.int32)[start : start + drafts.size] = torch.from_numpy(drafts.reshape(-1))
        step.prepare(self.plan, self.data, self.state, self.inputs, block_size=16)
        seeds = torch.arange(count, dtype=torch.int32) + turn * count
        self.state.seed[:count] = torch.stack([seeds, torch.full_like(seeds, 9)], dim=1)
        result = torch.zeros(count * self.plan.result_width, dtype=torch.int32)
        step.sample(self.logits, self.plan, self.data, self.state, self.inputs, result)
        records = result.view(count, self.plan.result_width).numpy()
        return drafts, records[:, fmt.RESULT_TOKENS :], records[:, fmt.RESULT_NUM_VALID]

    def stand_in(self, drafts: Tensor) -> Tensor:
        """Tokens of all places of all rows by definition: what is drawn with each row's own noise, again
        and again until it is allowed # [rows * (1 + DRAFTS)] int32.
        """
        count = self.plan.num_rows
        seed = self.state.seed[:count].numpy().astype(np.uint32)
        words = (seed[:, :1], seed[:, 1:])
        tokens = np.full((count, 1 + DRAFTS), -1)
        befores = drafts[:count].numpy()
        for place in range(1 + DRAFTS):
            # Without penalties all rows draw from the same logits.
            for before in np.ndindex((VOCAB,) * place) if self.has_penalties else [(0,) * place]:
                scaled = self.processed[place, before]
                rows = np.arange(count)
                if self.has_penalties:
                    rows = np.flatnonzero((befores[:, :place] == before).all(axis=1))
                keep = self.allowed(scaled)
                threshold = scaled[self.allowed(scaled, top_p=1.0)].min()
                left, number = np.full((len(rows), VOCAB), True), 0
                while len(rows):
                    own = tuple(word[rows] for word in words)
                    index = np.full((len(rows), 1), 5 + place)
                    scores = np.where(left, scaled, -np.inf) + noise(np.arange(VOCAB) + 2**21 * number, own, index)[0]
                    token = scores.argmax(axis=1)
                    tokens[rows, place] = token
                    again = ~keep[token]
                    rows, token = rows[again], token[again]
                    below = scaled[token] < threshold
                    left = np.where(below[:, None], scaled >= threshold, scaled > scaled[token][:, None])
                    number += 1
        return torch.from_numpy(tokens.reshape(-1).astype(np.int32))


def least_p_value(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> float:
    """Of Pearson's chi-square at each place whose drafts before it were right, by those drafts."""
    rows = Rows(case, ROWS)

    def draw_rows(logits: Tensor, plan: Any, words: Tensor, table: Tensor, drafts: Tensor, *_: Any) -> Any:
        tokens = rows.stand_in(drafts)
        return tokens, torch.full_like(tokens, fmt.STATUS_OK)

    monkeypatch.setattr(step, "_draw_rows", draw_rows)
    turns = [rows.run(turn)[1:] for turn in range(TURNS)]
    tokens, num_valid = np.concatenate([turn[0] for turn in turns]), np.concatenate([turn[1] for turn in turns])
    counts = {}
    for place in range(1 + DRAFTS):
        counted = tokens[num_valid > place, : 1 + place]
        codes = counted @ VOCAB ** np.arange(place, -1, -1)
        by_before = np.bincount(codes, minlength=VOCAB ** (1 + place)).reshape((VOCAB,) * (1 + place))
        counts |= {(place, before): by_before[before] for before in np.ndindex((VOCAB,) * place)}
    assert counts[0, ()].sum() == ROWS * TURNS
    assert sum(counts[1, (token,)].sum() for token in range(VOCAB)) > 5_000
    p_values = []
    for key, found in counts.items():
        expected = rows.probabilities(*key) * found.sum()
        assert found[expected == 0].sum() == 0, "a token that the filters leave out"
        counts_enough = expected > 5
        if counts_enough.sum() > 1:
            statistic = ((found - expected)[counts_enough] ** 2 / expected[counts_enough]).sum()
            half = torch.tensor([(counts_enough.sum() - 1) / 2, statistic / 2], dtype=torch.float64)
            p_values.append(float(torch.special.gammaincc(half[0], half[1])))
    assert len(p_values) > VOCAB // 2
    return min(p_values)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_op_draws_by_definition(case: dict[str, Any]) -> None:
    rows = Rows(case, 150)
    drafts, tokens, num_valid = rows.run(0)
    rows.state.output_index[:150] -= torch.from_numpy(num_valid)
    expected = rows.stand_in(torch.from_numpy(drafts)).view(150, -1).numpy()
    right = (drafts == expected[:, :DRAFTS]).cumprod(axis=1).sum(axis=1)
    assert num_valid.tolist() == (1 + right).tolist() and right.max() > 0
    is_valid = np.arange(1 + DRAFTS) < num_valid[:, None]
    assert (tokens == np.where(is_valid, expected, -1)).all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_draws_over_drafts_have_the_targets_distribution(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert least_p_value(case, monkeypatch) > LEAST_P_VALUE


def test_an_acceptance_that_favours_a_draft_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong draft in fifty is taken."""
    accept = step._accept

    def lenient(rows: Tensor, tokens: Tensor, statuses: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        takes = torch.arange(len(drafts)) % 50 == 0
        tokens[:, 0] = torch.where(takes, drafts[:, 0], tokens[:, 0])
        return accept(rows, tokens, statuses, drafts)

    monkeypatch.setattr(step, "_accept", lenient)
    assert least_p_value(CASES["temperature"], monkeypatch) < LEAST_P_VALUE
