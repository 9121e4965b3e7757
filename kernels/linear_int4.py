"""Linear layers with 4-bit weights: weights x tokens on the tensor cores, weights dequantised in registers.

Both kernels multiply the weight as left operand, straight from the registers in which `int4_layout.py` puts it, with
the activations as right operand: no number passes through shared memory after it is unpacked. Unpacking takes 15
instructions for 8 weights: shift, `lop3` (mask and set the exponent of 128, or of 1024 in fp16: a number 128 + q),
subtract 128 + zero (exact), multiply by the scale (one rounding).

`_slices_kernel` is for few tokens: every warp takes its own slice of k for the same rows, and the slices are added in
shared memory. `_tiles_kernel` is for more: warps take rows and share the activations. Either can be split along k over
programs; the program that arrives last adds the parts up in their order, so results do not depend on timing.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels import linear_table
from octavo.kernels.int4_layout import Int4Weight

_MAX_TILES = 65536  # output tiles of a launch that splits k; 256 KiB of counters a device


def _unpack_asm(type_: str, magic: str) -> str:
    """PTX for two words 2u and 2u + 1 of a lane: $0-$7 packed weights of (s, upper row, half), $8-$9 words, then two
    registers of the same each for the scales of row r and of r + 8 and for the zeros of r and of r + 8, all doubled.
    """
    lines = ["{ .reg .b32 number, shifted;"]
    for place in range(8):
        source, nibble, upper = f"${8 + place // 4}", place % 4, place // 2 % 2
        if nibble:
            lines.append(f"shr.b32 shifted, {source}, {4 * nibble};")
            source = "shifted"
        lines.append(f"lop3.b32 number, {source}, 0x000f000f, {magic}, 0xea;")  # (a & b) | c
        lines.append(f"sub.rn.{type_} number, number, ${14 + 2 * upper};")
        lines.append(f"mul.rn.{type_} ${place}, number, ${10 + 2 * upper};")
    return " ".join([*lines, "}"])


_BF16_ASM = tl.constexpr(_unpack_asm("bf16x2", "0x43004300"))
_FP16_ASM = tl.constexpr(_unpack_asm("f16x2", "0x64006400"))
_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 10))
# Triton's interpreter has no inline assembly.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _place(words, low_scale, high_scale, low_zero, high_zero, PLACE: tl.constexpr):
    """In plain arithmetic the weights that `_unpack_asm` puts into $PLACE."""
    first, second = tl.split(words)
    source = first if PLACE < 4 else second
    numbers = tl.join(source >> (4 * (PLACE % 4)), source >> (4 * (PLACE % 4) + 16)) & 15
    upper: tl.constexpr = PLACE // 2 % 2
    scale = high_scale if upper else low_scale
    zero = high_zero if upper else low_zero
    return (numbers - zero).to(scale.dtype) * scale


@triton.jit
def _dequantise(words, scales, zeros, BF16: tl.constexpr):
    """Weights of words [.., 8 r, 4 c, 2 u, 2 s], scales and zeros (as in the layout, 32 bits) [.., 8, 1, 1 or 2, 1].

    Returns [.., 8 r, 4 c, 2 u, 2 pair, 2 half, 2 upper row, 2 s].
    """
    if _INTERPRETED:
        dtype = tl.bfloat16 if BF16 else tl.float16
        low_scale = (scales & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        high_scale = (scales >> 16).to(tl.int16).to(dtype, bitcast=True)
        low_zero, high_zero = zeros & 0xFF, zeros >> 8 & 0xFF
        w0 = _place(words, low_scale, high_scale, low_zero, high_zero, 0)
        w1 = _place(words, low_scale, high_scale, low_zero, high_zero, 1)
        w2 = _place(words, low_scale, high_scale, low_zero, high_zero, 2)
        w3 = _place(words, low_scale, high_scale, low_zero, high_zero, 3)
        w4 = _place(words, low_scale, high_scale, low_zero, high_zero, 4)
        w5 = _place(words, low_scale, high_scale, low_zero, high_zero, 5)
        w6 = _place(words, low_scale, high_scale, low_zero, high_zero, 6)
        w7 = _place(words, low_scale, high_scale, low_zero, high_zero, 7)
    else:
        # The two halves of a register alike.
        low_scale, high_scale = (scales & 0xFFFF) * 0x10001, (scales >> 16 & 0xFFFF) * 0x10001
        magic: tl.constexpr = 0x43004300 if BF16 else 0x64006400
        low_zero, high_zero = (zeros & 0xFF) * 0x10001 + magic, (zeros >> 8 & 0xFF) * 0x10001 + magic
        arguments = [words, low_scale, high_scale, low_zero, high_zero]
        if BF16:
            w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
                _BF16_ASM,
                _CONSTRAINTS,
                arguments,
                (
                    tl.bfloat16,
                    tl.bfloat16,
                    tl.bfloat16,
                    tl.bfloat16,
                    tl.bfloat16,
                    tl.bfloat16,
                    tl.bfloat16,
                    tl.bfloat16,
                ),
                is_pure=True,
                pack=2,
            )
        else:
            w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
                _FP16_ASM,
                _CONSTRAINTS,
                arguments,
                (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    return tl.join(tl.join(tl.join(w0, w1), tl.join(w2, w3)), tl.join(tl.join(w4, w5), tl.join(w6, w7)))


@triton.jit
def _finish(
    total,  # [ROWS, TOKENS] fp32
    out_ptr,
    bias_ptr,
    partial_ptr,  # [splits, M, N] fp32
    arrivals_ptr,  # [tiles] int32, all zero before and after
    row,  # [ROWS]
    token,  # [TOKENS]
    N,
    M,
    tile,
    split,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Writes a tile of the product, or its part; the last part of a tile to arrive adds them up in order."""
    inside = (row < N)[:, None] & (token < M)[None, :]
    offset = token[None, :].to(tl.int64) * N + row[:, None]
    last = True
    if SPLITS > 1:
        size = N.to(tl.int64) * M
        tl.store(partial_ptr + split * size + offset, total, mask=inside)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        last = arrived == SPLITS - 1
        if last:
            tl.store(arrivals_ptr + tile, 0)
            total = tl.load(partial_ptr + offset, mask=inside, other=0.0, cache_modifier=".cg")
            for part in tl.static_range(1, SPLITS):
                total += tl.load(partial_ptr + part * size + offset, mask=inside, other=0.0, cache_modifier=".cg")
    if last:
        if BIAS:
            total += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _slices_kernel(
    # pointers
    x_ptr,  # [M, K]
    words_ptr,  # [N / 16, K / 64, 128] int32
    scales_ptr,  # [N / 16, groups, 8] int32
    zeros_ptr,  # [N / 16, groups, 8] int16, read if ZEROS
    bias_ptr,  # [N], read if BIAS
    out_ptr,  # [M, N]
    partial_ptr,
    arrivals_ptr,
    # dimensions
    M,
    N,
    x_stride,
    # meta-parameters
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    TILES: tl.constexpr,  # of 16 rows, a program
    DEPTH: tl.constexpr,  # tiles of 64 k a slice and round
    SLICES: tl.constexpr,  # of k: one a warp
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    STEPS: tl.constexpr = K // 64
    GROUPS: tl.constexpr = K // GROUP
    HALVES: tl.constexpr = 2 if GROUP == 32 else 1
    ROUND: tl.constexpr = SLICES * DEPTH
    CHUNK: tl.constexpr = (STEPS + SPLITS * ROUND - 1) // (SPLITS * ROUND) * ROUND
    EVEN: tl.constexpr = CHUNK * SPLITS == STEPS
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    begin = split * CHUNK
    # [SLICES, TILES, DEPTH, ..]: Triton gives warps to the first dimension, each its slice.
    step = tl.arange(0, SLICES)[:, None, None, None] + tl.arange(0, DEPTH)[None, None, :, None] * SLICES
    tile = tile_n * TILES + tl.arange(0, TILES)[None, :, None, None]
    tile_inside = tile < N // 16
    word = tl.arange(0, 128)[None, None, None, :]
    words_ptrs = words_ptr + (tile.to(tl.int64) * STEPS + begin + step) * 128 + word
    pair_row = tl.arange(0, 8 * HALVES)[None, None, None, :] // HALVES
    half = tl.arange(0, 8 * HALVES)[None, None, None, :] % HALVES
    scale_offset = tile * (GROUPS * 8) + pair_row
    token = tl.arange(0, TOKENS)
    k = tl.arange(0, DEPTH * 64)[None, None, :]
    x_offset = (k // 64 * SLICES + tl.arange(0, SLICES)[:, None, None] + begin) * 64 + k % 64
    x_ptrs = x_ptr + token[None, :, None].to(tl.int64) * x_stride + x_offset
    token_inside = (token < M)[None, :, None]
    if STAGES == 0:
        shape: tl.constexpr = (SLICES, TILES, DEPTH, 8, 1, HALVES, 1)
        at = begin + step
        inside = tile_inside & (at < STEPS)
        # The weights do not wait for the launch before this one, the activations do.
        words = tl.load(words_ptrs, mask=inside, other=0, eviction_policy="evict_first")
        group = (at * 64 + half * 32) // GROUP
        scales = tl.load(scales_ptr + scale_offset + group * 8, mask=inside, other=0)
        zeros = tl.zeros((1, 1, 1, 1), tl.int32)
        if ZEROS:
            zeros = tl.load(zeros_ptr + scale_offset + group * 8, mask=inside, other=0).to(tl.int32)
        if PDL:
            tl.extra.cuda.gdc_wait()
        all_x = tl.load(x_ptrs, mask=token_inside & (x_offset < K), other=0.0)
        accumulator = tl.zeros((SLICES, TILES * 16, TOKENS), tl.float32)
        for round_ in tl.range(0, CHUNK, ROUND, num_stages=1):
            next_x = tl.load(
                x_ptrs + (round_ + ROUND) * 64,
                mask=token_inside & (x_offset + (round_ + ROUND) * 64 < K) & (round_ + ROUND < CHUNK),
                other=0.0,
            )
            at = begin + round_ + ROUND + step
            inside = tile_inside & (at < STEPS) & (round_ + ROUND < CHUNK)
            next_words = tl.load(words_ptrs + (round_ + ROUND) * 128, mask=inside, other=0, eviction_policy="evict_first")
            group = (at * 64 + half * 32) // GROUP
            next_scales = tl.load(scales_ptr + scale_offset + group * 8, mask=inside, other=0)
            if ZEROS:
                next_zeros = tl.load(zeros_ptr + scale_offset + group * 8, mask=inside, other=0).to(tl.int32)
                zero = tl.reshape(zeros, shape)
            else:
                zero = tl.full((1, 1, 1, 1, 1, 1, 1), 0x0808, tl.int32)
            w = tl.reshape(words, (SLICES, TILES, DEPTH, 8, 4, 2, 2))
            weights = _dequantise(w, tl.reshape(scales, shape), zero, x_ptr.dtype.element_ty == tl.bfloat16)
            # [slice, tile, depth, r, c, u, pair, half, upper, s] to rows (tile, upper, r) and k (depth, u, s, c, half,
            # pair): Triton wants four consecutive k of a lane here, so k of both operands is taken in another order.
            weights = tl.permute(weights, (0, 1, 8, 3, 2, 5, 9, 4, 7, 6))
            weights = tl.reshape(weights, (SLICES, TILES * 16, DEPTH * 64))
            x = tl.permute(tl.reshape(all_x, (SLICES, TOKENS, DEPTH * 4, 2, 4, 2)), (0, 1, 2, 4, 3, 5))
            x = tl.permute(tl.reshape(x, (SLICES, TOKENS, DEPTH * 64)), (0, 2, 1))
            accumulator = tl.dot(weights, x, accumulator)
            all_x = next_x
            words = next_words
            scales = next_scales
            if ZEROS:
                zeros = next_zeros
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
        accumulator = tl.zeros((SLICES, TILES * 16, TOKENS), tl.float32)
        for round_ in tl.range(0, CHUNK, ROUND, num_stages=STAGES):
            at = begin + round_ + step
            inside = tile_inside
            x_inside = token_inside
            if not EVEN:
                inside &= at < STEPS
                x_inside &= x_offset + round_ * 64 < K
            words = tl.load(words_ptrs + round_ * 128, mask=inside, other=0, eviction_policy="evict_first")
            group = (at * 64 + half * 32) // GROUP
            scales = tl.load(scales_ptr + scale_offset + group * 8, mask=inside, other=0)
            x = tl.load(x_ptrs + round_ * 64, mask=x_inside, other=0.0)
            shape: tl.constexpr = (SLICES, TILES, DEPTH, 8, 1, HALVES, 1)
            if ZEROS:
                zeros = tl.load(zeros_ptr + scale_offset + group * 8, mask=inside, other=0).to(tl.int32)
                zeros = tl.reshape(zeros, shape)
            else:
                zeros = tl.full((1, 1, 1, 1, 1, 1, 1), 0x0808, tl.int32)
            words = tl.reshape(words, (SLICES, TILES, DEPTH, 8, 4, 2, 2))
            weights = _dequantise(words, tl.reshape(scales, shape), zeros, x_ptr.dtype.element_ty == tl.bfloat16)
            # [slice, tile, depth, r, c, u, pair, half, upper, s] to rows (tile, upper, r) and k (depth, u, s, c, half,
            # pair): Triton wants four consecutive k of a lane here, so k of both operands is taken in another order.
            weights = tl.permute(weights, (0, 1, 8, 3, 2, 5, 9, 4, 7, 6))
            weights = tl.reshape(weights, (SLICES, TILES * 16, DEPTH * 64))
            x = tl.permute(tl.reshape(x, (SLICES, TOKENS, DEPTH * 4, 2, 4, 2)), (0, 1, 2, 4, 3, 5))
            x = tl.permute(tl.reshape(x, (SLICES, TOKENS, DEPTH * 64)), (0, 2, 1))
            accumulator = tl.dot(weights, x, accumulator)
    row = tile_n * TILES * 16 + tl.arange(0, TILES * 16)
    total = tl.sum(accumulator, 0)
    _finish(
        total, out_ptr, bias_ptr, partial_ptr, arrivals_ptr, row, token, N, M, tile_n, split, SPLITS, BIAS
    )


@triton.jit(do_not_specialize=["M"])
def _tiles_kernel(
    # pointers
    x_ptr,  # [M, K]
    words_ptr,  # [N / 16, K / 64, 128] int32
    scales_ptr,  # [N / 16, groups, 8] int32
    zeros_ptr,  # [N / 16, groups, 8] int16, read if ZEROS
    bias_ptr,  # [N], read if BIAS
    out_ptr,  # [M, N]
    partial_ptr,
    arrivals_ptr,
    # dimensions
    M,
    N,
    x_stride,
    # meta-parameters
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    TILES: tl.constexpr,  # of 16 rows, a program
    DEPTH: tl.constexpr,  # tiles of 64 k a round
    TOKENS: tl.constexpr,  # a program
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    STEPS: tl.constexpr = K // 64
    GROUPS: tl.constexpr = K // GROUP
    HALVES: tl.constexpr = 2 if GROUP == 32 else 1
    CHUNK: tl.constexpr = (STEPS + SPLITS * DEPTH - 1) // (SPLITS * DEPTH) * DEPTH
    EVEN: tl.constexpr = CHUNK * SPLITS == STEPS
    # Programs of the same rows run side by side: memory gives them the weights once.
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    split = tl.program_id(2)
    begin = split * CHUNK
    # [TILES, DEPTH, ..]: Triton gives warps to the first dimension, as the tensor cores do.
    step = tl.arange(0, DEPTH)[None, :, None]
    tile = tile_n * TILES + tl.arange(0, TILES)[:, None, None]
    tile_inside = tile < N // 16
    word = tl.arange(0, 128)[None, None, :]
    words_ptrs = words_ptr + (tile.to(tl.int64) * STEPS + begin + step) * 128 + word
    pair_row = tl.arange(0, 8 * HALVES)[None, None, :] // HALVES
    half = tl.arange(0, 8 * HALVES)[None, None, :] % HALVES
    scale_offset = tile * (GROUPS * 8) + pair_row
    token = tile_m * TOKENS + tl.arange(0, TOKENS)
    x_offset = begin * 64 + tl.arange(0, DEPTH * 64)[None, :]
    x_ptrs = x_ptr + token[:, None].to(tl.int64) * x_stride + x_offset
    token_inside = (token < M)[:, None]
    accumulator = tl.zeros((TILES * 16, TOKENS), tl.float32)
    if PDL:
        line = tl.arange(0, 128)[None, :]
        ahead = words_ptr + ((tile_n * TILES + tl.arange(0, TILES)[:, None]).to(tl.int64) * STEPS + begin) * 128 + line * 32
        ahead = tl.where((line < CHUNK * 4) & (line + begin * 4 < STEPS * 4), ahead, words_ptr)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ahead], tl.int32, is_pure=False, pack=1)
        tl.extra.cuda.gdc_wait()
    for round_ in tl.range(0, CHUNK, DEPTH, num_stages=STAGES):
        at = begin + round_ + step
        inside = tile_inside
        x_inside = token_inside
        if not EVEN:
            inside &= at < STEPS
            x_inside &= x_offset + round_ * 64 < K
        words = tl.load(words_ptrs + round_ * 128, mask=inside, other=0, eviction_policy="evict_first")
        group = (at * 64 + half * 32) // GROUP
        scales = tl.load(scales_ptr + scale_offset + group * 8, mask=inside, other=0)
        x = tl.load(x_ptrs + round_ * 64, mask=x_inside, other=0.0)
        shape: tl.constexpr = (TILES, DEPTH, 8, 1, HALVES, 1)
        if ZEROS:
            zeros = tl.load(zeros_ptr + scale_offset + group * 8, mask=inside, other=0).to(tl.int32)
            zeros = tl.reshape(zeros, shape)
        else:
            zeros = tl.full((1, 1, 1, 1, 1, 1), 0x0808, tl.int32)
        words = tl.reshape(words, (TILES, DEPTH, 8, 4, 2, 2))
        weights = _dequantise(words, tl.reshape(scales, shape), zeros, x_ptr.dtype.element_ty == tl.bfloat16)
        # [tile, depth, r, c, u, pair, half, upper, s] to rows (tile, upper, r), k (depth, u, s, half, c, pair)
        weights = tl.permute(weights, (0, 7, 2, 1, 4, 8, 6, 3, 5))
        weights = tl.reshape(weights, (TILES * 16, DEPTH * 64))
        accumulator = tl.dot(weights, tl.trans(x), accumulator)
    row = tile_n * TILES * 16 + tl.arange(0, TILES * 16)
    tile_of_launch = tile_n * tl.num_programs(0) + tile_m
    _finish(
        accumulator, out_ptr, bias_ptr, partial_ptr, arrivals_ptr, row, token, N, M, tile_of_launch, split, SPLITS, BIAS
    )


@functools.cache
def arrivals(device: torch.device) -> Tensor:
    """The counters of a device, zero between launches: every tile's last arrival resets its own."""
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def launch(x: Tensor, weight: Int4Weight, bias: Tensor | None, out: Tensor, plan: linear_table.Int4Plan, pdl: bool = False) -> None:
    """out [M, N] = x [M, K] @ weight.T + bias by `plan`; x's columns are already in the weight's order."""
    tokens, rows = out.shape
    tiles_n = triton.cdiv(rows, plan.tiles * 16)
    tiles_m = triton.cdiv(tokens, plan.tokens)
    shape = (plan.splits, tokens, rows) if plan.splits > 1 else (0,)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    arguments = (
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        x if bias is None else bias,
        out,
        partial,
        arrivals(x.device),
        tokens,
        rows,
        x.stride(0),
        weight.depth,
        weight.group,
        weight.zeros is not None,
        bias is not None,
        plan.tiles,
        plan.depth,
    )
    options = {"num_warps": plan.warps, "enable_fp_fusion": True, "launch_pdl": pdl}
    if plan.kernel == "slices":
        _slices_kernel[(tiles_n, plan.splits)](
            *arguments, plan.warps, plan.tokens, plan.splits, plan.stages, pdl, **options
        )
    else:
        _tiles_kernel[(tiles_m, tiles_n, plan.splits)](*arguments, plan.tokens, plan.splits, plan.stages, pdl, **options)


@triton.jit
def _dequantise_kernel(
    # pointers
    words_ptr,  # [N / 16, K / 64, 128] int32
    scales_ptr,  # [N / 16, groups, 8] int32
    zeros_ptr,  # [N / 16, groups, 8] int16, read if ZEROS
    out_ptr,  # [N, K]
    # dimensions
    N,
    # meta-parameters
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    TILES: tl.constexpr,
):
    STEPS: tl.constexpr = K // 64
    HALVES: tl.constexpr = 2 if GROUP == 32 else 1
    step = tl.program_id(0)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)[:, None]
    inside = tile < N // 16
    words = tl.load(
        words_ptr + (tile.to(tl.int64) * STEPS + step) * 128 + tl.arange(0, 128)[None, :],
        mask=inside,
        other=0,
        eviction_policy="evict_first",
    )
    pair_row = tl.arange(0, 8 * HALVES)[None, :] // HALVES
    half = tl.arange(0, 8 * HALVES)[None, :] % HALVES
    scale_offset = (tile * (K // GROUP) + (step * 64 + half * 32) // GROUP) * 8 + pair_row
    scales = tl.load(scales_ptr + scale_offset, mask=inside, other=0)
    shape: tl.constexpr = (TILES, 8, 1, HALVES, 1)
    if ZEROS:
        zeros = tl.reshape(tl.load(zeros_ptr + scale_offset, mask=inside, other=0).to(tl.int32), shape)
    else:
        zeros = tl.full((1, 1, 1, 1, 1), 0x0808, tl.int32)
    words = tl.reshape(words, (TILES, 8, 4, 2, 2))
    weights = _dequantise(words, tl.reshape(scales, shape), zeros, out_ptr.dtype.element_ty == tl.bfloat16)
    # [tile, r, c, u, pair, half, upper, s] to rows (tile, upper, r) and k (u, s, half, c, pair)
    weights = tl.reshape(tl.permute(weights, (0, 6, 1, 3, 7, 5, 2, 4)), (TILES * 16, 64))
    row = tl.program_id(1) * TILES * 16 + tl.arange(0, TILES * 16)
    out_ptrs = out_ptr + row[:, None].to(tl.int64) * K + step * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptrs, weights, mask=(row < N)[:, None])


def dequantise(weight: Int4Weight) -> Tensor:
    """The weight [N, K] in its dtype, columns in its own (permuted) order."""
    out = torch.empty((weight.rows, weight.depth), dtype=weight.dtype, device=weight.words.device)
    grid = (weight.depth // 64, triton.cdiv(weight.rows, 64))
    zeros = weight.scales if weight.zeros is None else weight.zeros
    _dequantise_kernel[grid](
        weight.words,
        weight.scales,
        zeros,
        out,
        weight.rows,
        weight.depth,
        weight.group,
        weight.zeros is not None,
        4,
        num_warps=4,
    )
    return out


def int4_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] (rows may be strided) of the weight's dtype @ weight [N, K] transposed + bias [N]; returns [M, N].

    Launches of one device must be on one stream: they share counters. Call it once before capturing it in a graph, so
    that the counters exist. Raises ValueError if x does not fit the weight.
    """
    if x.dtype != weight.dtype:
        raise ValueError(f"int4_linear: activations of {x.dtype}, weight packed for {weight.dtype}")
    if x.shape[1] != weight.depth:
        raise ValueError(f"int4_linear: activations have {x.shape[1]} inputs, the weight {weight.depth}")
    if weight.permutation is not None:
        x = x.index_select(1, weight.permutation)
    tokens = x.shape[0]
    plan = linear_table.int4_plan(tokens, weight.rows, weight.depth)
    if plan is None:
        return F.linear(x, dequantise(weight), bias)
    out = torch.empty((tokens, weight.rows), dtype=x.dtype, device=x.device)
    if tokens:
        launch(x, weight, bias, out, plan)
    return out
