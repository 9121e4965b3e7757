"""The plain-PyTorch twins of the 8-bit ops: quantisation, norm and activation that quantise, and
the linears.

An 8-bit tensor is `(q, scale)` with `value = q * scale`: q int8 (-127 .. 127) or fp8 e4m3 (-448 ..
448), scale fp32, one for each row of q ([rows]: a weight's output channel, an activation's token)
or one for all ([1]). Everything is computed in fp32 and rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# The largest magnitude of each 8-bit type. -128 is left out: the scale is symmetric.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [R, K] as (q [R, K] of `dtype`, scale [R] fp32): the largest magnitude of a row becomes the
    type's largest.

    Integers round half to even. A row of zeros gets scale 0, a row with NaN the scale NaN.
    """
    x = x.float()
    largest = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    # Of two tensors: a number divided by a tensor is the number times the tensor's rounded
    # reciprocal.
    scaled = x * (largest.new_tensor(LARGEST[dtype]) / largest.clamp(min=1e-35)).unsqueeze(1)
    q = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    return q, largest / LARGEST[dtype]


def quantize_static(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [R, K] in units of scale [1] fp32 as (q [R, K] of `dtype`, its scales): what is beyond the
    type's largest magnitude becomes that. fp8 keeps NaN, and the scale is the given one; int8
    cannot, so there each row has a scale [R], which is NaN where the row has NaN.
    """
    scaled = (x.float() / scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    if dtype != torch.int8:
        return scaled.to(dtype), scale
    lost = scaled.isnan().any(dim=1)
    return scaled.nan_to_num(0.0).round().to(dtype), torch.where(lost, float("nan"), scale)


def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`q * scale` [R, K], computed in fp32: q [R, K] int8 or fp8, scale [R] or [1]."""
    return (q.float() * scale.unsqueeze(1)).to(dtype)


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantize_rows(rms_norm(x, weight))` of x [T, H], with the norm's output not rounded in
    between.
    """
    return quantize_rows(F.rms_norm(x.float(), weight.shape, weight.float(), eps), dtype)


def add_rms_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`residual += x` in place (rounded to its dtype), then `rms_norm_quant(residual)`. x, residual
    [T, H].
    """
    return rms_norm_quant(residual.add_(x), weight, eps, dtype)


def silu_and_mul_quant(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantize_rows(silu(gate) * up)` of x [T, 2 * I] = (gate | up), with the product not rounded
    in between.
    """
    gate, up = x.float().chunk(2, dim=-1)
    return quantize_rows(F.silu(gate) * up, dtype)


def gelu_tanh_and_mul_quant(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantize_rows(gelu_tanh(gate) * up)` of x [T, 2 * I] = (gate | up), with the product not
    rounded in between.
    """
    gate, up = x.float().chunk(2, dim=-1)
    return quantize_rows(F.gelu(gate, approximate="tanh") * up, dtype)


def linear_w8a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ (weight * weight_scale)^T + bias`: x [M, K] bf16/fp16, weight [N, K] int8 or fp8,
    weight_scale [N] or [1], bias [N]; returns [M, N] of x's dtype.
    """
    out = (x.float() @ weight.float().t()) * weight_scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_w8a16_grouped(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`x @ ((weight - zeros) * scales)^T + bias` with a scale and a zero for each row and group of
    consecutive k: x [M, K] bf16/fp16, weight [N, K] int8, scales [N, groups] fp32, zeros [N,
    groups] int16 or None for 0 everywhere, bias [N]; returns [M, N] of x's dtype.
    """
    values = weight.float().view(*scales.shape, -1)
    if zeros is not None:
        values = values - zeros.unsqueeze(-1)
    out = x.float() @ (values * scales.unsqueeze(-1)).view(weight.shape).t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_w8a8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """`(x * x_scale) @ (weight * weight_scale)^T + bias`: x [M, K] and weight [N, K] both int8 or
    both fp8, x_scale [M] or [1], weight_scale [N] or [1], bias [N]; returns [M, N] of out_dtype.
    """
    # Products of int8 are whole numbers: past 2^24 (K > 1040 at the extremes) fp32 would round
    # them, fp64 never does.
    wide = torch.float64 if x.dtype == torch.int8 else torch.float32
    out = (x.to(wide) @ weight.to(wide).t()).float() * x_scale.unsqueeze(1) * weight_scale
    return (out if bias is None else out + bias.float()).to(out_dtype)
