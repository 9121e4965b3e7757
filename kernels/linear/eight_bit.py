"""Linears with 8-bit weights: int8 or fp8 (e4m3), one scale an output channel (or one for all).

W8A16 takes bf16 or fp16 activations, W8A8 takes activations quantised like the weight with one
scale a token. Weights stay as the checkpoint has them, [N, K] with K contiguous, so
`torch._scaled_mm` can take over where it is faster.

Up to a few hundred tokens the weights' way through memory decides, and three kernels share the
work; in each the output channels are the rows of the product, because there are always enough of
them to fill a matrix unit:

- `_gemv_kernel`, one token: multiply and add without the matrix unit.
- `_warps_kernel`: few output channels a program, K dealt out over its warps, which add up at the
  end. Many small programs spread any shape evenly over the card.
- `_tile_kernel`: 64 or more output channels a program, as the Hopper matrix unit wants them; K is
  split over programs, of which the last to arrive adds the parts in their order (so the answer
  never depends on the schedule).

Beyond, arithmetic decides: `_matmul_kernel` is an ordinary product of 8-bit tiles that the copy
engine brings; `torch._scaled_mm` serves fp8 where it can, and weights without quantised activations
are dequantised once for cuBLAS. `eight_bit_table.py` says which kernel serves which shape.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.arrivals import MAX_ARRIVALS, arrivals, arrives_last
from octavo.kernels.launch import has_pdl, let_successor_start, wait_for_inputs
from octavo.kernels.linear.eight_bit_table import Config, Gemv, Library, Matmul, Tile, Warps, choose
from octavo.kernels.pointwise.quantize import dequantize_rows


@triton.jit
def _add_product(sums, a, b, BLOCK_K: tl.constexpr):
    """sums + a @ b of tiles of BLOCK_K terms. Hopper's fp8 products keep some 14 bits of a running
    sum: over 11,008 terms the error reached 3 % of the results' spread. So a tile's fp8 sum, which
    starts at zero, is added in fp32.
    """
    if a.dtype.is_fp8():
        return sums + tl.dot(a, b, max_num_imprecise_acc=BLOCK_K)
    return tl.dot(a, b, sums, out_dtype=sums.dtype)


@triton.jit
def _finish(
    sums,  # [BLOCK_N, BLOCK_M] fp32
    n,
    m,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    x_scale_stride,
    weight_scale_stride,
    num_tokens,
    N,
    X_SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Scales, bias and the store of a tile: output channels n, tokens m."""
    inside = (n < N)[:, None] & (m < num_tokens)[None, :]
    sums *= tl.load(weight_scale_ptr + n * weight_scale_stride, mask=n < N, other=0.0)[:, None]
    if X_SCALED:
        sums *= tl.load(x_scale_ptr + m * x_scale_stride, mask=m < num_tokens, other=0.0)[None, :]
    if BIAS:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    pointers = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(pointers, sums.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gemv_kernel(
    # pointers
    x_ptr,  # [1, K]
    weight_ptr,  # [N, K] int8 or fp8
    weight_scale_ptr,  # [N] or [1] fp32
    bias_ptr,  # [N], read if BIAS
    out_ptr,  # [1, N]
    weight_scale_stride,
    # dimensions
    N,
    K,
    # meta-parameters
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = tl.arange(0, BLOCK_K)
    weight_rows = weight_ptr + tl.minimum(n, N - 1).to(tl.int64) * K
    wait_for_inputs(PDL)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            weight = tl.load(weight_rows[:, None] + (k + offset)[None, :], eviction_policy="evict_first")
            x = tl.load(x_ptr + k + offset)
        else:
            inside = k + offset < K
            weight = tl.load(
                weight_rows[:, None] + (k + offset)[None, :],
                mask=inside[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            x = tl.load(x_ptr + k + offset, mask=inside, other=0.0)
        sums += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    let_successor_start(PDL)
    out = tl.sum(sums, axis=1) * tl.load(weight_scale_ptr + n * weight_scale_stride, mask=n < N, other=0.0)
    if BIAS:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["num_tokens"])
def _warps_kernel(
    # pointers
    x_ptr,  # [M, K] bf16, fp16 or the weight's dtype
    x_scale_ptr,  # [M] or [1] fp32, read if X_SCALED
    weight_ptr,  # [N, K] int8 or fp8
    weight_scale_ptr,  # [N] or [1] fp32
    bias_ptr,  # [N], read if BIAS
    out_ptr,  # [M, N]
    # strides, in elements
    x_stride,
    x_scale_stride,
    weight_scale_stride,
    # dimensions
    num_tokens,  # M
    N,
    K,
    # meta-parameters
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # One product a warp: Triton deals the first dimension of a batched product out to the warps.
    STRETCH: tl.constexpr = BLOCK_K // WARPS
    offset = tl.arange(0, WARPS)[:, None] * STRETCH + tl.arange(0, STRETCH)[None, :]
    # Channels past the end read the last one, and are not stored: no masks for weights in the loop.
    # Absent tokens are masked: if all programs read one token in their place, they queue up for the
    # same lines of the L2.
    weight_rows = weight_ptr + tl.minimum(n, N - 1).to(tl.int64) * K
    x_rows = x_ptr + m.to(tl.int64) * x_stride
    wait_for_inputs(PDL)
    weight_pointers = weight_rows[None, :, None] + offset[:, None, :]
    x_pointers = x_rows[None, :, None] + offset[:, None, :]
    present = (m < num_tokens)[None, :, None]
    WHOLE: tl.constexpr = X_SCALED and weight_ptr.dtype.element_ty == tl.int8
    sums = tl.zeros([WARPS, BLOCK_N, BLOCK_M], tl.int32 if WHOLE else tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            weight = tl.load(weight_pointers + k, eviction_policy="evict_first")
            x = tl.load(x_pointers + k, mask=present, other=0.0)
        else:
            inside = (k + offset < K)[:, None, :]
            weight = tl.load(weight_pointers + k, mask=inside, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_pointers + k, mask=inside & present, other=0.0)
        # Batched products multiply fp8 as fp16, so nothing is lost.
        sums = tl.dot(weight.to(x.dtype), tl.permute(x, (0, 2, 1)), sums, out_dtype=sums.dtype)
    let_successor_start(PDL)
    _finish(
        tl.sum(sums, axis=0).to(tl.float32),
        n,
        m,
        x_scale_ptr,
        weight_scale_ptr,
        bias_ptr,
        out_ptr,
        x_scale_stride,
        weight_scale_stride,
        num_tokens,
        N,
        X_SCALED,
        BIAS,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _tile_kernel(
    # pointers
    x_ptr,  # [M, K] bf16, fp16 or the weight's dtype
    x_scale_ptr,  # [M] or [1] fp32, read if X_SCALED
    weight_ptr,  # [N, K] int8 or fp8
    weight_scale_ptr,  # [N] or [1] fp32
    bias_ptr,  # [N], read if BIAS
    out_ptr,  # [M, N]
    partial_ptr,  # [tiles, parts, BLOCK_N, BLOCK_M] fp32, used if SPLIT
    arrivals_ptr,  # [tiles] int32, zero before and after, used if SPLIT
    # strides, in elements
    x_stride,
    x_scale_stride,
    weight_scale_stride,
    # dimensions
    num_tokens,  # M
    N,
    K,
    part_size,  # of K for each program, a multiple of BLOCK_K
    # meta-parameters
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    X_SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    first = part * part_size
    end = tl.minimum(first + part_size, K)
    offset = tl.arange(0, BLOCK_K)
    # What is masked and what is not: as in `_warps_kernel`.
    weight_rows = weight_ptr + tl.minimum(n, N - 1).to(tl.int64) * K
    x_rows = x_ptr + m.to(tl.int64) * x_stride
    wait_for_inputs(PDL)
    weight_pointers = weight_rows[:, None] + offset[None, :]
    x_pointers = x_rows[:, None] + offset[None, :]
    present = (m < num_tokens)[:, None]
    WHOLE: tl.constexpr = X_SCALED and weight_ptr.dtype.element_ty == tl.int8
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if WHOLE else tl.float32)
    for k in tl.range(first, end, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            weight = tl.load(weight_pointers + k, eviction_policy="evict_first")
            x = tl.load(x_pointers + k, mask=present, other=0.0)
        else:
            inside = (k + offset < K)[None, :]
            weight = tl.load(weight_pointers + k, mask=inside, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_pointers + k, mask=inside & present, other=0.0)
        sums = _add_product(sums, weight.to(x.dtype), tl.trans(x), BLOCK_K)
    let_successor_start(PDL)
    total = sums.to(tl.float32)
    last = True
    if SPLIT:
        parts = tl.num_programs(1)
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tile_ptr = partial_ptr + tile.to(tl.int64) * parts * (BLOCK_N * BLOCK_M) + inner
        tl.store(tile_ptr + part * (BLOCK_N * BLOCK_M), total)
        last = arrives_last(arrivals_ptr, tile, parts)
        if last:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for index in tl.range(parts):
                total += tl.load(tile_ptr + index * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
    if last:
        _finish(
            total,
            n,
            m,
            x_scale_ptr,
            weight_scale_ptr,
            bias_ptr,
            out_ptr,
            x_scale_stride,
            weight_scale_stride,
            num_tokens,
            N,
            X_SCALED,
            BIAS,
        )


@triton.jit(do_not_specialize=["num_tokens"])
def _matmul_kernel(
    # descriptors
    x_desc,  # [M, K] int8 or fp8, in tiles [BLOCK_M, BLOCK_K]
    weight_desc,  # [N, K] of the same dtype, in tiles [BLOCK_N, BLOCK_K]
    # pointers
    x_scale_ptr,  # [M] or [1] fp32
    weight_scale_ptr,  # [N] or [1] fp32
    bias_ptr,  # [N], read if BIAS
    out_ptr,  # [M, N]
    # strides, in elements
    x_scale_stride,
    weight_scale_stride,
    # dimensions
    num_tokens,  # M
    N,
    K,
    # meta-parameters
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    # Eight tiles of tokens share a tile of weights while it is in the L2.
    GROUP: tl.constexpr = 8
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    group = tl.program_id(0) // (GROUP * tl.cdiv(N, BLOCK_N))
    within = tl.program_id(0) % (GROUP * tl.cdiv(N, BLOCK_N))
    group_size = tl.minimum(tiles_m - group * GROUP, GROUP)
    first_m = (group * GROUP + within % group_size) * BLOCK_M
    first_n = within // group_size * BLOCK_N
    WHOLE: tl.constexpr = x_desc.dtype == tl.int8
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if WHOLE else tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        sums = _add_product(sums, x_desc.load([first_m, k]), weight_desc.load([first_n, k]).T, BLOCK_K)
    let_successor_start(PDL)
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    out = sums.to(tl.float32)
    out *= tl.load(x_scale_ptr + m * x_scale_stride, mask=m < num_tokens, other=0.0)[:, None]
    out *= tl.load(weight_scale_ptr + n * weight_scale_stride, mask=n < N, other=0.0)[None, :]
    if BIAS:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tile_ptr = out_ptr + first_m.to(tl.int64) * N + first_n  # one wide number, not one an element
    pointers = tile_ptr + (tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :])
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(m < num_tokens)[:, None] & (n < N)[None, :])


def _launch(
    config: Gemv | Warps | Tile | Matmul,
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    num_tokens, size = x.shape
    channels = weight.shape[0]
    out = torch.empty((num_tokens, channels), dtype=out_dtype, device=x.device)
    pdl = config.pdl and has_pdl(x.device)
    even = size % config.block_k == 0
    options = {"num_warps": config.warps, "launch_pdl": pdl}
    a_bias = out if bias is None else bias
    x_scaled = x_scale is not None
    weight_scale_stride = 0 if weight_scale.numel() == 1 else 1
    if isinstance(config, Gemv):
        _gemv_kernel[(triton.cdiv(channels, config.block_n),)](
            x,
            weight,
            weight_scale,
            a_bias,
            out,
            weight_scale_stride,
            channels,
            size,
            config.block_n,
            config.block_k,
            config.stages,
            even,
            bias is not None,
            pdl,
            **options,
        )
        return out
    if isinstance(config, Matmul):
        assert x_scale is not None
        _matmul_kernel[(triton.cdiv(num_tokens, config.block_m) * triton.cdiv(channels, config.block_n),)](
            TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
            TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
            x_scale,
            weight_scale,
            a_bias,
            out,
            0 if x_scale.numel() == 1 else 1,
            weight_scale_stride,
            num_tokens,
            channels,
            size,
            config.block_m,
            config.block_n,
            config.block_k,
            config.stages,
            bias is not None,
            pdl,
            **options,
        )
        return out
    pointers = (x, out if x_scale is None else x_scale, weight, weight_scale, a_bias, out)
    strides = (x.stride(0), 0 if x_scale is None or x_scale.numel() == 1 else 1, weight_scale_stride)
    if isinstance(config, Warps):
        grid = (triton.cdiv(channels, config.block_n), triton.cdiv(num_tokens, config.block_m))
        _warps_kernel[grid](
            *pointers,
            *strides,
            num_tokens,
            channels,
            size,
            config.block_m,
            config.block_n,
            config.block_k,
            config.warps,
            config.stages,
            even,
            x_scaled,
            bias is not None,
            pdl,
            **options,
        )
        return out
    tiles = triton.cdiv(channels, config.block_n), triton.cdiv(num_tokens, config.block_m)
    steps = triton.cdiv(size, config.block_k)
    part_size = triton.cdiv(steps, config.parts) * config.block_k
    parts = triton.cdiv(size, part_size)
    partial, counters = out, out
    if parts > 1:
        assert tiles[0] * tiles[1] <= MAX_ARRIVALS
        area = config.block_n * config.block_m
        partial = torch.empty(tiles[0] * tiles[1] * parts * area, dtype=torch.float32, device=x.device)
        counters = arrivals(x.device)
    _tile_kernel[(tiles[0], parts, tiles[1])](
        *pointers,
        partial,
        counters,
        *strides,
        num_tokens,
        channels,
        size,
        part_size,
        config.block_m,
        config.block_n,
        config.block_k,
        config.stages,
        parts > 1,
        even,
        x_scaled,
        bias is not None,
        pdl,
        **options,
    )
    return out


# What takes over where torch or the copy engine cannot serve: at many tokens any shape, at any
# speed.
_UNSERVED_BY_LIBRARY = Matmul(128, 128, 128, 8, 3, False)
_UNALIGNED = Tile(64, 64, 128, 4, 4, 1, False)


def _library_serves(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` takes these: fp8 whose rows start at multiples of 16 bytes; with
    scales by row it needs a Hopper GPU and returns bf16 only.
    """
    aligned = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0 and x.is_contiguous()
    single = x_scale.numel() == 1 and weight_scale.numel() == 1
    by_row = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0) and out_dtype == torch.bfloat16
    return weight.dtype == torch.float8_e4m3fn and aligned and (single or by_row)


def _descriptors_serve(x: Tensor, weight: Tensor) -> bool:
    """Whether the copy engine takes these: rows that start at multiples of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 16 == 0 and tensor.stride(1) == 1 for tensor in (x, weight)
    )


def _library(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    if x_scale is None:
        return F.linear(x, dequantize_rows(weight, weight_scale, x.dtype), bias)
    if x_scale.numel() > 1 or weight_scale.numel() > 1:
        x_scale = x_scale.expand(x.shape[0]).contiguous().unsqueeze(1)
        weight_scale = weight_scale.expand(weight.shape[0]).contiguous().unsqueeze(0)
    out = torch._scaled_mm(x, weight.t(), x_scale, weight_scale, out_dtype=out_dtype)
    return out if bias is None else out.add_(bias)


def _linear(
    config: Config,
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    if not x.shape[0]:
        return torch.empty((0, weight.shape[0]), dtype=out_dtype, device=x.device)
    arguments = (x, x_scale, weight, weight_scale, out_dtype, bias)
    if isinstance(config, Library):
        if x_scale is None or _library_serves(x, x_scale, weight, weight_scale, out_dtype):
            return _library(*arguments)
        config = _UNSERVED_BY_LIBRARY
    if isinstance(config, Matmul) and not _descriptors_serve(x, weight):
        config = _UNALIGNED
    return _launch(config, *arguments)


def linear_w8a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ (weight * weight_scale)^T + bias`: x [M, K] bf16/fp16 (rows may be strided), weight [N,
    K] int8 or float8_e4m3fn, weight_scale fp32 [N] or [1], bias [N]; returns [M, N] of x's dtype. K
    in any length, 16 at a time for speed. Launches of one device must be on one stream: they share
    counters. Call it once before capturing it in a graph, so that the counters exist.
    """
    config = choose(weight.dtype, False, x.shape[0], *weight.shape)
    return _linear(config, x, None, weight, weight_scale, x.dtype, bias)


def linear_w8a8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """`(x * x_scale) @ (weight * weight_scale)^T + bias`: x [M, K] and weight [N, K] both int8 or
    both float8_e4m3fn, x_scale fp32 [M] or [1], weight_scale fp32 [N] or [1], bias [N]; returns [M,
    N] of out_dtype. As for streams and graphs, see `linear_w8a16`.
    """
    config = choose(weight.dtype, True, x.shape[0], *weight.shape)
    return _linear(config, x, x_scale, weight, weight_scale, out_dtype, bias)
