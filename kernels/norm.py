"""RMSNorm, alone and with the residual addition in front: one program a token, the whole row in registers.

Two passes over the row would read it twice; hidden sizes up to 16384 fit one program, so it is read once and written
once. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    # pointers
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H], read and written if ADD
    weight_ptr,  # [H]
    out_ptr,  # [T, H]
    # strides, in elements
    x_stride,
    residual_stride,
    out_stride,
    eps,
    # meta-parameters
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two at or above HIDDEN
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        # The sum is rounded before it is normalised: the next layer reads the rounded one, and so do the twins.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + row * residual_stride + column, x, mask=inside)
    x = x.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    tl.store(out_ptr + row * out_stride + column, (x * inverse_rms * weight).to(out_ptr.dtype.element_ty), mask=inside)


def _num_warps(block: int) -> int:
    # 16 elements a thread = two 16-byte loads in flight a tensor in bf16; more warps only lengthen the reduction.
    return min(16, max(1, block // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` of x [T, H] (rows may be strided), weight [H]; returns [T, H] of x's dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    hidden = x.shape[1]
    block = triton.next_power_of_2(hidden)
    if x.shape[0]:
        _rms_norm_kernel[(x.shape[0],)](
            x,
            x,
            weight,
            out,
            x.stride(0),
            0,
            out.stride(0),
            eps,
            hidden,
            block,
            False,
            num_warps=_num_warps(block),
            enable_fp_fusion=True,
        )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual += x` in place, then its norm. x, residual [T, H] (rows may be strided); returns [T, H] of x's
    dtype.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    hidden = x.shape[1]
    block = triton.next_power_of_2(hidden)
    if x.shape[0]:
        _rms_norm_kernel[(x.shape[0],)](
            x,
            residual,
            weight,
            out,
            x.stride(0),
            residual.stride(0),
            out.stride(0),
            eps,
            hidden,
            block,
            True,
            num_warps=_num_warps(block),
            enable_fp_fusion=True,
        )
    return out
