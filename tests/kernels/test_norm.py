"""The norm kernels against their twins in fp32."""

import pytest
import torch

from octavo.kernels.pointwise import norm
from octavo.kernels.reference import layers as reference

# One rounding of the output; fp32 leaves the order of the sum.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
HIDDEN = [1, 64, 576, 1000, 4096]


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_rms_norm(device, kernel_dtype, hidden, tokens, weight_dtype) -> None:
    x = torch.randn(tokens, hidden + 16, device=device).to(kernel_dtype)[:, :hidden]  # strided rows
    weight = torch.randn(hidden, device=device).to(weight_dtype or kernel_dtype)
    out = norm.rms_norm(x, weight, 1e-5)
    expected = reference.rms_norm(x.float(), weight.float(), 1e-5)
    assert out.dtype == kernel_dtype
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[kernel_dtype], rtol=TOLERANCE[kernel_dtype])


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_add_rms_norm(device, kernel_dtype, hidden, tokens) -> None:
    x = torch.randn(tokens, hidden, device=device).to(kernel_dtype)
    residual = torch.randn(tokens, hidden, device=device).to(kernel_dtype)
    weight = torch.randn(hidden, device=device).to(kernel_dtype)
    total = x + residual
    before = x.clone()
    out = norm.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)  # rounded as torch rounds it
    assert torch.equal(x, before)
    expected = reference.rms_norm(total.float(), weight.float(), 1e-5)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[kernel_dtype], rtol=TOLERANCE[kernel_dtype])
