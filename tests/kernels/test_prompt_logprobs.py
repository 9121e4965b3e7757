"""`prompt_logprobs` against log-softmax in numpy float64 and a full stable sort, for the twin and for
Triton.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from octavo.kernels.reference import logprobs

VOCAB = 1500  # no multiple of any tile

Describe = Callable[[torch.Tensor, list[int], int], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


@pytest.fixture(params=["twin", "triton"])
def describe(request, device) -> Describe:
    """Of rows of logits and a target each: log probabilities [n], ranks [n], top ids and top log
    probabilities [n, top].
    """
    if request.param == "twin":
        prompt_logprobs = logprobs.prompt_logprobs
    else:
        prompt_logprobs = pytest.importorskip("octavo.kernels.step.prompt_logprobs").prompt_logprobs

    def run(logits: torch.Tensor, tokens: list[int], top: int):
        padded = torch.nn.functional.pad(logits, (0, 4), value=1e9).to(device)  # columns beyond the vocabulary
        targets = torch.tensor([[7, token] for token in tokens], dtype=torch.int32, device=device)
        record = torch.full((len(tokens), 2 + 2 * top), -77, dtype=torch.int32, device=device)
        prompt_logprobs(padded, targets, logits.shape[1], top, record)
        words, floats = record.cpu().numpy(), record.cpu().view(torch.float32).numpy()
        return floats[:, 0], words[:, 1], words[:, 2 : 2 + top], floats[:, 2 + top :]

    return run


@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_values_ranks_and_top_tokens(describe: Describe, top: int) -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    best = logits.argsort(dim=1, descending=True)
    tokens = [3, 1499, int(best[2, 0]), int(best[3, 4]), 0, int(best[5, 700])]
    own, ranks, ids, tops = describe(logits, tokens, top)
    for row, (raw, token) in enumerate(zip(logits.double().numpy(), tokens, strict=True)):
        expected = raw - raw.max() - np.log(np.exp(raw - raw.max()).sum())
        order = np.argsort(-raw, kind="stable")
        rank = int(np.flatnonzero(order == token)[0]) + 1
        assert ranks[row] == rank and ids[row].tolist() == order[:top].tolist()
        np.testing.assert_allclose(own[row], expected[token], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(tops[row], expected[order[:top]], rtol=2e-6, atol=2e-6)
        if rank <= top:
            assert own[row] == tops[row][rank - 1]  # bit for bit


def test_equals_stand_in_the_order_of_their_ids(describe: Describe) -> None:
    logits = torch.full((3, VOCAB), -math.inf)
    logits[0, [1400, 3, 700, 4, 5]] = torch.tensor([2.0, 1.0, 2.0, 1.0, 1.0])
    logits[1] = 0.25
    logits[2] = torch.where(torch.arange(VOCAB) % 2 == 1, 1.0, 0.0)
    own, ranks, ids, tops = describe(logits, [4, 1200, 1001], 8)
    assert ids.tolist() == [[700, 1400, 3, 4, 5, 0, 1, 2], list(range(8)), list(range(1, 16, 2))]
    assert ranks.tolist() == [4, 1201, 501]
    assert tops[0, 5:].tolist() == [-math.inf] * 3
    assert own[1] == pytest.approx(-math.log(VOCAB), rel=2e-6)


def test_a_tiny_vocabulary_fills_up(describe: Describe) -> None:
    _, ranks, ids, tops = describe(torch.tensor([[1.0, 3.0, 2.0]]), [2], 5)
    assert ranks.tolist() == [2] and ids.tolist() == [[1, 2, 0, -1, -1]]
    assert tops[0, 3:].tolist() == [-math.inf] * 2


def test_a_sick_row_says_so_and_its_neighbour_is_well(describe: Describe) -> None:
    logits = torch.zeros(4, VOCAB)
    logits[0, 1200], logits[1, 5] = math.nan, math.inf
    logits[3, 9] = -math.inf
    own, ranks, _, _ = describe(logits, [3, 3, 3, 9], 2)
    assert np.isnan(own[:2]).all() and ranks[2] == 4
    assert own[2] == pytest.approx(-math.log(VOCAB), rel=2e-6) and own[3] == -math.inf
