"""The 16-bit linear layer of few tokens against float64 products."""

import pytest
import torch

from octavo.kernels.linear import dense
from octavo.kernels.linear.dense_table import DENSE_PLANS, DensePlan

ON_GPU = torch.cuda.is_available()
# Sums are kept in fp32: one rounding of the output remains, and what fp32 loses where large terms
# cancel.
TOLERANCE = {torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 2e-3)}
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]  # the interpreter's bf16 products are garbage

PLANS = [
    DensePlan("row", rows=4, tokens=1, splits=1, warps=4, depth=128),
    DensePlan("row", rows=2, tokens=2, splits=1, warps=4, depth=128),
    DensePlan("slices", rows=16, tokens=8, splits=1, warps=2, depth=32, ahead=2),
    DensePlan("slices", rows=32, tokens=16, splits=2, warps=4, depth=64, ahead=2, launch="late"),
    DensePlan("tiles", rows=64, tokens=16, splits=1, warps=4, depth=64, ahead=3),
    DensePlan("tiles", rows=64, tokens=32, splits=3, warps=4, depth=128, ahead=2, launch="late"),
]


def check(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    expected = x.double().cpu() @ weight.double().cpu().t()
    if bias is not None:
        expected += bias.double().cpu()
    rtol, atol = TOLERANCE[x.dtype]
    assert out.dtype == x.dtype
    torch.testing.assert_close(out.double().cpu(), expected, rtol=rtol, atol=atol)


CASES = [(plan, *shape, dtype) for plan in PLANS for shape in ((80, 136), (33, 512)) for dtype in DTYPES]
CASES += [(plan, 1000, 11008, torch.bfloat16) for plan in DENSE_PLANS if ON_GPU]


@pytest.mark.parametrize(("plan", "rows", "depth", "dtype"), CASES, ids=str)
def test_every_kernel_on_odd_and_even_shapes(device, plan, rows, depth, dtype) -> None:
    weight = (torch.randn(rows, depth + 8, device=device) / depth**0.5).to(dtype)[:, :depth]  # strided rows
    bias = torch.randn(rows, device=device).to(dtype)
    fewer = max(1, plan.tokens - 1)
    for tokens in {1, fewer, plan.tokens} if ON_GPU else {plan.tokens if plan.kernel == "row" else fewer}:
        x = torch.randn(tokens, depth + 8, device=device).to(dtype)[:, :depth]
        out = torch.empty(tokens, rows, dtype=dtype, device=device)
        dense.launch(x, weight, bias, out, plan)
        check(out, x, weight, bias)


@pytest.mark.parametrize("tokens", [0, 1, 20] + [2, 8, 16, 17, 32, 64, 65, 300] * ON_GPU)
def test_linear(device, tokens) -> None:
    rows, depth = (4096, 1024) if ON_GPU else (40, 72)
    for dtype in DTYPES:
        weight = (torch.randn(rows, depth, device=device) / depth**0.5).to(dtype)
        x = torch.randn(tokens, depth, device=device).to(dtype)
        out = dense.linear(x, weight)
        assert out.shape == (tokens, rows)
        check(out, x, weight, None)


def test_what_the_kernels_do_not_take_goes_to_torch(device) -> None:
    for dtype, depth in ((torch.float32, 64), (torch.float16, 65)):  # rows of 65 do not start on 16 bytes
        weight, x = torch.randn(24, depth, device=device).to(dtype), torch.randn(3, depth, device=device).to(dtype)
        assert torch.equal(dense.linear(x, weight), torch.nn.functional.linear(x, weight))
