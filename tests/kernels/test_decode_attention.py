"""Decode attention against its twin in fp32, over pages whose unused part is NaN; ragged rows
against the definition in float64 too.
"""

import pytest
import torch
from tests.kernels.attention_oracle import forget_before_window, paged_attention
from tests.kernels.kv_codes import KV_DTYPES, quantise_rows

from octavo.kernels.attention import decode as kernels
from octavo.kernels.reference import layers as reference

# Rounding of the output and, before the second product, of the probabilities; fp32 has the order of
# sums and exp2.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
gpu = pytest.mark.gpu

# (seq_lens, query_len, Hq, Hkv, D, block_size)
CASES = [
    ([1], 1, 9, 3, 64, 16),
    ([40], 1, 9, 3, 64, 16),
    ([0, 15, 16, 17, 1, 700], 1, 9, 3, 64, 16),
    ([63, 64, 65, 0], 1, 4, 4, 64, 64),
    ([5, 0, 90, 0, 0, 33, 64, 0, 1, 129], 1, 4, 4, 64, 16),  # more units than programs, and rows of no keys
    ([60, 64, 50], 1, 4, 2, 64, 16),  # units of as many tiles each: whole ones are dealt out
    ([300, 5], 1, 16, 1, 128, 32),
    ([33, 190], 1, 4, 2, 96, 16),
    ([33, 70], 1, 2, 2, 80, 64),
    ([20, 130], 1, 4, 2, 256, 64),
    ([9, 100, 3], 3, 6, 2, 64, 16),
    ([200, 8], 8, 16, 1, 64, 32),  # 128 query rows: two chunks a unit
    *(
        pytest.param(lens, query_len, num_q, num_kv, dim, block_size, marks=gpu)
        for lens in ([1], [1000], [513] * 31 + [32768], list(range(130)), [0] * 3 + [4097])
        for query_len, num_q, num_kv, dim, block_size in [
            (1, 32, 32, 128, 64),
            (1, 32, 8, 128, 16),
            (1, 32, 8, 128, 64),
            (4, 64, 8, 128, 64),
            (8, 16, 1, 256, 32),
            (1, 9, 3, 64, 16),
            (2, 8, 4, 96, 64),
        ]
    ),
]


def check(rows, q, query_len, window, soft_cap, tolerance, kv_scales=None) -> None:
    scale = 1.3 * q.shape[2] ** -0.5
    settings = (query_len, scale, window, soft_cap)
    arguments = (rows.kv_cache, rows.block_table, rows.row_slots, rows.seq_lens)
    out = kernels.decode_attention(q, *arguments, *settings, kv_scales)
    # The twin runs on the CPU, since torch's own attention answers wrongly on an H100 for some
    # masked views (torch 2.11). It pads every row to the longest: row by row, a skewed batch fits
    # into memory.
    cache, table, slots, lens = (x.cpu() for x in arguments)
    cache, scales = (cache.float(), None) if kv_scales is None else (cache, kv_scales.cpu())
    expected = [
        reference.decode_attention(part, cache, table, slot, length, *settings, scales)
        for part, slot, length in zip(q.cpu().float().split(query_len), slots.split(1), lens.split(1), strict=True)
    ]
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.float().cpu(), torch.cat(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (20, 0.0), (100, 3.0)])
@pytest.mark.parametrize(("seq_lens", "query_len", "num_q", "num_kv", "dim", "block_size"), CASES)
def test_decode_attention(
    device, make_rows, kernel_dtype, seq_lens, query_len, num_q, num_kv, dim, block_size, window, soft_cap
) -> None:
    rows = make_rows(seq_lens, num_kv, dim, block_size, kernel_dtype)
    qkv = torch.randn(len(seq_lens) * query_len, (num_q + 2 * num_kv) * dim, device=device).to(kernel_dtype)
    q = qkv[:, : num_q * dim].view(-1, num_q, dim)  # strided rows, as in the fused projection
    check(rows, q, query_len, window, soft_cap, TOLERANCE[kernel_dtype])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), pytest.param(20, 3.0, marks=gpu)])
@pytest.mark.parametrize(
    ("seq_lens", "query_len", "num_q", "num_kv", "dim", "block_size"),
    [
        ([0, 16, 1, 65], 1, 3, 1, 64, 16),
        ([33, 70], 1, 2, 1, 80, 64),
        ([9, 40], 3, 4, 2, 128, 64),
        *(
            pytest.param(lens, query_len, num_q, num_kv, dim, block_size, marks=gpu)
            for lens in ([1000], [513] * 31 + [8192], list(range(130)))
            for query_len, num_q, num_kv, dim, block_size in [
                (1, 32, 32, 128, 64),
                (1, 32, 8, 128, 16),
                (1, 32, 8, 128, 64),
                (4, 64, 8, 128, 64),
                (2, 8, 2, 256, 32),
                (2, 8, 4, 96, 64),
            ]
        ),
    ],
)
def test_quantised_pages(
    device,
    make_rows,
    kernel_dtype,
    kv_dtype,
    seq_lens,
    query_len,
    num_q,
    num_kv,
    dim,
    block_size,
    window,
    soft_cap,
) -> None:
    rows, scales = quantise_rows(make_rows(seq_lens, num_kv, dim, block_size, torch.float32), kv_dtype)
    q = torch.randn(len(seq_lens) * query_len, num_q, dim, device=device).to(kernel_dtype)
    check(rows, q, query_len, window, soft_cap, TOLERANCE[kernel_dtype], scales)


# (seq_lens, tokens of each row, most tokens of a row, Hq, Hkv, D, block_size); rows of length 0 are
# padding
RAGGED = [
    ([40, 0, 17, 3], [1, 6, 3, 2], 4, 4, 2, 64, 16),
    ([15, 0, 130], [1, 3, 1], 1, 4, 4, 64, 16),
    ([0, 0, 70], [0, 9, 5], 8, 3, 1, 64, 16),  # one row in pieces
    ([150, 8], [5, 8], 8, 16, 1, 64, 32),  # 128 query rows: two chunks a unit, one of them cut
    *(
        pytest.param(lens, counts, query_len, num_q, num_kv, dim, block_size, marks=gpu)
        for lens, counts in (
            ([513] * 31 + [8192, 0, 0], [*([1] * 15), *([4] * 16), 3, 200, 0]),
            (list(range(4, 134)), [1 + row % 4 for row in range(130)]),
        )
        for query_len, num_q, num_kv, dim, block_size in [
            (4, 32, 32, 128, 64),
            (8, 32, 8, 128, 16),
            (8, 16, 1, 256, 32),
        ]
    ),
]


def starts_of(counts: list[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (20, 3.0)])
@pytest.mark.parametrize(("seq_lens", "counts", "query_len", "num_q", "num_kv", "dim", "block_size"), RAGGED)
def test_ragged_rows(
    device, make_rows, kernel_dtype, seq_lens, counts, query_len, num_q, num_kv, dim, block_size, window, soft_cap
) -> None:
    rows = make_rows(seq_lens, num_kv, dim, block_size, kernel_dtype)
    forget_before_window(rows, counts, window)
    q = torch.randn(sum(counts), num_q, dim, device=device).to(kernel_dtype)
    settings = (query_len, dim**-0.5, window, soft_cap)
    arguments = (rows.kv_cache, rows.block_table, rows.row_slots, rows.seq_lens)
    for _ in range(2):  # the counters are zero again
        out = kernels.decode_attention(q, *arguments, *settings, query_start_loc=starts_of(counts, device))
        assert out.dtype == q.dtype and out.shape == q.shape
        cache, *tables = (x.cpu() for x in arguments)
        twin = reference.decode_attention(
            q.cpu().float(), cache.float(), *tables, *settings, query_start_loc=starts_of(counts, "cpu")
        )
        tolerance = TOLERANCE[kernel_dtype]
        torch.testing.assert_close(out.float().cpu(), twin, atol=tolerance, rtol=tolerance)
    if sum(seq_lens) < 1000:
        exact = paged_attention(q, rows, counts, *settings[1:])
        torch.testing.assert_close(out.double().cpu(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_ragged_rows_over_quantised_pages(device, make_rows, kv_dtype) -> None:
    counts = [2, 1, 4, 3]
    rows, scales = quantise_rows(make_rows([9, 40, 0, 33], 1, 64, 16, torch.float32), kv_dtype)
    q = torch.randn(sum(counts), 2, 64, device=device)
    arguments = (q, rows.kv_cache, rows.block_table, rows.row_slots, rows.seq_lens, 3, 0.1, 0, 0.0, scales)
    out = kernels.decode_attention(*arguments, starts_of(counts, device))
    arguments = tuple(x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments)
    twin = reference.decode_attention(*arguments, starts_of(counts, "cpu"))
    torch.testing.assert_close(out.cpu(), twin, atol=1e-5, rtol=1e-5)


def test_rows_of_equal_tokens_are_the_same_with_and_without_their_starts(device, make_rows, kernel_dtype) -> None:
    rows = make_rows([40, 9, 77], 2, 64, 16, kernel_dtype)
    q = torch.randn(9, 4, 64, device=device).to(kernel_dtype)
    arguments = (q, rows.kv_cache, rows.block_table, rows.row_slots, rows.seq_lens, 3, 0.1, 20)
    ragged = kernels.decode_attention(*arguments, query_start_loc=starts_of([3, 3, 3], device))
    assert torch.equal(ragged, kernels.decode_attention(*arguments))


def test_counters_reset_themselves(device, make_rows) -> None:
    """The same launch twice: a counter left over from the first would spoil the second."""
    rows = make_rows([500, 3], 2, 64, 16, torch.float32)
    q = torch.randn(2, 4, 64, device=device)
    for _ in range(2):
        check(rows, q, 1, 0, 0.0, TOLERANCE[torch.float32])
    assert not kernels.arrivals(q.device).any()


def test_too_many_units(device) -> None:
    rows = 40000
    q = torch.zeros(rows, 2, 16, device=device)
    cache = torch.zeros(1, 2, 2, 16, 16, device=device)
    index = torch.zeros(rows, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="80000 units"):
        kernels.decode_attention(q, cache, torch.zeros(1, 1, dtype=torch.int32, device=device), index, index, 1, 1.0)


@gpu
def test_one_graph_serves_all_lengths(device, make_rows) -> None:
    rows = make_rows([3000, 40, 1, 700], 8, 128, 16, torch.bfloat16)
    q = torch.randn(4, 32, 128, device=device).bfloat16()
    lengths = rows.seq_lens.clone()
    rows.seq_lens.fill_(1)
    arguments = (q, rows.kv_cache, rows.block_table, rows.row_slots, rows.seq_lens, 1, 128**-0.5)
    kernels.decode_attention(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.decode_attention(*arguments)
    rows.seq_lens.copy_(lengths)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        expected = reference.decode_attention(q.float(), rows.kv_cache.float(), *arguments[2:])
        torch.testing.assert_close(out.float(), expected, atol=1.6e-2, rtol=1.6e-2)


@gpu
def test_offsets_beyond_32_bits(device) -> None:
    """A cache of more than 2^31 elements, with the row in its last blocks."""
    num_blocks = 2**31 // (2 * 8 * 64 * 128) + 8
    cache = torch.zeros(num_blocks, 2, 8, 64, 128, device=device, dtype=torch.bfloat16)
    cache[-2:] = torch.randn(2, 2, 8, 64, 128, device=device)
    table = torch.tensor([[num_blocks - 1, num_blocks - 2]], dtype=torch.int32, device=device)
    slots, lens = (
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.tensor([100], dtype=torch.int32, device=device),
    )
    q = torch.randn(1, 32, 128, device=device).bfloat16()
    out = kernels.decode_attention(q, cache, table, slots, lens, 1, 128**-0.5)
    near = cache[-2:].float()
    expected = reference.decode_attention(q.float(), near, table - (num_blocks - 2), slots, lens, 1, 128**-0.5)
    torch.testing.assert_close(out.float(), expected, atol=1.6e-2, rtol=1.6e-2)
