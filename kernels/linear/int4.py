"""Linear layers with 4-bit weights: weights x tokens on the tensor cores, weights unpacked in
registers.

Both kernels multiply the weight as left operand, straight from the registers into which
`int4_layout.py` makes a load put it: no weight passes through shared memory once it is unpacked.
Unpacking is, for a pair of weights, a shift, a `lop3` that masks two numbers and sets the exponent
of 128 (1024 in fp16) beside each, and a packed subtraction of 128 + zero, which is exact. Scales
stay out of it: the product of a group's numbers is summed in fp32 and then scaled, so weights are
never rounded.

`_slices_kernel` is for few tokens: every warp takes its own slice of k of the same rows,
activations too go from memory straight into the registers of the tensor cores' right operand, and
slices are added at the end. `_tiles_kernel` is for more: warps take rows and share the activations.
Either can be split along k over programs (`split_k.py`). `int4_gluon.py` has the kernel of many
tokens on Hopper.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.arrivals import arrivals
from octavo.kernels.launch import has_gluon, has_pdl
from octavo.kernels.linear.int4_layout import Int4Weight
from octavo.kernels.linear.int4_table import Int4Plan, int4_plan
from octavo.kernels.linear.split_k import finish


def _unpack_asm(type_: str, magic: str) -> str:
    """PTX for words s = 0, 1 of a lane and step pair: $0-$7 packed numbers less zero of (s, upper
    row, half), $8-$9 the words, $10-$11 twice the register with 128 + zero of row r in both halves,
    $12-$13 that of row r + 8.
    """
    lines = ["{ .reg .b32 number, shifted;"]
    for place in range(8):
        source, nibble, upper = f"${8 + place // 4}", place % 4, place // 2 % 2
        if nibble:
            lines.append(f"shr.b32 shifted, {source}, {4 * nibble};")
            source = "shifted"
        lines.append(f"lop3.b32 number, {source}, 0x000f000f, {magic}, 0xea;")  # (a & b) | c
        lines.append(f"sub.rn.{type_} ${place}, number, ${10 + 2 * upper};")
    return " ".join([*lines, "}"])


_BF16_ASM = tl.constexpr(_unpack_asm("bf16x2", "0x43004300"))
_FP16_ASM = tl.constexpr(_unpack_asm("f16x2", "0x64006400"))
_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 6))
_BF16_PLACES = tl.constexpr((tl.bfloat16,) * 8)
_FP16_PLACES = tl.constexpr((tl.float16,) * 8)
# Triton's interpreter has no inline assembly.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _place(words, low_zero, high_zero, PLACE: tl.constexpr, dtype: tl.constexpr):
    """In plain arithmetic the numbers that `_unpack_asm` puts into $PLACE."""
    first, second = tl.split(words)
    source = first if PLACE < 4 else second
    numbers = tl.join(source >> (4 * (PLACE % 4)), source >> (4 * (PLACE % 4) + 16)) & 15
    return (numbers - (high_zero if PLACE // 2 % 2 else low_zero)).to(dtype)


@triton.jit
def _unpack(words, zeros, dtype: tl.constexpr):
    """Numbers less their zeros, of words [.., 8 r, 4 c, U, 2 s] and zeros [.., 8, 1, 1, 1] (two
    bytes, in int32).

    Returns [.., 8 r, 4 c, U, 2 pair, 2 half, 2 upper row, 2 s].
    """
    low_zero, high_zero = zeros & 0xFF, zeros >> 8 & 0xFF
    if _INTERPRETED:
        n0 = _place(words, low_zero, high_zero, 0, dtype)
        n1 = _place(words, low_zero, high_zero, 1, dtype)
        n2 = _place(words, low_zero, high_zero, 2, dtype)
        n3 = _place(words, low_zero, high_zero, 3, dtype)
        n4 = _place(words, low_zero, high_zero, 4, dtype)
        n5 = _place(words, low_zero, high_zero, 5, dtype)
        n6 = _place(words, low_zero, high_zero, 6, dtype)
        n7 = _place(words, low_zero, high_zero, 7, dtype)
    else:
        BF16: tl.constexpr = dtype == tl.bfloat16
        magic: tl.constexpr = 0x43004300 if BF16 else 0x64006400
        n0, n1, n2, n3, n4, n5, n6, n7 = tl.inline_asm_elementwise(
            _BF16_ASM if BF16 else _FP16_ASM,
            _CONSTRAINTS,
            [words, low_zero * 0x10001 + magic, high_zero * 0x10001 + magic],
            _BF16_PLACES if BF16 else _FP16_PLACES,
            is_pure=True,
            pack=2,
        )
    return tl.join(tl.join(tl.join(n0, n1), tl.join(n2, n3)), tl.join(tl.join(n4, n5), tl.join(n6, n7)))


@triton.jit
def _pair_scales(scales, dtype: tl.constexpr):
    """Scales of rows r and r + 8 in the halves of int32 [.., 8] as fp32 [.., 8, 2]."""
    low = (scales & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (scales >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low.to(tl.float32), high.to(tl.float32))


@triton.jit
def _word_offset(HALVES: tl.constexpr):
    """Of a lane's words in a unit of 32 x HALVES k, [64 * HALVES]."""
    place = tl.arange(0, 64 * HALVES)
    return place if HALVES == 2 else place // 2 * 4 + place % 2


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
    HALVES: tl.constexpr,  # of 32 k in a unit, which has one scale a row
    TILES: tl.constexpr,  # of 16 rows, a program
    TOKENS: tl.constexpr,
    SLICES: tl.constexpr,  # of k: one a warp, a unit a round
    AHEAD: tl.constexpr,  # rounds whose weights are in flight
    SPLITS: tl.constexpr,
    LAUNCH: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    UNIT: tl.constexpr = 32 * HALVES
    UNITS: tl.constexpr = K // UNIT
    GROUPS: tl.constexpr = K // GROUP
    CHUNK: tl.constexpr = (UNITS + SPLITS * SLICES - 1) // (SPLITS * SLICES) * SLICES
    ROUNDS: tl.constexpr = CHUNK // SLICES
    EVEN: tl.constexpr = CHUNK * SPLITS == UNITS and ROUNDS % AHEAD == 0 and ROUNDS >= AHEAD
    WORDS: tl.constexpr = SLICES * HALVES * 64  # between rounds; SLICES is even
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    limit = tl.minimum((split + 1) * CHUNK, UNITS)
    # [SLICES, TILES, ..]: Triton gives warps to the first dimension, each its slice.
    unit = split * CHUNK + tl.arange(0, SLICES)[:, None, None]
    tile = tile_n * TILES + tl.arange(0, TILES)[None, :, None]
    # A program past the end does the last rows again, and does not write them: loads without a mask
    # are cheaper.
    tile = tl.minimum(tile, N // 16 - 1)
    words_ptrs = words_ptr + tile.to(tl.int64) * (K // 64 * 128) + _word_offset(HALVES)[None, None, :]
    words_ptrs += unit // (2 // HALVES) * 128 + unit % (2 // HALVES) * 2
    group_offset = tile * (GROUPS * 8) + tl.arange(0, 8)[None, None, :]
    # [4 c, 8 tokens, SLICES, token octets, 4 * HALVES of (half of 32, s, half), 2 pair]: lanes are
    # 4 * token + c.
    octet = tl.arange(0, TOKENS // 8)[None, None, None, :, None, None]
    token = tl.minimum(octet * 8 + tl.arange(0, 8)[None, :, None, None, None, None], M - 1)
    x_unit = split * CHUNK + tl.arange(0, SLICES)[None, None, :, None, None, None]
    x_k = tl.arange(0, 4 * HALVES)[None, None, None, None, :, None] * 8
    x_k += tl.arange(0, 4)[:, None, None, None, None, None] * 2 + tl.arange(0, 2)[None, None, None, None, None, :]
    x_ptrs = x_ptr + token.to(tl.int64) * x_stride + x_unit * UNIT + x_k
    words, scales, zeros = (), (), ()  # tuples grow by +: Triton knows no starred expression
    for i in tl.static_range(AHEAD):
        offset = group_offset + (unit + i * SLICES) * UNIT // GROUP * 8
        if EVEN:
            weights = tl.load(words_ptrs + i * WORDS, eviction_policy="evict_first")
            scale = tl.load(scales_ptr + offset)
        else:
            inside = unit + i * SLICES < limit
            weights = tl.load(words_ptrs + i * WORDS, mask=inside, other=0, eviction_policy="evict_first")
            scale = tl.load(scales_ptr + offset, mask=inside, other=0)
        words = words + (weights,)  # noqa: RUF005
        scales = scales + (scale,)  # noqa: RUF005
        if ZEROS:
            zeros = zeros + (tl.load(zeros_ptr + offset, mask=unit + i * SLICES < limit, other=0),)  # noqa: RUF005
    if LAUNCH != "plain":
        tl.extra.cuda.gdc_wait()
    if EVEN:
        x = tl.load(x_ptrs)
    else:
        x = tl.load(x_ptrs, mask=x_unit < limit, other=0.0)
    accumulator = tl.zeros((SLICES, TILES * 16, TOKENS), tl.float32)
    for first in tl.range(0, ROUNDS, AHEAD, num_stages=1):
        next_words, next_scales, next_zeros = (), (), ()
        for i in tl.static_range(AHEAD):
            if ROUNDS > AHEAD:
                next_unit = unit + (first + i + AHEAD) * SLICES
                more = next_unit < limit
                next_ptrs = words_ptrs + (i + AHEAD) * WORDS
                next_words = next_words + (tl.load(next_ptrs, mask=more, other=0, eviction_policy="evict_first"),)  # noqa: RUF005
                next_group = group_offset + next_unit * UNIT // GROUP * 8
                next_scales = next_scales + (tl.load(scales_ptr + next_group, mask=more, other=0),)  # noqa: RUF005
                if ZEROS:
                    next_zeros = next_zeros + (tl.load(zeros_ptr + next_group, mask=more, other=0),)  # noqa: RUF005
            if EVEN and i + 1 < AHEAD:
                next_x = tl.load(x_ptrs + (i + 1) * (SLICES * UNIT))
            else:
                x_inside = x_unit + (first + i + 1) * SLICES < limit
                next_x = tl.load(x_ptrs + (i + 1) * (SLICES * UNIT), mask=x_inside, other=0.0)
            if ZEROS:
                zero = tl.reshape(zeros[i].to(tl.int32), (SLICES, TILES, 8, 1, 1, 1))
            else:
                zero = tl.full((1, 1, 1, 1, 1, 1), 0x0808, tl.int32)
            numbers = _unpack(tl.reshape(words[i], (SLICES, TILES, 8, 4, HALVES, 2)), zero, dtype)
            # [slice, tile, r, c, u, pair, half, upper, s] to rows (tile, upper, r) and k (u, s, c,
            # half, pair): Triton wants four consecutive k of a lane where operands are joined, so k
            # is taken in another order, of x too.
            numbers = tl.reshape(tl.permute(numbers, (0, 1, 7, 2, 4, 8, 3, 6, 5)), (SLICES, TILES * 16, UNIT))
            x = tl.reshape(x, (4, 8, SLICES, TOKENS // 8, 2 * HALVES, 2, 2))
            x = tl.reshape(tl.permute(x, (2, 4, 0, 5, 6, 3, 1)), (SLICES, UNIT, TOKENS))
            product = tl.dot(numbers, x)
            row_scale = tl.permute(_pair_scales(scales[i], dtype), (0, 1, 3, 2))
            accumulator += product * tl.reshape(row_scale, (SLICES, TILES * 16, 1))
            x = next_x
        if ROUNDS > AHEAD:
            words, scales, zeros = next_words, next_scales, next_zeros
            words_ptrs += AHEAD * WORDS
            x_ptrs += AHEAD * SLICES * UNIT
    if LAUNCH != "plain":
        tl.extra.cuda.gdc_launch_dependents()
    row = tile_n * TILES * 16 + tl.arange(0, TILES * 16)
    total = tl.sum(accumulator, 0)
    token = tl.arange(0, TOKENS)
    finish(total, out_ptr, bias_ptr, partial_ptr, arrivals_ptr, row, token, N, M, tile_n, split, SPLITS, BIAS)


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
    HALVES: tl.constexpr,  # of 32 k in a unit
    TILES: tl.constexpr,  # of 16 rows, a program
    TOKENS: tl.constexpr,  # a program
    DEPTH: tl.constexpr,  # units a round, all of one group
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    LAUNCH: tl.constexpr,
):
    if LAUNCH != "plain":
        tl.extra.cuda.gdc_wait()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    UNIT: tl.constexpr = 32 * HALVES
    UNITS: tl.constexpr = K // UNIT
    GROUPS: tl.constexpr = K // GROUP
    CHUNK: tl.constexpr = (UNITS + SPLITS * DEPTH - 1) // (SPLITS * DEPTH) * DEPTH
    EVEN: tl.constexpr = CHUNK * SPLITS == UNITS
    # Programs of the same rows run side by side: memory gives them the weights once.
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    split = tl.program_id(2)
    # [TILES, DEPTH, ..]: Triton gives warps to the first dimension, as the tensor cores do.
    first_unit = split * CHUNK + tl.arange(0, 1)[None, :]
    unit = split * CHUNK + tl.arange(0, DEPTH)[None, :, None]
    tile = tile_n * TILES + tl.arange(0, TILES)[:, None, None]
    tile_inside = tile < N // 16
    words_ptrs = words_ptr + tile.to(tl.int64) * (K // 64 * 128) + _word_offset(HALVES)[None, None, :]
    group_tile = tile_n * TILES + tl.arange(0, TILES)[:, None]
    group_offset = group_tile * (GROUPS * 8) + tl.arange(0, 8)[None, :]
    token = tile_m * TOKENS + tl.arange(0, TOKENS)
    x_k = split * CHUNK * UNIT + tl.arange(0, DEPTH * UNIT)[None, :]
    x_ptrs = x_ptr + token[:, None].to(tl.int64) * x_stride + x_k
    accumulator = tl.zeros((TILES * 16, TOKENS), tl.float32)
    for round_ in tl.range(0, CHUNK, DEPTH, num_stages=STAGES):
        at = unit + round_
        first = first_unit + round_
        inside = tile_inside
        group_inside = group_tile < N // 16
        x_inside = (token < M)[:, None]
        if not EVEN:
            inside &= at < UNITS
            group_inside &= first < UNITS
            x_inside &= x_k + round_ * UNIT < K
        offset = at // (2 // HALVES) * 128 + at % (2 // HALVES) * 2
        words = tl.load(words_ptrs + offset, mask=inside, other=0, eviction_policy="evict_first")
        offset = group_offset + first * UNIT // GROUP * 8
        scales = tl.load(scales_ptr + offset, mask=group_inside, other=0)
        x = tl.load(x_ptrs + round_ * UNIT, mask=x_inside, other=0.0)
        if ZEROS:
            zeros = tl.load(zeros_ptr + offset, mask=group_inside, other=0).to(tl.int32)
            zeros = tl.reshape(zeros, (TILES, 1, 8, 1, 1, 1))
        else:
            zeros = tl.full((1, 1, 1, 1, 1, 1), 0x0808, tl.int32)
        numbers = _unpack(tl.reshape(words, (TILES, DEPTH, 8, 4, HALVES, 2)), zeros, dtype)
        # [tile, depth, r, c, u, pair, half, upper, s] to rows (tile, upper, r), k (depth, u, s,
        # half, c, pair)
        numbers = tl.reshape(tl.permute(numbers, (0, 7, 2, 1, 4, 8, 6, 3, 5)), (TILES * 16, DEPTH * UNIT))
        # The scaled sum also keeps Triton 3.6 from leaving products in flight over rounds, whose
        # left operand it then overwrites.
        product = tl.dot(numbers, tl.trans(x))
        scale = tl.permute(_pair_scales(scales, dtype), (0, 2, 1))
        accumulator += product * tl.reshape(scale, (TILES * 16, 1))
    if LAUNCH != "plain":
        tl.extra.cuda.gdc_launch_dependents()
    row = tile_n * TILES * 16 + tl.arange(0, TILES * 16)
    tile = tile_n * tl.num_programs(0) + tile_m
    finish(accumulator, out_ptr, bias_ptr, partial_ptr, arrivals_ptr, row, token, N, M, tile, split, SPLITS, BIAS)


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
    HALVES: tl.constexpr,
    TILES: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    UNIT: tl.constexpr = 32 * HALVES
    unit = tl.program_id(0)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)[:, None]
    inside = tile < N // 16
    offset = unit // (2 // HALVES) * 128 + unit % (2 // HALVES) * 2
    words_ptrs = words_ptr + tile.to(tl.int64) * (K // 64 * 128) + _word_offset(HALVES)[None, :] + offset
    words = tl.load(words_ptrs, mask=inside, other=0, eviction_policy="evict_first")
    offset = (tile * (K // GROUP) + unit * UNIT // GROUP) * 8 + tl.arange(0, 8)[None, :]
    scales = tl.load(scales_ptr + offset, mask=inside, other=0)
    if ZEROS:
        zeros = tl.reshape(tl.load(zeros_ptr + offset, mask=inside, other=0).to(tl.int32), (TILES, 8, 1, 1, 1))
    else:
        zeros = tl.full((1, 1, 1, 1, 1), 0x0808, tl.int32)
    numbers = _unpack(tl.reshape(words, (TILES, 8, 4, HALVES, 2)), zeros, dtype)
    # [tile, r, c, u, pair, half, upper, s] to rows (tile, upper, r) and k (u, s, half, c, pair)
    numbers = tl.reshape(tl.permute(numbers, (0, 6, 1, 3, 7, 5, 2, 4)), (TILES * 16, UNIT))
    scale = tl.reshape(tl.permute(_pair_scales(scales, dtype), (0, 2, 1)), (TILES * 16, 1))
    row = tl.program_id(1) * TILES * 16 + tl.arange(0, TILES * 16)
    out_ptrs = out_ptr + row[:, None].to(tl.int64) * K + unit * UNIT + tl.arange(0, UNIT)[None, :]
    tl.store(out_ptrs, (numbers.to(tl.float32) * scale).to(dtype), mask=(row < N)[:, None])


def launch(x: Tensor, weight: Int4Weight, bias: Tensor | None, out: Tensor, plan: Int4Plan) -> None:
    """out [M, N] = x [M, K] @ weight.T + bias by `plan`; x's columns are already in the weight's
    order.
    """
    if plan.kernel == "gluon":
        from octavo.kernels.linear import int4_gluon

        int4_gluon.launch(x, weight, bias, out, plan)
        return
    tokens, rows = out.shape
    tiles_n = triton.cdiv(rows, plan.tiles * 16)
    tiles_m = triton.cdiv(tokens, plan.tokens)
    shape = (plan.splits, tokens, rows) if plan.splits > 1 else (0,)
    arguments = (
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        x if bias is None else bias,
        out,
        torch.empty(shape, dtype=torch.float32, device=x.device),
        arrivals(x.device),
        tokens,
        rows,
        x.stride(0),
        weight.depth,
        weight.group,
        weight.zeros is not None,
        bias is not None,
        weight.halves,
        plan.tiles,
        plan.tokens,
    )
    how = plan.launch if has_pdl(x.device) else "plain"
    options = {"num_warps": plan.warps, "launch_pdl": how != "plain", "enable_fp_fusion": True}
    if plan.kernel == "slices":
        _slices_kernel[(tiles_n, plan.splits)](*arguments, plan.warps, plan.ahead, plan.splits, how, **options)
        return
    # A round of the tiles kernel has one scale.
    fits = weight.group == weight.depth or weight.group % (64 * plan.depth) == 0
    depth = plan.depth if fits else 1
    _tiles_kernel[(tiles_m, tiles_n, plan.splits)](*arguments, depth, plan.ahead, plan.splits, how, **options)


def dequantise(weight: Int4Weight) -> Tensor:
    """The weight [N, K] in its dtype, columns in its own (permuted) order."""
    out = torch.empty((weight.rows, weight.depth), dtype=weight.dtype, device=weight.words.device)
    _dequantise_kernel[(weight.depth // (32 * weight.halves), triton.cdiv(weight.rows, 64))](
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        out,
        weight.rows,
        weight.depth,
        weight.group,
        weight.zeros is not None,
        weight.halves,
        4,
        num_warps=4,
    )
    return out


def takes_gluon(x: Tensor) -> bool:
    """Whether the Gluon kernel can take x [M, K]: the copy engine wants addresses and strides of
    whole 16 bytes.
    """
    return has_gluon(x.device) and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def int4_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] (rows may be strided) of the weight's dtype @ weight [N, K] transposed + bias [N];
    returns [M, N].

    Launches of one device must be on one stream: they share counters. Call it once before capturing
    it in a graph, so that the counters exist. Raises ValueError if x does not fit the weight.
    """
    if x.dtype != weight.dtype:
        raise ValueError(f"int4_linear: activations of {x.dtype}, weight packed for {weight.dtype}")
    if x.shape[1] != weight.depth:
        raise ValueError(f"int4_linear: activations have {x.shape[1]} inputs, the weight {weight.depth}")
    if weight.permutation is not None:
        x = x.index_select(1, weight.permutation)
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens = x.shape[0]
    plan = int4_plan(tokens, weight.rows, weight.depth, takes_gluon(x))
    if plan is None:
        return F.linear(x, dequantise(weight), bias)
    out = torch.empty((tokens, weight.rows), dtype=x.dtype, device=x.device)
    if tokens:
        launch(x, weight, bias, out, plan)
    return out
