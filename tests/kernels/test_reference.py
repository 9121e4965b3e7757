"""The twins against the definitions, written out token by token in float64."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.kernels.attention_oracle import forget_before_window, paged_attention
from torch import Tensor

from octavo.kernels import ops
from octavo.kernels.reference import layers as reference

# One rounding of the output, plus (attention) the rounding of probabilities before the second
# product.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)


@pytest.fixture(scope="session")
def device() -> str:
    """The definitions are written out on the CPU."""
    return "cpu"


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.isfinite().all()
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[actual.dtype], rtol=TOLERANCE[actual.dtype])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_norms(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    x, residual = torch.randn(2, 5, 48).to(dtype)
    weight = torch.randn(48).to(weight_dtype or dtype)
    assert_close(reference.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))
    total = x + residual
    assert_close(reference.add_rms_norm(x, residual, weight, 1e-5), rms_norm(total, weight, 1e-5))
    assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2 * 24).to(dtype)
    gate, up = x.double().chunk(2, -1)
    assert_close(reference.silu_and_mul(x), gate / (1 + (-gate).exp()) * up)
    cubic = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    assert_close(reference.gelu_tanh_and_mul(x), gate * 0.5 * (1 + cubic.tanh()) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [16, 8])
@pytest.mark.parametrize("norms", ["", "q", "qk"])
def test_rope_and_cache(dtype: torch.dtype, rotary_dim: int, norms: str) -> None:
    num_q, num_kv, dim, block_size = 6, 2, 16, 4
    qkv = torch.randn(5, (num_q + 2 * num_kv) * dim).to(dtype)
    q, k, v = (part.view(5, -1, dim) for part in qkv.split([num_q * dim, num_kv * dim, num_kv * dim], -1))
    weights = {name: torch.randn(dim).to(dtype) for name in norms}
    positions = torch.tensor([7, 0, 63, 9, 1])
    slot_mapping = torch.tensor([13, 5, 22, 4, 0])
    angles = torch.outer(torch.arange(64.0), 10000 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim))
    cache = torch.full((6, 2, num_kv, block_size, dim), 7.0).to(dtype)

    expected = {"q": torch.zeros(q.shape, dtype=torch.float64), "k": torch.zeros(k.shape, dtype=torch.float64)}
    for name, x in (("q", q), ("k", k)):
        x = rms_norm(x, weights[name], 1e-6) if name in weights else x.double()
        for token, position in enumerate(positions):
            for i in range(dim):
                pair = i % (rotary_dim // 2)
                other = x[token, :, i + rotary_dim // 2] if i < rotary_dim // 2 else x[token, :, i - rotary_dim // 2]
                angle = angles[position, pair].double() if i < rotary_dim else torch.zeros(())
                sign = -1 if i < rotary_dim // 2 else 1
                expected[name][token, :, i] = x[token, :, i] * angle.cos() + (
                    sign * other * angle.sin() if i < rotary_dim else 0
                )

    expected_v = v.double()
    reference.rope_and_cache(
        q,
        k,
        v,
        positions,
        torch.cat((angles.cos(), angles.sin()), -1),
        cache,
        slot_mapping,
        weights.get("q"),
        weights.get("k"),
    )
    # Two roundings in 16 bits: after the head norm and after the rotation.
    torch.testing.assert_close(q.double(), expected["q"], atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])
    written = cache[slot_mapping // block_size, :, :, slot_mapping % block_size].double()
    torch.testing.assert_close(written[:, 0], expected["k"], atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])
    assert torch.equal(written[:, 1], expected_v)
    cache[slot_mapping // block_size, :, :, slot_mapping % block_size] = 7.0
    assert (cache == 7.0).all(), "a slot that was not asked for was written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (3, 0.0), (9, 0.0), (0, 5.0), (5, 5.0)])
@pytest.mark.parametrize(
    ("seq_lens", "query_len"), [([9], 1), ([1], 1), ([8, 1, 13], 1), ([0, 4], 1), ([13], 3), ([3, 21, 4, 5], 3)]
)
def test_decode_attention(make_rows: Callable, dtype: torch.dtype, seq_lens, query_len, window, soft_cap) -> None:
    rows = make_rows(seq_lens, num_kv_heads=2, head_dim=16, block_size=4, dtype=dtype)
    q = torch.randn(len(seq_lens) * query_len, 6, 16).to(dtype)
    out = reference.decode_attention(
        q, rows.kv_cache, rows.block_table, rows.row_slots, rows.seq_lens, query_len, 0.3, window, soft_cap
    )
    assert_close(out, paged_attention(q, rows, [query_len] * len(seq_lens), 0.3, window, soft_cap))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (3, 0.0), (9, 5.0)])
@pytest.mark.parametrize(
    ("seq_lens", "counts", "query_len"),
    [
        ([9], [1], 1),
        ([13, 0], [1, 3], 1),  # padding with more tokens than a row may have
        ([13], [2], 4),
        ([21, 4, 0, 5, 17], [1, 4, 7, 3, 2], 4),
        ([0, 3, 0], [0, 3, 2], 8),
        ([0], [3], 1),
    ],
)
def test_decode_attention_of_ragged_rows(
    make_rows: Callable, dtype: torch.dtype, seq_lens, counts, query_len, window, soft_cap
) -> None:
    rows = make_rows(seq_lens, num_kv_heads=2, head_dim=16, block_size=4, dtype=dtype)
    forget_before_window(rows, counts, window)
    q = torch.randn(sum(counts), 6, 16).to(dtype)
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    arguments = (rows.kv_cache, rows.block_table, rows.row_slots, rows.seq_lens, query_len, 0.3, window, soft_cap)
    out = reference.decode_attention(q, *arguments, query_start_loc=starts)
    assert_close(out, paged_attention(q, rows, counts, 0.3, window, soft_cap))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (3, 0.0), (9, 0.0), (0, 5.0), (5, 5.0)])
@pytest.mark.parametrize(("seq_lens", "query_lens"), [([9], [9]), ([9], [2]), ([1, 8, 13, 12], [1, 8, 1, 7])])
def test_prefill_attention(make_rows: Callable, dtype: torch.dtype, seq_lens, query_lens, window, soft_cap) -> None:
    rows = make_rows(seq_lens, num_kv_heads=2, head_dim=16, block_size=4, dtype=dtype)
    q = torch.randn(sum(query_lens), 6, 16).to(dtype)
    query_start_loc = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    out = reference.prefill_attention(
        q,
        rows.kv_cache,
        rows.block_table,
        rows.row_slots,
        query_start_loc,
        rows.seq_lens,
        max(query_lens),
        0.3,
        window,
        soft_cap,
    )
    assert_close(out, paged_attention(q, rows, query_lens, 0.3, window, soft_cap))


def test_copy_blocks() -> None:
    caches = [torch.randint(256, (6, 48), dtype=torch.uint8) for _ in range(3)]
    before = [cache.clone() for cache in caches]
    reference.copy_blocks(caches, torch.tensor([[1, 4], [1, 5], [2, 0]], dtype=torch.int32))
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache, old[[2, 1, 2, 3, 1, 1]])


def test_ops_run_the_twins_on_a_cpu() -> None:
    x, weight = torch.randn(3, 16), torch.randn(16)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pages_may_be_narrower_than_what_is_computed(make_rows: Callable, dtype: torch.dtype) -> None:
    rows = make_rows([9, 13], num_kv_heads=2, head_dim=16, block_size=4, dtype=dtype)
    cache, table, slots, lens = rows.kv_cache, rows.block_table, rows.row_slots, rows.seq_lens
    for lengths in ([1], [1, 1], [3, 3]):  # one row, many rows, drafts
        q, n = torch.randn(sum(lengths), 6, 16), len(lengths)
        one = replace(rows, row_slots=slots[:n], seq_lens=lens[:n])
        out = reference.decode_attention(q, cache, table, slots[:n], lens[:n], lengths[0], 0.3)
        assert_close(out, paged_attention(q, one, lengths, 0.3, 0, 0.0))
    q, starts = torch.randn(22, 6, 16), torch.tensor([0, 9, 22], dtype=torch.int32)
    out = reference.prefill_attention(q, cache, table, slots, starts, lens, 13, 0.3)
    assert_close(out, paged_attention(q, rows, [9, 13], 0.3, 0, 0.0))
    for tokens in (1, 3):
        k, v = torch.randn(2, tokens, 2, 16)
        where = torch.arange(5, 5 + tokens)
        no_turn = torch.zeros(tokens, dtype=torch.long)
        reference.rope_and_cache(
            torch.randn(tokens, 6, 16), k, v, no_turn, torch.tensor([[1.0] * 8 + [0.0] * 8]), cache, where
        )
        written = cache[where // 4, :, :, where % 4]
        assert torch.equal(written[:, 0], k.to(dtype)) and torch.equal(written[:, 1], v.to(dtype))
