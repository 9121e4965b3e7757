"""Quantisation to 8 bits, alone and in the epilogue of norm and activation, against the twins in
fp32.
"""

import pytest
import torch
from torch import Tensor

from octavo.kernels.pointwise import activation, norm, quantize
from octavo.kernels.reference import eight_bit as twin

# The interpreter's fp8 casts are wrong for some values: fp8 waits for a GPU.
EIGHT_BITS = [torch.int8] + [torch.float8_e4m3fn] * torch.cuda.is_available()
SIZES = [1, 576, 1000, 4096] + [11008, 28672] * torch.cuda.is_available()
TOKENS = [0, 5]


def random(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def assert_quantised(ours: tuple[Tensor, Tensor], twins: tuple[Tensor, Tensor]) -> None:
    """The same scales but for the order of a sum; every value the same or its neighbour, and few
    neighbours.

    A neighbour is right where the twin sits on the edge between two values, which a last bit of a
    norm decides.
    """
    (q, scale), (twin_q, twin_scale) = ours, twins
    assert q.dtype == twin_q.dtype and scale.dtype == torch.float32
    torch.testing.assert_close(scale, twin_scale, atol=0, rtol=1e-5)
    step = 1.0 if q.dtype == torch.int8 else 2**-9  # in units of q; of fp8: of its smallest numbers
    relative = 0.0 if q.dtype == torch.int8 else 0.126  # 3 bits of mantissa
    torch.testing.assert_close(q.float(), twin_q.float(), atol=step, rtol=relative)
    assert (q.float() != twin_q.float()).sum() <= 2 + q.numel() // 200


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", TOKENS)
def test_quantize_rows(device, kernel_dtype, rows, size, dtype) -> None:
    x = random(rows, size + 16, device=device, dtype=kernel_dtype)[:, :size]  # strided rows
    x[:, ::3] *= 1e-3
    if rows > 2:
        x[1] = 0
        x[2, 0] = 1e4  # an outlier: the rest becomes small
    q, scale = quantize.quantize_rows(x, dtype)
    assert_quantised((q, scale), twin.quantize_rows(x, dtype))
    if rows > 2:
        assert scale[1] == 0 and not q[1].float().any()


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("size", [100, 576])
def test_quantize_static(device, kernel_dtype, dtype, size) -> None:
    x = random(7, size + 16, device=device, dtype=kernel_dtype)[:, :size]  # strided rows
    x[3, 5], x[6, 99] = 1e4, float("nan")
    scale = torch.tensor([2.5 / twin.LARGEST[dtype]], device=device)  # some are beyond it
    q, scales = quantize.quantize_static(x, scale, dtype)
    twin_q, twin_scales = twin.quantize_static(x, scale, dtype)
    torch.testing.assert_close(q.float(), twin_q.float(), equal_nan=True, atol=0, rtol=0)
    torch.testing.assert_close(scales, twin_scales, equal_nan=True, atol=0, rtol=0)
    assert q[3, 5].float() == twin.LARGEST[dtype]
    lost = (q.float() * scales.unsqueeze(-1)).isnan().any(1)
    assert lost.tolist() == [False] * 6 + [True]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_dequantize_rows(device, kernel_dtype, dtype, per_tensor) -> None:
    q, scale = twin.quantize_rows(torch.randn(3, 4100, device=device), dtype)
    scale = scale[:1] if per_tensor else scale
    out = quantize.dequantize_rows(q, scale, kernel_dtype)
    assert torch.equal(out, twin.dequantize_rows(q, scale, kernel_dtype))


def test_integers_round_half_to_even(device) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5, 0.49]], device=device)
    q, scale = quantize.quantize_rows(x, torch.int8)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -126, 126, 0]]
    assert scale.tolist() == [1.0]


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_nan_and_infinity_reach_the_scale(device, dtype) -> None:
    x = torch.ones(4, 600, device=device)
    x[0, 7], x[1, 7], x[2, 7], x[3] = float("nan"), float("inf"), -float("nan"), 1e-42
    q, scale = quantize.quantize_rows(x, dtype)
    values = q.float() * scale.unsqueeze(1)
    assert values[:3].isnan().any(dim=1).all()
    assert values[3].isfinite().all()


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_rms_norm_quant(device, kernel_dtype, tokens, hidden, dtype) -> None:
    x = random(tokens, hidden + 16, device=device, dtype=kernel_dtype)[:, :hidden]
    weight = random(hidden, device=device, dtype=kernel_dtype)
    assert_quantised(norm.rms_norm_quant(x, weight, 1e-5, dtype), twin.rms_norm_quant(x, weight, 1e-5, dtype))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_add_rms_norm_quant(device, kernel_dtype, tokens, hidden, dtype) -> None:
    x = random(tokens, hidden, device=device, dtype=kernel_dtype)
    residual = random(tokens, hidden, device=device, dtype=kernel_dtype)
    weight = random(hidden, device=device, dtype=kernel_dtype)
    total, before = x + residual, x.clone()
    expected = twin.rms_norm_quant(total, weight, 1e-5, dtype)
    assert_quantised(norm.add_rms_norm_quant(x, residual, weight, 1e-5, dtype), expected)
    assert torch.equal(residual, total) and torch.equal(x, before)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_activations_that_quantise(device, kernel_dtype, tokens, size, dtype) -> None:
    x = 4 * random(tokens, 2 * size, device=device, dtype=kernel_dtype)
    assert_quantised(activation.silu_and_mul_quant(x, dtype), twin.silu_and_mul_quant(x, dtype))
    if size > 1:  # alone in its row a GELU near zero is its own scale, and the two forms of it differ there
        assert_quantised(activation.gelu_tanh_and_mul_quant(x, dtype), twin.gelu_tanh_and_mul_quant(x, dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_twin_keeps_half_a_step(dtype) -> None:
    x = torch.randn(4, 64)
    q, scale = twin.quantize_rows(x, dtype)
    assert q.float().abs().amax() == twin.LARGEST[dtype]
    error = (q.float() * scale.unsqueeze(1) - x).abs()
    step = scale.unsqueeze(1) if dtype == torch.int8 else (x.abs() / 8).maximum(scale.unsqueeze(1) * 2**-9)
    assert (error <= 0.5001 * step).all()
