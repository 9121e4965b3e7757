"""Linear layers with their neighbours fused, against the ops one by one."""

import pytest
import torch

from octavo.kernels.reference import fused

fused_gemv = pytest.importorskip("octavo.kernels.linear.fused_gemv")

# Of the highest value: a sum of up to 11,008 products in another order, and one rounding of the result and of each
# intermediate, which lie at half a unit of their own.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [(12, 512), (10, 300), (6, 8), (9, 2500)]  # channels (of gate and of up), K: no multiples of any tile
LARGE = [(4096, 4096), (12288, 4096), (4096, 11008), (1000, 28672)]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(rows: int, channels: int, size: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """x as every second row of a wider tensor, norm, weight of 2 x channels, residual."""
    tensors = [random(0, 2 * rows, size)[::2], random(1, size), random(2, 2 * channels, size) / size**0.5]
    return [tensor.to(dtype).to(device) for tensor in (*tensors, random(3, rows, channels))]


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype or want.dtype == torch.float32
    error = (got.float().cpu() - want.float()).abs().max() / want.float().abs().max()
    assert error <= TOLERANCES[got.dtype]


def check_all(rows: int, channels: int, size: int, device: str, dtype: torch.dtype) -> None:
    x, norm, weight, residual = operands(rows, channels, size, device, dtype)
    # The twin on the CPU, in fp32, from the same rounded operands.
    x_, norm_, weight_, residual_ = (tensor.cpu().float() for tensor in (x, norm, weight, residual))
    check(fused_gemv.norm_linear(x, norm, weight, 1e-5), fused.norm_linear(x_, norm_, weight_, 1e-5))
    check(fused_gemv.norm_linear_silu(x, norm, weight, 1e-5), fused.norm_linear_silu(x_, norm_, weight_, 1e-5))
    check(fused_gemv.linear_silu(x, weight), fused.linear_silu(x_, weight_))
    fused_gemv.linear_add(x, weight[:channels], residual)
    fused.linear_add(x_, weight_[:channels], residual_)
    check(residual, residual_)


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize(("channels", "size"), SHAPES)
def test_against_the_ops_one_by_one(rows, channels, size, kernel_dtype, device):
    check_all(rows, channels, size, device, kernel_dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="shapes for a GPU")
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(("channels", "size"), LARGE)
def test_model_shapes(rows, channels, size, kernel_dtype, device):
    check_all(rows, channels, size, device, kernel_dtype)


@pytest.mark.parametrize("rows", [1, 4])
def test_residual_with_strided_rows(rows, device):
    x, _, weight, residual = operands(rows, 40, 300, device, torch.float32)
    wide = torch.full((rows, 100), 7.0, device=device)
    wide[:, 20:60] = residual
    fused_gemv.linear_add(x, weight[:40], wide[:, 20:60])
    fused.linear_add(x.cpu(), weight[:40].cpu(), residual := residual.cpu())
    check(wide[:, 20:60], residual)
    assert (wide[:, :20] == 7).all()
    assert (wide[:, 60:] == 7).all()


def test_no_rows_and_too_many(device):
    x, norm, weight, _ = operands(5, 40, 64, device, torch.float32)
    assert fused_gemv.norm_linear(x[:0], norm, weight, 1e-5).shape == (0, 80)
    with pytest.raises(ValueError, match="5 rows, at most 4"):
        fused_gemv.norm_linear(x, norm, weight, 1e-5)


def test_launched_one_after_another(device):
    """Each launch may start before the one in front has finished; a chain of them is still the chain."""
    x, norm, weight, _ = operands(1, 32, 32, device, torch.float32)
    weights = [weight[:32], weight[32:]] * 6
    chain, expected = x.clone(), x.cpu().clone()
    for one in weights:
        fused_gemv.linear_add(fused_gemv.norm_linear(chain, norm, one, 1e-5), one, chain)
        one = one.cpu()
        fused.linear_add(fused.norm_linear(expected, norm.cpu(), one, 1e-5), one, expected)
    check(chain, expected)
