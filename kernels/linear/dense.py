"""Linear layers with 16-bit weights and up to 64 tokens, where reading the weight once is all the
work.

One or two tokens go through plain multiply-adds, more through the tensor cores with the weight as left
operand: in `_slices_kernel` every warp takes its own slice of k of the same rows, in
`_tiles_kernel` warps take rows and share the activations. Programs may split k (`split_k.py`). More
tokens than that, and shapes whose rows do not start on 16 bytes, go to cuBLAS.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.arrivals import arrivals
from octavo.kernels.launch import has_pdl
from octavo.kernels.linear.dense_table import DensePlan, dense_plan
from octavo.kernels.linear.split_k import finish


@triton.jit
def _row_kernel(
    # pointers
    x_ptr,  # [TOKENS, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N], read if BIAS
    out_ptr,  # [TOKENS, N]
    # dimensions
    N,
    x_stride,
    weight_stride,
    # meta-parameters
    K: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOKENS: tl.constexpr,  # 1 or 2
    LAUNCH: tl.constexpr,
):
    if LAUNCH == "early":
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    weight_ptrs = weight_ptr + row[:, None].to(tl.int64) * weight_stride + k[None, :]
    inside = (row < N)[:, None]
    weights = tl.load(weight_ptrs, mask=inside & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    if LAUNCH != "plain":
        tl.extra.cuda.gdc_wait()
    accumulator = tl.zeros((ROWS, DEPTH), tl.float32)
    accumulator_2 = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in range(0, K, DEPTH):
        k_inside = start + k < K
        x = tl.load(x_ptr + start + k, mask=k_inside, other=0.0).to(tl.float32)
        more = inside & (start + DEPTH + k < K)[None, :]
        ahead = tl.load(weight_ptrs + start + DEPTH, mask=more, other=0.0, eviction_policy="evict_first")
        accumulator += weights.to(tl.float32) * x[None, :]
        if TOKENS == 2:
            x_2 = tl.load(x_ptr + x_stride + start + k, mask=k_inside, other=0.0).to(tl.float32)
            accumulator_2 += weights.to(tl.float32) * x_2[None, :]
        weights = ahead
    bias = tl.zeros((ROWS,), tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, (tl.sum(accumulator, 1) + bias).to(out_ptr.dtype.element_ty), mask=row < N)
    if TOKENS == 2:
        tl.store(out_ptr + N + row, (tl.sum(accumulator_2, 1) + bias).to(out_ptr.dtype.element_ty), mask=row < N)


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
    TOKENS: tl.constexpr,
    SLICES: tl.constexpr,  # of k: one a warp
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    LAUNCH: tl.constexpr,
):
    ROUND: tl.constexpr = DEPTH * SLICES
    CHUNK: tl.constexpr = (K + SPLITS * ROUND - 1) // (SPLITS * ROUND) * ROUND
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    row = tile_n * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    # [SLICES, ..]: Triton gives warps to the first dimension of a batched product.
    k = split * CHUNK + tl.arange(0, SLICES)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    weight_ptrs = weight_ptr + row[None, :, None].to(tl.int64) * weight_stride + k
    x_ptrs = x_ptr + token[None, :, None].to(tl.int64) * x_stride + k
    if LAUNCH != "plain":
        tl.extra.cuda.gdc_wait()
    accumulator = tl.zeros((SLICES, ROWS, TOKENS), tl.float32)
    for start in tl.range(0, CHUNK, ROUND, num_stages=STAGES):
        row_inside = (row < N)[None, :, None]
        token_inside = (token < M)[None, :, None]
        if CHUNK * SPLITS != K:
            row_inside &= k + start < K
            token_inside &= k + start < K
        weights = tl.load(weight_ptrs + start, mask=row_inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptrs + start, mask=token_inside, other=0.0)
        accumulator = tl.dot(weights, tl.permute(x, (0, 2, 1)), accumulator)
    if LAUNCH != "plain":
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.sum(accumulator, 0)
    finish(total, out_ptr, bias_ptr, partial_ptr, arrivals_ptr, row, token, N, M, tile_n, split, SPLITS, BIAS)


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
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    LAUNCH: tl.constexpr,
):
    if LAUNCH != "plain":
        tl.extra.cuda.gdc_wait()
    CHUNK: tl.constexpr = (K + SPLITS * DEPTH - 1) // (SPLITS * DEPTH) * DEPTH
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    row = tile_n * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    k = split * CHUNK + tl.arange(0, DEPTH)[None, :]
    weight_ptrs = weight_ptr + row[:, None].to(tl.int64) * weight_stride + k
    x_ptrs = x_ptr + token[:, None].to(tl.int64) * x_stride + k
    accumulator = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, CHUNK, DEPTH, num_stages=STAGES):
        row_inside = (row < N)[:, None]
        token_inside = (token < M)[:, None]
        if CHUNK * SPLITS != K:
            row_inside &= k + start < K
            token_inside &= k + start < K
        weights = tl.load(weight_ptrs + start, mask=row_inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptrs + start, mask=token_inside, other=0.0)
        accumulator = tl.dot(weights, tl.trans(x), accumulator)
    if LAUNCH != "plain":
        tl.extra.cuda.gdc_launch_dependents()
    finish(accumulator, out_ptr, bias_ptr, partial_ptr, arrivals_ptr, row, token, N, M, tile_n, split, SPLITS, BIAS)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, plan: DensePlan) -> None:
    """out [M, N] = x [M, K] @ weight.T + bias by `plan`, which has room for M tokens."""
    tokens, rows = out.shape
    depth = weight.shape[1]
    tiles = triton.cdiv(rows, plan.rows)
    how = plan.launch if has_pdl(x.device) else "plain"
    options = {"num_warps": plan.warps, "launch_pdl": how != "plain", "enable_fp_fusion": True}
    some_bias = x if bias is None else bias
    if plan.kernel == "row":
        _row_kernel[(tiles,)](
            x,
            weight,
            some_bias,
            out,
            rows,
            x.stride(0),
            weight.stride(0),
            depth,
            bias is not None,
            plan.rows,
            plan.depth,
            tokens,
            how,
            **options,
        )
        return
    shape = (plan.splits, tokens, rows) if plan.splits > 1 else (0,)
    arguments = (
        x,
        weight,
        some_bias,
        out,
        torch.empty(shape, dtype=torch.float32, device=x.device),
        arrivals(x.device),
        tokens,
        rows,
        x.stride(0),
        weight.stride(0),
        depth,
        bias is not None,
        plan.rows,
        plan.depth,
        plan.tokens,
    )
    grid = (tiles, plan.splits)
    if plan.kernel == "slices":
        _slices_kernel[grid](*arguments, plan.warps, plan.ahead, plan.splits, how, **options)
    else:
        _tiles_kernel[grid](*arguments, plan.ahead, plan.splits, how, **options)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] @ weight [N, K] transposed + bias [N], all of one dtype (rows of x and weight may be
    strided); returns [M, N].

    Launches of one device must be on one stream: they share counters. Call it once before capturing
    it in a graph, so that the counters exist.
    """
    plan = dense_plan(x.shape[0], *weight.shape)
    in_16_bytes = x.stride(0) % 8 == 0 and weight.stride(0) % 8 == 0 and x.stride(1) == weight.stride(1) == 1
    if plan is None or x.dtype not in (torch.bfloat16, torch.float16) or not in_16_bytes or x.shape[0] == 0:
        return F.linear(x, weight, bias)
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    launch(x, weight, bias, out, plan)
    return out
