"""The gated activations of an MLP: act(gate) * up over the fused gate-and-up projection, rounded to
the model's dtype or quantised to 8 bits.

Both in fp32, rounded once. Source of the tanh form: Hendrycks and Gimpel, "Gaussian Error Linear
Units" (2016), section 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launch import has_pdl, let_successor_start, wait_for_inputs
from octavo.kernels.pointwise.quantize import row_warps, scale_to_8_bits
from octavo.kernels.reference.eight_bit import LARGEST

# 1024 outputs by 4 warps: 8 a thread, so both loads and the store are 16 bytes wide in bf16. One
# token of 14336 makes 14 programs, which is latency-bound whatever the block; 2048 tokens make 28
# thousand.
_BLOCK = 1024


@triton.jit
def _gated(gate, GELU: tl.constexpr):
    if GELU:
        # 0.5 * (1 + tanh(z)) = sigmoid(2 * z), with z = sqrt(2 / pi) * (gate + 0.044715 * gate^3)
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return gate * tl.sigmoid(gate)


@triton.jit
def _act_and_mul_kernel(
    # pointers
    x_ptr,  # [T, 2 * I] = (gate | up)
    out_ptr,  # [T, I]
    # strides, in elements
    x_stride,
    out_stride,
    # meta-parameters
    SIZE: tl.constexpr,  # I
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,  # starts while its predecessor ends, and lets its successor do so
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    wait_for_inputs(PDL)
    let_successor_start(PDL)
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    gated = _gated(gate, GELU)
    tl.store(out_ptr + row * out_stride + column, (gated * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _act_and_mul_quant_kernel(
    # pointers
    x_ptr,  # [T, 2 * I] = (gate | up)
    q_ptr,  # [T, I] int8 or fp8
    scale_ptr,  # [T] fp32
    x_stride,  # in elements
    # meta-parameters
    SIZE: tl.constexpr,  # I
    BLOCK: tl.constexpr,  # the power of two at or above I: the scale needs the whole row before anything is written
    LARGEST: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    wait_for_inputs(PDL)
    let_successor_start(PDL)
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    q, scale = scale_to_8_bits(_gated(gate, GELU) * up, LARGEST, q_ptr.dtype.element_ty)
    tl.store(q_ptr + row * SIZE + column, q, mask=inside)
    tl.store(scale_ptr + row, scale)


def _act_and_mul(x: Tensor, gelu: bool) -> Tensor:
    tokens, size = x.shape[0], x.shape[1] // 2
    out = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
    if tokens:
        grid = (tokens, triton.cdiv(size, _BLOCK))
        pdl = has_pdl(x.device)
        _act_and_mul_kernel[grid](
            x,
            out,
            x.stride(0),
            out.stride(0),
            size,
            _BLOCK,
            gelu,
            pdl,
            num_warps=4,
            enable_fp_fusion=True,
            launch_pdl=pdl,
        )
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(gate) * up` [T, I] of x [T, 2 * I] = (gate | up), whose rows may be strided."""
    return _act_and_mul(x, gelu=False)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """`gelu_tanh(gate) * up` [T, I] of x [T, 2 * I] = (gate | up), whose rows may be strided."""
    return _act_and_mul(x, gelu=True)


def silu_and_mul_quant(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`silu(gate) * up` of x [T, 2 * I] = (gate | up), whose rows may be strided, quantised: (q [T,
    I] of `dtype`, int8 or float8_e4m3fn; scale [T] fp32).
    """
    return _act_and_mul_quant(x, dtype, gelu=False)


def gelu_tanh_and_mul_quant(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`gelu_tanh(gate) * up` of x [T, 2 * I] = (gate | up), quantised as `silu_and_mul_quant`
    does.
    """
    return _act_and_mul_quant(x, dtype, gelu=True)


def _act_and_mul_quant(x: Tensor, dtype: torch.dtype, gelu: bool) -> tuple[Tensor, Tensor]:
    tokens, size = x.shape[0], x.shape[1] // 2
    q = torch.empty((tokens, size), dtype=dtype, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens:
        block = triton.next_power_of_2(size)
        pdl = has_pdl(x.device)
        _act_and_mul_quant_kernel[(tokens,)](
            x,
            q,
            scale,
            x.stride(0),
            size,
            block,
            LARGEST[dtype],
            gelu,
            pdl,
            num_warps=row_warps(block),
            enable_fp_fusion=True,
            launch_pdl=pdl,
        )
    return q, scale
