"""Linears with int8 weights that have a scale, and perhaps a zero, for each row and group of k:
GPTQ's and compressed-tensors' 8-bit checkpoints with groups.

A plain product of tiles, and not tuned: with few tokens there are few programs. For more tokens than
the last of `GROUPED_TOKEN_LIMITS` the weight is dequantised for cuBLAS.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launch import has_pdl, let_successor_start, wait_for_inputs
from octavo.kernels.linear.eight_bit_table import GROUPED_TOKEN_LIMITS


@triton.jit
def _less_zeros(weight, zero_ptrs, mask, ZEROS: tl.constexpr, dtype: tl.constexpr):
    """Numbers [n, k] of a group less their zeros: whole numbers of at most 255, which bf16 has."""
    numbers = weight.to(dtype)
    if ZEROS:
        numbers -= tl.load(zero_ptrs, mask=mask, other=0).to(dtype)[:, None]
    return numbers


@triton.jit(do_not_specialize=["num_tokens"])
def _grouped_kernel(
    # pointers
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K] int8
    scale_ptr,  # [N, K / GROUP] fp32
    zero_ptr,  # [N, K / GROUP] int16, read if ZEROS
    bias_ptr,  # [N], read if BIAS
    out_ptr,  # [M, N]
    x_stride,  # in elements
    # dimensions
    num_tokens,  # M
    N,
    # meta-parameters
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,  # of k a round, divides GROUP
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offset = tl.arange(0, STEP)
    inside = n < N
    row = tl.minimum(n, N - 1).to(tl.int64)
    weight_ptrs = weight_ptr + row[:, None] * K + offset[None, :]
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_stride + offset[None, :]
    groups = row * (K // GROUP)
    wait_for_inputs(PDL)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in tl.range(0, K, STEP, num_stages=STAGES):
        weight = tl.load(weight_ptrs + k, eviction_policy="evict_first")
        x = tl.load(x_ptrs + k, mask=(m < num_tokens)[:, None], other=0.0)
        scale = tl.load(scale_ptr + groups + k // GROUP)
        numbers = _less_zeros(weight, zero_ptr + groups + k // GROUP, inside, ZEROS, dtype)
        sums += tl.dot(numbers, tl.trans(x)) * scale[:, None]
    let_successor_start(PDL)
    if BIAS:
        sums += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    pointers = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(pointers, sums.to(dtype), mask=inside[:, None] & (m < num_tokens)[None, :])


@triton.jit
def _dequantise_kernel(
    # pointers
    weight_ptr,  # [N, K] int8
    scale_ptr,  # [N, K / GROUP] fp32
    zero_ptr,  # [N, K / GROUP] int16, read if ZEROS
    out_ptr,  # [N, K]
    # meta-parameters
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    values = tl.load(weight_ptr + row * K + k, mask=inside, other=0, eviction_policy="evict_first").to(tl.float32)
    at = row * (K // GROUP) + k // GROUP
    if ZEROS:
        values -= tl.load(zero_ptr + at, mask=inside, other=0).to(tl.float32)
    values *= tl.load(scale_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + row * K + k, values.to(out_ptr.dtype.element_ty), mask=inside)


def dequantise(weight: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`(weight - zeros) * scales` [N, K] of `dtype`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    block = 2048
    group = weight.shape[1] // scales.shape[1]
    _dequantise_kernel[(weight.shape[0], triton.cdiv(weight.shape[1], block))](
        weight, scales, scales if zeros is None else zeros, out, weight.shape[1], group, zeros is not None, block
    )
    return out


def linear_w8a16_grouped(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`x @ ((weight - zeros) * scales)^T + bias`: x [M, K] bf16/fp16 (rows may be strided), weight
    [N, K] int8, scales [N, groups] fp32, zeros [N, groups] int16 or None for 0 everywhere, bias
    [N]; returns [M, N] of x's dtype. A group is a multiple of 32 inputs.
    """
    tokens, depth = x.shape
    rows = weight.shape[0]
    if tokens > GROUPED_TOKEN_LIMITS[-1]:
        return F.linear(x, dequantise(weight, scales, zeros, x.dtype), bias)
    out = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    group = depth // scales.shape[1]
    block_m = next(most for most in GROUPED_TOKEN_LIMITS if tokens <= most or most == 128)
    block_n = 32 if block_m == 16 else 64
    step = next(step for step in (128, 64, 32) if group % step == 0)
    pdl = has_pdl(x.device)
    _grouped_kernel[(triton.cdiv(rows, block_n), triton.cdiv(tokens, block_m))](
        x,
        weight,
        scales,
        scales if zeros is None else zeros,
        out if bias is None else bias,
        out,
        x.stride(0),
        tokens,
        rows,
        depth,
        group,
        zeros is not None,
        bias is not None,
        block_m,
        block_n,
        step,
        4,
        pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    return out
