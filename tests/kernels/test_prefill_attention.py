"""Prefill attention against its twin in fp32, over pages whose unused part is NaN."""

import subprocess
import sys

import pytest
import torch
from tests.kernels.kv_codes import KV_DTYPES, quantise_rows

from octavo.kernels.arrivals import arrivals
from octavo.kernels.attention import prefill as kernels
from octavo.kernels.attention import widen
from octavo.kernels.reference import layers as reference

# Rounding of the output and, before the second product, of the probabilities; fp32 has the order of
# sums and exp2.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
gpu = pytest.mark.gpu

# (query_lens, cached lengths, Hq, Hkv, D, block_size)
CASES = [
    ([1], [0], 3, 1, 64, 16),
    ([33, 1, 16, 31], [0, 64, 15, 1], 3, 1, 64, 16),
    ([3, 3, 2], [62, 30, 63], 3, 1, 64, 16),  # the first token one key short of a whole tile, and exactly at it
    ([5, 70], [129, 0], 2, 2, 80, 64),
    ([40, 3], [50, 0], 4, 2, 128, 32),
    ([20], [75], 2, 1, 256, 64),
    ([0, 2] * 20 + [3, 0], [1] * 42, 2, 1, 64, 16),  # more rows than are looked through at a time, and empty ones
    ([70, 60, 7], [90, 68, 57], 2, 1, 64, 64),  # in 16 bits whole tiles by descriptor, up to the row's end and not
    *(
        pytest.param(query_lens, cached, num_q, num_kv, dim, block_size, marks=gpu)
        for query_lens, cached in (
            ([2048], [0]),
            ([1, 1000, 127, 128, 129, 5], [4000, 63, 64, 65, 0, 1]),
            ([512] * 16, [0] * 16),
        )
        for num_q, num_kv, dim, block_size in [
            (32, 8, 128, 16),
            (8, 8, 128, 64),
            (9, 3, 64, 16),
            (4, 1, 256, 32),
            (6, 2, 96, 64),
        ]
    ),
]


def check(rows, q, query_lens, window, soft_cap, tolerance, kv_scales=None) -> None:
    query_start_loc = torch.tensor([0, *query_lens], device=q.device).cumsum(0, dtype=torch.int32)
    tensors = (rows.kv_cache, rows.block_table, rows.row_slots, query_start_loc, rows.seq_lens)
    settings = (max(query_lens), 1.3 * q.shape[2] ** -0.5, window, soft_cap)
    out = kernels.prefill_attention(q, *tensors, *settings, kv_scales)
    # On the CPU: torch's own attention answers wrongly on an H100 for some of these strided, masked
    # views (torch 2.11).
    cache, *others = (x.cpu() for x in tensors)
    cache, scales = (cache.float(), None) if kv_scales is None else (cache, kv_scales.cpu())
    expected = reference.prefill_attention(q.float().cpu(), cache, *others, *settings, scales)
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.float().cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (20, 0.0), (200, 3.0)])
@pytest.mark.parametrize(("query_lens", "cached", "num_q", "num_kv", "dim", "block_size"), CASES)
def test_prefill_attention(
    device, make_rows, kernel_dtype, query_lens, cached, num_q, num_kv, dim, block_size, window, soft_cap
) -> None:
    seq_lens = [query + prefix for query, prefix in zip(query_lens, cached, strict=True)]
    rows = make_rows(seq_lens, num_kv, dim, block_size, kernel_dtype)
    qkv = torch.randn(sum(query_lens), (num_q + 2 * num_kv) * dim, device=device).to(kernel_dtype)
    q = qkv[:, : num_q * dim].view(-1, num_q, dim)  # strided rows, as in the fused projection
    check(rows, q, query_lens, window, soft_cap, TOLERANCE[kernel_dtype])


@gpu
@pytest.mark.parametrize(
    ("dtype", "block_size", "window"),
    [
        *((torch.bfloat16, *pair) for pair in [(16, 0), (16, 20), (32, 128), (64, 0), (64, 1), (64, 129), (64, 1000)]),
        *((torch.bfloat16, *pair) for pair in [(128, 0), (128, 20), (384, 200)]),
        *((torch.float16, *pair) for pair in [(32, 0), (64, 0), (64, 100)]),
    ],
)
@pytest.mark.parametrize(("num_q", "num_kv", "dim"), [(8, 2, 128), (3, 3, 64)])
def test_gluon_kernel(monkeypatch, make_rows, num_q, num_kv, dim, block_size, window, dtype) -> None:
    """Lengths around its tile of 128 keys and its block of 128 tokens; what the table says past a
    row's pages, it must not follow.
    """
    if not kernels.has_gluon(torch.device("cuda")):
        pytest.skip("written for Hopper")
    monkeypatch.setattr(kernels, "_prefill_attention_kernel", None)
    for query_lens, cached in (
        ([1, 127, 128, 129, 5, 0, 300], [0, 1, 128, 127, 1000, 70, 85]),
        ([0, 2] * 20 + [3, 0, 64, 65, 200], [1] * 42 + [127, 128, 190]),
        ([1], [0]),
    ):
        seq_lens = [query + prefix for query, prefix in zip(query_lens, cached, strict=True)]
        rows = make_rows(seq_lens, num_kv, dim, block_size, dtype)
        for slot, length in zip(rows.row_slots.tolist(), seq_lens, strict=True):
            rows.block_table[slot, -(-length // block_size) :] = 2**30
        q = torch.randn(sum(query_lens), num_q, dim, device="cuda").to(dtype)
        check(rows, q, query_lens, window, 0.0, TOLERANCE[dtype])
    assert not arrivals(q.device).any()


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_q", "num_kv", "dim", "block_size"), [(8, 2, 128, 64), (9, 3, 64, 16)])
def test_triton_kernel_takes_what_the_gluon_kernel_does(
    monkeypatch, make_rows, num_q, num_kv, dim, block_size, dtype
) -> None:
    """As on other GPUs."""
    monkeypatch.setattr(kernels, "has_gluon", lambda device: False)
    query_lens, cached = [1, 1000, 127, 128, 129, 5], [4000, 63, 64, 65, 0, 1]
    seq_lens = [query + prefix for query, prefix in zip(query_lens, cached, strict=True)]
    rows = make_rows(seq_lens, num_kv, dim, block_size, dtype)
    q = torch.randn(sum(query_lens), num_q, dim, device="cuda").to(dtype)
    check(rows, q, query_lens, 0, 0.0, TOLERANCE[dtype])


def test_gluon_is_only_imported_where_it_runs() -> None:
    """Gluon is experimental, and not all versions of Triton have it."""
    code = (
        "import sys; sys.modules['triton.experimental.gluon'] = None\n"
        "from octavo.kernels import launch\n"
        "from octavo.kernels.attention import prefill\n"
        "from octavo.kernels.linear import int4\n"
        "import torch; assert not launch.has_gluon(torch.device('cpu'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), pytest.param(20, 3.0, marks=gpu)])
@pytest.mark.parametrize(
    ("query_lens", "cached", "num_q", "num_kv", "dim", "block_size"),
    [
        ([33, 1], [0, 40], 2, 1, 64, 16),
        ([5, 20], [69, 0], 2, 2, 80, 64),
        *(
            pytest.param([1, 1000, 127, 128, 129, 5], [2000, 63, 64, 65, 0, 1], *shape, marks=gpu)
            for shape in [(32, 8, 128, 16), (8, 8, 128, 64), (9, 3, 64, 16), (4, 1, 256, 32), (6, 2, 96, 64)]
        ),
    ],
)
def test_quantised_pages(
    device, make_rows, kernel_dtype, kv_dtype, query_lens, cached, num_q, num_kv, dim, block_size, window, soft_cap
) -> None:
    seq_lens = [query + prefix for query, prefix in zip(query_lens, cached, strict=True)]
    rows, scales = quantise_rows(make_rows(seq_lens, num_kv, dim, block_size, torch.float32), kv_dtype)
    q = torch.randn(sum(query_lens), num_q, dim, device=device).to(kernel_dtype)
    check(rows, q, query_lens, window, soft_cap, TOLERANCE[kernel_dtype], scales)


@gpu
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("prefix_bytes", [0, 3_000_000])
@pytest.mark.parametrize(("dtype", "window"), [(torch.bfloat16, 0), (torch.float16, 0), (torch.bfloat16, 200)])
@pytest.mark.parametrize(("num_q", "num_kv", "dim", "block_size"), [(8, 2, 128, 64), (3, 3, 64, 16), (4, 4, 128, 384)])
def test_widened_codes(
    monkeypatch, make_rows, kv_dtype, prefix_bytes, dtype, window, num_q, num_kv, dim, block_size
) -> None:
    """Rows of which some fit the work space and some do not: each is some kernel's, and once."""
    if not kernels.has_gluon(torch.device("cuda")):
        pytest.skip("written for Hopper")
    monkeypatch.setattr(widen, "PREFIX_BYTES", prefix_bytes)
    query_lens, cached = [1, 127, 128, 0, 129, 5, 300, 64], [3, 1, 128, 9, 2000, 1000, 70, 3000]
    seq_lens = [query + prefix for query, prefix in zip(query_lens, cached, strict=True)]
    rows, scales = quantise_rows(make_rows(seq_lens, num_kv, dim, block_size, torch.float32), kv_dtype)
    for slot, length in zip(rows.row_slots.tolist(), seq_lens, strict=True):
        rows.block_table[slot, -(-length // block_size) :] = 2**30
    q = torch.randn(sum(query_lens), num_q, dim, device="cuda").to(dtype)
    check(rows, q, query_lens, window, 0.0, TOLERANCE[dtype], scales)
    assert not arrivals(q.device).any()
