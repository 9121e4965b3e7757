"""RMSNorm, alone and with the residual addition in front, rounded to the model's dtype or quantised
to 8 bits: one program a token, the whole row in registers.

Two passes over the row would read it twice; hidden sizes up to 16384 fit one program, so it is read
once and written once. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019),
equation 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launch import has_pdl, let_successor_start, wait_for_inputs
from octavo.kernels.pointwise.quantize import scale_to_8_bits
from octavo.kernels.reference.eight_bit import LARGEST


@triton.jit
def _rms_norm_kernel(
    # pointers
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H], read and written if ADD
    weight_ptr,  # [H]
    out_ptr,  # [T, H]
    scale_ptr,  # [T] fp32, written if LARGEST
    # strides, in elements
    x_stride,
    residual_stride,
    out_stride,
    eps,
    # meta-parameters
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two at or above HIDDEN
    ADD: tl.constexpr,
    LARGEST: tl.constexpr,  # the largest magnitude of an 8-bit output; 0: the output is not quantised
    PDL: tl.constexpr,  # starts while its predecessor ends, and lets its successor do so
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    let_successor_start(PDL)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        # The sum is rounded before it is normalised: the next layer reads the rounded one, and so
        # do the twins.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + row * residual_stride + column, x, mask=inside)
    x = x.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    normed = x * inverse_rms * weight
    if LARGEST > 0:
        normed, scale = scale_to_8_bits(normed, LARGEST, out_ptr.dtype.element_ty)
        tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * out_stride + column, normed.to(out_ptr.dtype.element_ty), mask=inside)


def _num_warps(block: int) -> int:
    # 16 elements a thread = two 16-byte loads in flight a tensor in bf16; more warps only lengthen
    # the reduction.
    return min(16, max(1, block // 512))


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The output [T, H] of `dtype`, and its scales [T] if that has 8 bits (else nobody wrote or
    reads them).
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    largest = LARGEST.get(dtype, 0.0)
    scale = torch.empty(x.shape[0] if largest else 0, dtype=torch.float32, device=x.device)
    tokens, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    pdl = has_pdl(x.device)
    if tokens:
        _rms_norm_kernel[(tokens,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            scale if largest else out,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            eps,
            hidden,
            block,
            residual is not None,
            largest,
            pdl,
            num_warps=_num_warps(block),
            enable_fp_fusion=True,
            launch_pdl=pdl,
        )
    return out, scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` of x [T, H] (rows may be strided), weight [H]; returns [T, H] of x's
    dtype.
    """
    return _launch(x, None, weight, eps, x.dtype)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual += x` in place, then its norm. x, residual [T, H] (rows may be strided); returns
    [T, H] of x's dtype.
    """
    return _launch(x, residual, weight, eps, x.dtype)[0]


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm of x [T, H] (rows may be strided), quantised: (q [T, H] of `dtype`, int8 or
    float8_e4m3fn; scale [T] fp32).
    """
    return _launch(x, None, weight, eps, dtype)


def add_rms_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`residual += x` in place, then `rms_norm_quant(residual)`. x, residual [T, H] (rows may be
    strided).
    """
    return _launch(x, residual, weight, eps, dtype)
