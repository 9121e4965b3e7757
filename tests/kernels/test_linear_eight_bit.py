"""The 8-bit linears against their twins (on the CPU in fp32 and fp64)."""

import itertools

import pytest
import torch
from torch import Tensor

from octavo.kernels.arrivals import MAX_ARRIVALS
from octavo.kernels.linear import eight_bit
from octavo.kernels.linear.eight_bit_table import Gemv, Library, Matmul, Tile, Warps, choose
from octavo.kernels.reference import eight_bit as twin

ON_GPU = torch.cuda.is_available()
# The interpreter's bf16 products are garbage, and so are some of its fp8 casts.
HALVES = [torch.float16] + [torch.bfloat16] * ON_GPU
EIGHT_BITS = [torch.int8] + [torch.float8_e4m3fn] * ON_GPU
# fp32 sums, one rounding of the output; the matrix unit keeps about 13 bits of an fp8 product's
# sum.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}

# tokens, channels, size: one each side of the blocks, sizes that no block divides, an unaligned
# one.
SHAPES = [(1, 64, 256), (1, 70, 528), (3, 130, 144), (8, 48, 1040), (17, 96, 272), (33, 65, 100), (70, 130, 528)]
LARGE = [(1, 4096, 4096), (8, 4096, 11008), (16, 6144, 4096), (65, 4096, 4096), (130, 1024, 11008), (300, 1536, 1536)]
LARGE += [(1, 576, 576), (9, 49152, 576), (1000, 1024, 4096), (1024, 1024, 2048), (1, 28672, 8192), (2048, 512, 4096)]


def eight_bits(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return twin.quantize_rows(torch.randn(rows, size), dtype)


def assert_close(out: Tensor, expected: Tensor) -> None:
    """Within a rounding of the output and a rounding of its neighbours' magnitude: sums cancel,
    their terms do not.
    """
    spread = expected.float().square().mean().sqrt().item()
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.cpu().float(), expected.float(), atol=tolerance * spread, rtol=tolerance)


def check_w8a16(
    device: str, shape: tuple[int, int, int], dtype: torch.dtype, half: torch.dtype, bias: bool, per_tensor: bool
) -> None:
    tokens, channels, size = shape
    weight, scale = eight_bits(channels, size, dtype)
    scale = scale[:1] if per_tensor else scale
    x = torch.randn(tokens, size + 16).to(half)[:, :size]
    b = torch.randn(channels).to(half) if bias else None
    on = [None if t is None else t.to(device) for t in (x, weight, scale, b)]
    on[0] = torch.empty(tokens, size + 16, dtype=half, device=device)[:, :size].copy_(x)  # strided rows
    out = eight_bit.linear_w8a16(*on)
    assert out.dtype == half and out.shape == (tokens, channels)
    if isinstance(choose(dtype, False, tokens, channels, size), Library):
        # The weights are rounded on their way to cuBLAS, so they are here.
        weight, scale = twin.dequantize_rows(weight, scale, half), torch.ones(1)
    assert_close(out, twin.linear_w8a16(x, weight, scale, b))


def check_w8a8(
    device: str, shape: tuple[int, int, int], dtype: torch.dtype, half: torch.dtype, bias: bool, per_tensor: bool
) -> None:
    tokens, channels, size = shape
    weight, scale = eight_bits(channels, size, dtype)
    x, x_scale = eight_bits(tokens, size, dtype)
    scale, x_scale = (scale[:1], x_scale[:1]) if per_tensor else (scale, x_scale)
    b = torch.randn(channels).to(half) if bias else None
    on = [t.to(device) for t in (x, x_scale, weight, scale)]
    out = eight_bit.linear_w8a8(*on, half, None if b is None else b.to(device))
    assert out.dtype == half and out.shape == (tokens, channels)
    assert_close(out, twin.linear_w8a8(x, x_scale, weight, scale, half, b))


@pytest.mark.parametrize("check", [check_w8a16, check_w8a8])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("shape", SHAPES + LARGE * ON_GPU)
def test_linear(device, check, shape, dtype, half) -> None:
    torch.manual_seed(0)
    check(device, shape, dtype, half, bias=shape[0] % 2 == 1, per_tensor=shape[0] == 8)


def test_table_chooses_kernels_that_serve() -> None:
    shapes = [(12288, 4096), (4096, 4096), (8192, 28672), (576, 576), (128256, 8192)]
    for dtype in (torch.int8, torch.float8_e4m3fn):
        for w8a8, tokens, (channels, size) in itertools.product((False, True), range(1, 1200, 7), shapes):
            config = choose(dtype, w8a8, tokens, channels, size)
            if isinstance(config, Gemv):
                assert tokens == 1 and not w8a8
            assert w8a8 or not isinstance(config, Matmul)
            if isinstance(config, Tile):
                tiles = -(-channels // config.block_n) * -(-tokens // config.block_m)
                assert config.parts == 1 or tiles <= MAX_ARRIVALS


def test_no_tokens(device) -> None:
    weight, scale = torch.zeros(64, 256, dtype=torch.int8, device=device), torch.ones(64, device=device)
    x = torch.zeros(0, 256, dtype=torch.float16, device=device)
    assert eight_bit.linear_w8a16(x, weight, scale).shape == (0, 64)
    out = eight_bit.linear_w8a8(x.to(torch.int8), scale[:0], weight, scale, torch.float16)
    assert out.shape == (0, 64) and out.dtype == torch.float16


CONFIGS = [
    Gemv(block_n=4, block_k=128, warps=1, stages=3, pdl=True),
    Warps(block_m=8, block_n=16, block_k=256, warps=4, stages=3, pdl=True),
    Warps(block_m=16, block_n=32, block_k=128, warps=2, stages=2, pdl=False),
    Matmul(block_m=64, block_n=32, block_k=64, warps=4, stages=3, pdl=False),
    Tile(block_m=16, block_n=64, block_k=64, warps=4, stages=3, parts=1, pdl=False),
    Tile(block_m=32, block_n=64, block_k=64, warps=4, stages=3, parts=3, pdl=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("w8a8", [False, True])
def test_every_kernel(device, monkeypatch, config, dtype, w8a8) -> None:
    """Each kernel at each edge, whatever the table says of the shape."""
    if isinstance(config, Gemv if w8a8 else Matmul):
        pytest.skip("not what this kernel is for")
    monkeypatch.setattr(eight_bit, "choose", lambda *_: config)
    shapes = [(1, 65, 200)] if isinstance(config, Gemv) else [(1, 65, 200), (19, 130, 528)]
    for shape in shapes:
        for _ in range(2):  # the counters are back at zero
            check = check_w8a8 if w8a8 else check_w8a16
            check(device, shape, dtype, torch.float16, bias=True, per_tensor=False)


@pytest.mark.skipif(not ON_GPU, reason="torch multiplies fp8 on GPUs only")
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_library(device, monkeypatch, dtype, half, per_tensor) -> None:
    """torch where it serves, else a kernel: int8 with quantised activations, fp16 from a scale a
    row.
    """
    monkeypatch.setattr(eight_bit, "choose", lambda *_: Library())
    for check in (check_w8a16, check_w8a8):
        check(device, (300, 512, 1024), dtype, half, bias=True, per_tensor=per_tensor)


def test_split_is_the_same_whenever_parts_arrive(device, monkeypatch) -> None:
    monkeypatch.setattr(eight_bit, "choose", lambda *_: CONFIGS[-1])
    size = 4096 if ON_GPU else 512
    weight, scale = eight_bits(size, size, torch.int8)
    x = torch.randn(16, size).half().to(device)
    weight, scale = weight.to(device), scale.to(device)
    first = eight_bit.linear_w8a16(x, weight, scale)
    assert all(torch.equal(eight_bit.linear_w8a16(x, weight, scale), first) for _ in range(20 if ON_GPU else 1))


def test_nan_stays_in_its_token(device) -> None:
    weight, scale = eight_bits(64, 256, torch.int8)
    for tokens in (5, 40):
        x = torch.randn(tokens, 256).half()
        x[2, 100] = float("nan")
        out = eight_bit.linear_w8a16(x.to(device), weight.to(device), scale.to(device)).cpu()
        assert out[2].isnan().all()
        assert not out[[row for row in range(tokens) if row != 2]].isnan().any()
