"""Quantisation of rows to 8 bits, each with its own scale: a weight's output channels once at load,
and activations whose producer could not do it in its epilogue (those of `norm.py` and
`activation.py` can).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launch import has_pdl, let_successor_start, wait_for_inputs
from octavo.kernels.reference.eight_bit import LARGEST


@triton.jit
def scale_to_8_bits(x, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """x [BLOCK] fp32 (zero outside the row) as (values of `dtype`, scale): the twin is
    `reference/eight_bit.py`'s `quantize_rows`.
    """
    # Magnitudes order like their bits, with NaN above infinity: so a NaN reaches the scale; int8
    # could not carry it.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    largest = bits.to(tl.float32, bitcast=True)
    scaled = x * tl.div_rn(LARGEST, tl.maximum(largest, 1e-35))  # the bound keeps a row of zeros finite
    if dtype == tl.int8:
        # Adding 1.5 * 2^23 leaves no bits behind the point, and the sum is rounded half to even.
        return ((scaled + 12582912.0) - 12582912.0).to(tl.int8), tl.div_rn(largest, LARGEST)
    return scaled.to(dtype), tl.div_rn(largest, LARGEST)


@triton.jit
def _quantize_kernel(
    # pointers
    x_ptr,  # [R, K]
    q_ptr,  # [R, K] int8 or fp8
    scale_ptr,  # [R] fp32
    x_stride,  # in elements
    # meta-parameters
    SIZE: tl.constexpr,  # K
    BLOCK: tl.constexpr,  # the power of two at or above K
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    wait_for_inputs(PDL)
    let_successor_start(PDL)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    q, scale = scale_to_8_bits(x, LARGEST, q_ptr.dtype.element_ty)
    tl.store(q_ptr + row * SIZE + column, q, mask=inside)
    tl.store(scale_ptr + row, scale)


def row_warps(block: int) -> int:
    """Warps for a row of `block` in registers: 16 elements a thread, and never more than a program
    may have.
    """
    return min(32, max(1, block // 512))


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [R, K] (rows may be strided) as (q [R, K] of `dtype`, int8 or float8_e4m3fn; scale [R]
    fp32).
    """
    rows, size = x.shape
    q = torch.empty((rows, size), dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(size)
        pdl = has_pdl(x.device)
        _quantize_kernel[(rows,)](
            x, q, scale, x.stride(0), size, block, LARGEST[dtype], pdl, num_warps=row_warps(block), launch_pdl=pdl
        )
    return q, scale


@triton.jit
def _quantize_static_kernel(
    # pointers
    x_ptr,  # [R, K]
    scale_ptr,  # [1] fp32
    q_ptr,  # [R, K] int8 or fp8
    row_scale_ptr,  # [R] fp32, written if int8
    x_stride,  # in elements
    # meta-parameters
    SIZE: tl.constexpr,  # K
    BLOCK: tl.constexpr,  # the power of two at or above K
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    scale = tl.load(scale_ptr)
    wait_for_inputs(PDL)
    let_successor_start(PDL)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.div_rn(x, scale)
    scaled = tl.where(scaled > LARGEST, LARGEST, tl.where(scaled < -LARGEST, -LARGEST, scaled))  # NaN stays
    if q_ptr.dtype.element_ty == tl.int8:
        lost = scaled != scaled
        # Half to even, as in `scale_to_8_bits`.
        scaled = (tl.where(lost, 0.0, scaled) + 12582912.0) - 12582912.0
        any_lost = tl.max(lost.to(tl.int32), axis=0) > 0
        tl.store(row_scale_ptr + row, tl.where(any_lost, float("nan"), scale))
    tl.store(q_ptr + row * SIZE + column, scaled.to(q_ptr.dtype.element_ty), mask=inside)


def quantize_static(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [R, K] (rows may be strided) in units of scale [1] fp32 as (q [R, K] of `dtype`, its
    scales: `scale` for float8_e4m3fn, [R] for int8, NaN where a row has NaN).
    """
    rows, size = x.shape
    q = torch.empty((rows, size), dtype=dtype, device=x.device)
    row_scale = torch.empty(rows, dtype=torch.float32, device=x.device) if dtype == torch.int8 else scale
    if rows:
        block = triton.next_power_of_2(size)
        pdl = has_pdl(x.device)
        _quantize_static_kernel[(rows,)](
            x,
            scale,
            q,
            row_scale,
            x.stride(0),
            size,
            block,
            LARGEST[dtype],
            pdl,
            num_warps=row_warps(block),
            launch_pdl=pdl,
        )
    return q, row_scale


@triton.jit
def _dequantize_kernel(
    # pointers
    q_ptr,  # [R, K] int8 or fp8
    scale_ptr,  # [R] or [1] fp32
    out_ptr,  # [R, K]
    scale_stride,
    size,  # K
    # meta-parameters
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    q = tl.load(q_ptr + row * size + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    scale = tl.load(scale_ptr + row * scale_stride)
    tl.store(out_ptr + row * size + column, (q * scale).to(out_ptr.dtype.element_ty), mask=inside)


def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`q * scale` [R, K] of `dtype` from q [R, K] int8 or float8_e4m3fn and scale [R] or [1] fp32."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    block = 4096
    grid = (q.shape[0], triton.cdiv(q.shape[1], block))
    _dequantize_kernel[grid](q, scale, out, 0 if scale.numel() == 1 else 1, q.shape[1], block, num_warps=8)
    return out
