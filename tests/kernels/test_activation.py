"""The activation kernels against their twins in fp64."""

import pytest
import torch

from octavo.kernels.pointwise import activation
from octavo.kernels.reference import layers as reference

# One rounding of the output; fp32 has that of its exponential.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize("size", [1, 24, 1024, 1536, 1030])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_gated_activation(device, kernel_dtype, name, size, tokens) -> None:
    x = 4 * torch.randn(tokens, 2 * size, device=device)
    x[:, ::7] *= 30  # where the exponentials saturate
    x = x.to(kernel_dtype)
    out = getattr(activation, name)(x)
    expected = getattr(reference, name)(x.double()).float()
    assert out.dtype == kernel_dtype
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[kernel_dtype], rtol=TOLERANCE[kernel_dtype])
