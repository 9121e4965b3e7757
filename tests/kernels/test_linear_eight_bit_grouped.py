"""The 8-bit linear layer with a scale and a zero a group, against float64."""

import pytest
import torch

from octavo.kernels.linear import eight_bit_grouped
from octavo.kernels.linear.eight_bit_table import GROUPED_TOKEN_LIMITS
from octavo.kernels.reference import eight_bit as twin

ON_GPU = torch.cuda.is_available()
HALVES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]  # the interpreter's bf16 products are garbage


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", [(72, 192, 64, True), (48, 160, 32, False), (40, 256, 256, True)])
@pytest.mark.parametrize("tokens", [0, 1, 19] + [32, 33, 100, 130, 257, 1000] * ON_GPU)
def test_linear_w8a16_grouped(device, tokens, kind, half) -> None:
    rows, depth, group, has_zeros = kind
    weight = torch.randint(-128, 128, (rows, depth), dtype=torch.int8)
    scales = (torch.rand(rows, depth // group) + 0.5) / (70 * depth**0.5)
    zeros = torch.randint(-128, 129, scales.shape, dtype=torch.int16) if has_zeros else None
    bias = torch.randn(rows).to(half) if tokens % 2 else None
    x = torch.randn(tokens, depth + 8).to(half)[:, :depth]  # strided rows
    values = weight.double().view(rows, -1, group) - (0 if zeros is None else zeros.double().unsqueeze(-1))
    meant = (values * scales.double().unsqueeze(-1)).view(rows, depth)
    # Weights are rounded on their way to cuBLAS, so they are here.
    rounded = meant.to(half).double() if tokens > GROUPED_TOKEN_LIMITS[-1] else meant
    bias_ = 0 if bias is None else bias.double()
    on = [None if tensor is None else tensor.to(device) for tensor in (weight, scales, zeros, bias)]
    x_on = torch.empty(tokens, depth + 8, dtype=half, device=device)[:, :depth].copy_(x)
    out = eight_bit_grouped.linear_w8a16_grouped(x_on, *on)
    assert out.dtype == half and out.shape == (tokens, rows)
    rtol, atol = {torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 6e-3)}[half]  # outputs are about 1
    torch.testing.assert_close(out.double().cpu(), x.double() @ rounded.t() + bias_, rtol=rtol, atol=atol)
    twins = twin.linear_w8a16_grouped(x, weight, scales, zeros, bias).double()
    torch.testing.assert_close(twins, x.double() @ meant.t() + bias_, rtol=rtol, atol=atol)
