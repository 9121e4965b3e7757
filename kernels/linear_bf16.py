"""Linear layers with 16-bit weights and few tokens: weights x tokens on the tensor cores."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.linear_int4 import _finish, arrivals


@triton.jit(do_not_specialize=["M"])
def _tiles_kernel(
    # pointers
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N], read if BIAS
    out_ptr,  # [M, N]
    partial_ptr,
    arrivals_ptr,
    # dimensions
    M,
    N,
    x_stride,
    weight_stride,
    # meta-parameters
    K: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    CHUNK: tl.constexpr = (K + SPLITS * DEPTH - 1) // (SPLITS * DEPTH) * DEPTH
    EVEN: tl.constexpr = CHUNK * SPLITS == K
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    row = tile_n * ROWS + tl.arange(0, ROWS)
    k = split * CHUNK + tl.arange(0, DEPTH)[None, :]
    weight_ptrs = weight_ptr + row[:, None].to(tl.int64) * weight_stride + k
    token = tl.arange(0, TOKENS)
    x_ptrs = x_ptr + token[:, None].to(tl.int64) * x_stride + k
    accumulator = tl.zeros((ROWS, TOKENS), tl.float32)
    if PDL:
        ahead = weight_ptr + row.to(tl.int64)[:, None] * weight_stride + split * CHUNK + tl.arange(0, 16)[None, :] * 64
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ahead], tl.int32, is_pure=False, pack=1)
        tl.extra.cuda.gdc_wait()
    for start in tl.range(0, CHUNK, DEPTH, num_stages=STAGES):
        row_inside = (row < N)[:, None]
        token_inside = (token < M)[:, None]
        if not EVEN:
            row_inside &= k + start < K
            token_inside &= k + start < K
        weights = tl.load(weight_ptrs + start, mask=row_inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptrs + start, mask=token_inside, other=0.0)
        accumulator = tl.dot(weights, tl.trans(x), accumulator)
    _finish(accumulator, out_ptr, bias_ptr, partial_ptr, arrivals_ptr, row, token, N, M, tile_n, split, SPLITS, BIAS)


@triton.jit(do_not_specialize=["M"])
def _slices_kernel(
    # pointers
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N], read if BIAS
    out_ptr,  # [M, N]
    partial_ptr,
    arrivals_ptr,
    # dimensions
    M,
    N,
    x_stride,
    weight_stride,
    # meta-parameters
    K: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,  # k a slice and round
    SLICES: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    ROUND: tl.constexpr = DEPTH * SLICES
    CHUNK: tl.constexpr = (K + SPLITS * ROUND - 1) // (SPLITS * ROUND) * ROUND
    EVEN: tl.constexpr = CHUNK * SPLITS == K
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    row = tile_n * ROWS + tl.arange(0, ROWS)
    k = split * CHUNK + tl.arange(0, SLICES)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    weight_ptrs = weight_ptr + row[None, :, None].to(tl.int64) * weight_stride + k
    token = tl.arange(0, TOKENS)
    x_ptrs = x_ptr + token[None, :, None].to(tl.int64) * x_stride + k
    accumulator = tl.zeros((SLICES, ROWS, TOKENS), tl.float32)
    if PDL:
        ahead = weight_ptr + row.to(tl.int64)[:, None] * weight_stride + split * CHUNK + tl.arange(0, 32)[None, :] * 64
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ahead], tl.int32, is_pure=False, pack=1)
        tl.extra.cuda.gdc_wait()
    for start in tl.range(0, CHUNK, ROUND, num_stages=STAGES):
        row_inside = (row < N)[None, :, None]
        token_inside = (token < M)[None, :, None]
        if not EVEN:
            row_inside &= k + start < K
            token_inside &= k + start < K
        weights = tl.load(weight_ptrs + start, mask=row_inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptrs + start, mask=token_inside, other=0.0)
        accumulator = tl.dot(weights, tl.permute(x, (0, 2, 1)), accumulator)
    total = tl.sum(accumulator, 0)
    _finish(total, out_ptr, bias_ptr, partial_ptr, arrivals_ptr, row, token, N, M, tile_n, split, SPLITS, BIAS)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, plan: tuple, pdl: bool = False) -> None:
    kernel, rows, depth, tokens, splits, warps, stages = plan
    n, k = weight.shape
    grid = (triton.cdiv(n, rows), splits)
    partial = torch.empty((splits, x.shape[0], n) if splits > 1 else (0,), dtype=torch.float32, device=x.device)
    arguments = (
        x, weight, x if bias is None else bias, out, partial, arrivals(x.device), x.shape[0], n, x.stride(0),
        weight.stride(0), k, bias is not None, rows, depth,
    )
    if kernel == "slices":
        _slices_kernel[grid](*arguments, warps, tokens, splits, stages, pdl, num_warps=warps, launch_pdl=pdl)
    else:
        _tiles_kernel[grid](*arguments, tokens, splits, stages, pdl, num_warps=warps, launch_pdl=pdl)
