"""`pool` against sums in numpy float64, for the twin and for Triton."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from octavo.kernels.reference import pool as reference

SIZE = 200  # no multiple of any block

Pool = Callable[..., None]


@pytest.fixture(params=["twin", "triton"])
def pool(request: pytest.FixtureRequest) -> Pool:
    if request.param == "twin":
        return reference.pool
    return pytest.importorskip("octavo.kernels.step.pool").pool


def hidden_states(rows: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(rows)).to(dtype).to(device)


def records(*rows: tuple[int, int, int, int, int, int, int], device: str) -> torch.Tensor:
    words = torch.tensor([99, *[word for row in rows for word in row]], dtype=torch.int32, device=device)
    return words[1:].view(-1, 7)  # begins where a section may begin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_goes_on_over_chunks_and_neighbours_have_their_own(pool: Pool, device: str, dtype: torch.dtype) -> None:
    hidden = hidden_states(30, device, dtype)
    sums = torch.full((4, SIZE), 1e9, device=device)  # what earlier requests left there
    vectors = torch.full((3, SIZE), -7.0, device=device)
    first = records((2, 5, 1, 9, 1, 24, -1), (0, 6, 10, 3, 1, 3, 0), (1, 7, 29, 1, 1, 1, 1), device=device)
    pool(hidden, first, sums, vectors, last_tokens_from=None)
    exact = hidden.double().cpu().numpy()
    np.testing.assert_allclose(sums[2].cpu(), exact[1:10].sum(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(vectors[0].cpu(), exact[10:13].mean(0), rtol=1e-6, atol=1e-6)
    assert torch.equal(vectors[1], hidden[29].float())
    assert bool((vectors[2] == -7.0).all()) and bool((sums[[0, 1, 3]] == 1e9).all())
    pool(hidden, records((2, 0, 10, 15, 0, 24, 2), device=device), sums, vectors, last_tokens_from=None)
    np.testing.assert_allclose(vectors[2].cpu(), exact[1:25].mean(0), rtol=1e-6, atol=1e-6)


def test_last_tokens_are_found_among_the_places_of_logits(pool: Pool, device: str) -> None:
    """Two decode rows with 5 tokens, then prefill rows: row r's last token is at r + 3."""
    hidden = hidden_states(9, device)
    vectors = torch.zeros((2, SIZE), device=device)
    pools = records((0, 3, 700, 1, 1, 1, 0), (1, 5, 800, 1, 1, 1, 1), device=device)
    pool(hidden, pools, torch.zeros((2, SIZE), device=device), vectors, last_tokens_from=3)
    assert torch.equal(vectors, hidden[[6, 8]])


def test_nan_stays_with_its_request(pool: Pool, device: str) -> None:
    hidden = hidden_states(4, device)
    hidden[1, 7] = torch.nan
    vectors = torch.zeros((2, SIZE), device=device)
    pools = records((0, 0, 0, 2, 1, 2, 0), (1, 1, 2, 2, 1, 2, 1), device=device)
    pool(hidden, pools, torch.full((2, SIZE), torch.nan, device=device), vectors, last_tokens_from=None)
    assert bool(vectors[0].isnan()[7]) and bool(vectors[1].isfinite().all())


def test_triton_sums_do_not_depend_on_chunks(device: str) -> None:
    pool = pytest.importorskip("octavo.kernels.step.pool").pool
    hidden = hidden_states(50, device, torch.bfloat16)
    whole, parts = torch.zeros((1, SIZE), device=device), torch.zeros((1, SIZE), device=device)
    sums = torch.zeros((1, SIZE), device=device)
    pool(hidden, records((0, 0, 0, 50, 1, 50, 0), device=device), sums, whole, last_tokens_from=None)
    for start, end in [(0, 13), (13, 14), (14, 50)]:
        vector = 0 if end == 50 else -1
        chunk = records((0, 0, start, end - start, int(start == 0), 50, vector), device=device)
        pool(hidden, chunk, sums, parts, last_tokens_from=None)
    assert torch.equal(whole, parts)
