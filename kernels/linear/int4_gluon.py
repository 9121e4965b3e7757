"""The int4 linear layer of many tokens, written in Gluon for Hopper: weights are unpacked under the
tensor cores' work.

A program has three parts. One warp has the copy engine bring rounds of 64 k, the weights of 128
rows and the activations of TOKENS tokens, into a ring of shared memory. Two warp groups take 64
rows each: they unpack a round into the registers of the tensor cores' left operand
(`int4_layout.py` has them in that order) while the product of the round before is still running,
and where that leaves the tensor cores idle the other group has work for them.

Weights are scaled as they are unpacked, so they are rounded once to the activations' dtype, as they
are where cuBLAS multiplies them: scaling sums instead would take a second accumulator and more
instructions from 64 tokens on.

Programs take tiles in turn, so those that run side by side read the same weights and activations.
The tiles that are left at the end, where they are too few for all programs, may be cut along k: each
goes to several programs, of which the last to arrive adds the parts up in their order, so results do
not depend on timing.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.arrivals import arrivals
from octavo.kernels.gluon_names import barrier, load_async, store_async, view_as
from octavo.kernels.launch import multiprocessors
from octavo.kernels.linear.int4_layout import Int4Weight
from octavo.kernels.linear.int4_table import Int4Plan

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # a consumer
UNIT = gl.constexpr(64)  # k a round


def _unpack_asm(type_: str, magic: str) -> str:
    """PTX for words s = 0, 1 of a lane and step pair: $0-$7 packed weights of (s, upper row, half),
    $8-$9 the words, then pairs of equal registers: $10 with 128 + zero (1024 in fp16) of row r in
    both halves, $12 that of row r + 8, $14 and $16 their scales.
    """
    lines = ["{ .reg .b32 number, shifted;"]
    for place in range(8):
        source, nibble, upper = f"${8 + place // 4}", place % 4, place // 2 % 2
        if nibble:
            lines.append(f"shr.b32 shifted, {source}, {4 * nibble};")
            source = "shifted"
        lines.append(f"lop3.b32 number, {source}, 0x000f000f, {magic}, 0xea;")  # (a & b) | c
        lines.append(f"sub.rn.{type_} number, number, ${10 + 2 * upper};")
        lines.append(f"mul.rn.{type_} ${place}, number, ${14 + 2 * upper};")
    return " ".join([*lines, "}"])


_BF16_ASM = gl.constexpr(_unpack_asm("bf16x2", "0x43004300"))
_FP16_ASM = gl.constexpr(_unpack_asm("f16x2", "0x64006400"))
_CONSTRAINTS = gl.constexpr(",".join(["=r"] * 8 + ["r"] * 10))
_BF16_PLACES = gl.constexpr((gl.bfloat16,) * 8)
_FP16_PLACES = gl.constexpr((gl.float16,) * 8)
# [16-row tile, r, c, u, s] of a consumer's words: lane 4 * r + c has four in a row, warps take
# tiles.
_WORDS = gl.constexpr(gl.BlockedLayout([1, 1, 1, 2, 2], [1, 8, 4, 1, 1], [4, 1, 1, 1, 1], [4, 3, 2, 1, 0]))


@gluon.jit
def _pairs(smem, GROUPS: gl.constexpr):
    """What shared memory [4, GROUPS * 8] has for rows r and r + 8 of each group, as int32 [4, 8, 1,
    GROUPS, 1].
    """
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    values = view_as(smem, smem.dtype, [4, GROUPS, 8], flat).permute((0, 2, 1))
    values = values.load(gl.SliceLayout(2, gl.SliceLayout(4, _WORDS)))
    return gl.expand_dims(gl.expand_dims(values, 2), 4).to(gl.int32)


@gluon.jit
def _read(number, words_smem, scales_smem, zeros_smem, full, pred, CONSUMER: gl.constexpr, ZEROS: gl.constexpr):
    """A consumer's words, scales and zeros of a round, once they are there."""
    STAGES: gl.constexpr = full.shape[0]
    GROUPS: gl.constexpr = scales_smem.shape[2] // 8
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    stage = number % STAGES
    mbarrier.wait(full.index(stage), number // STAGES & 1, pred=pred)
    words = gl.reshape(words_smem.index(stage).slice(CONSUMER * 4, 4, 0).load(flat), [4, 8, 4, 2, 2])
    scales = _pairs(scales_smem.index(stage).slice(CONSUMER * 4, 4, 0), GROUPS)
    zeros = scales
    if ZEROS:
        zeros = _pairs(zeros_smem.index(stage).slice(CONSUMER * 4, 4, 0), GROUPS)
    return gl.convert_layout(words, _WORDS, assert_trivial=True), scales, zeros


@gluon.jit
def _unpack(words, scales, zeros, ZEROS: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """A consumer's weights [64, 64] of a round."""
    BF16: gl.constexpr = dtype == gl.bfloat16
    magic: gl.constexpr = 0x43004300 if BF16 else 0x64006400
    if ZEROS:
        low_zero = (zeros & 0xFF) * 0x10001 + magic
        high_zero = (zeros >> 8 & 0xFF) * 0x10001 + magic
    else:
        low_zero = gl.full([4, 8, 1, 1, 1], 0x00080008 + magic, gl.int32, layout=_WORDS)
        high_zero = low_zero
    low_scale = (scales & 0xFFFF) * 0x10001
    high_scale = (scales >> 16 & 0xFFFF) * 0x10001
    n0, n1, n2, n3, n4, n5, n6, n7 = gl.inline_asm_elementwise(
        _BF16_ASM if BF16 else _FP16_ASM,
        _CONSTRAINTS,
        [words, low_zero, high_zero, low_scale, high_scale],
        _BF16_PLACES if BF16 else _FP16_PLACES,
        is_pure=True,
        pack=2,
    )
    low = gl.join(gl.join(n0, n1), gl.join(n2, n3))
    high = gl.join(gl.join(n4, n5), gl.join(n6, n7))
    # [tile, r, c, u, pair, half, upper, s] to rows (tile, upper, r), k (u, s, half, c, pair)
    numbers = gl.permute(gl.join(low, high), (0, 6, 1, 3, 7, 5, 2, 4))
    return gl.convert_layout(gl.reshape(numbers, [64, 64]), layout, assert_trivial=True)


@gluon.jit
def _pieces(cut, ROUNDS: gl.constexpr):
    """(whole tiles of this program, its pieces: those and perhaps a part of one, their rounds)."""
    whole, left, sharers = cut
    program = gl.program_id(0)
    mine = (whole - program + gl.num_programs(0) - 1) // gl.num_programs(0)
    part = program % sharers
    rounds = mine * ROUNDS
    pieces = mine
    if program < left * sharers:
        pieces += 1
        rounds += (part + 1) * ROUNDS // sharers - part * ROUNDS // sharers
    return mine, pieces, rounds


@gluon.jit
def _piece(number, mine, cut, ROUNDS: gl.constexpr):
    """(tile, its first round, the round after its last) of a piece of this program's."""
    whole, _, sharers = cut
    program = gl.program_id(0)
    tile = number * gl.num_programs(0) + program
    first = number * 0
    end = first + ROUNDS
    if number >= mine:
        tile = whole + program // sharers
        first = program % sharers * ROUNDS // sharers
        end = (program % sharers + 1) * ROUNDS // sharers
    return tile, first, end


@gluon.jit
def _by_thread(acc):
    """[ROWS, TOKENS] as [warp, half, r, octet, c]: of warp, r and c a thread has one (two of c)."""
    return gl.reshape(acc, [ROWS // 16, 2, 8, acc.shape[1] // 8, 8])


@gluon.jit
def _part_offset(layout: gl.constexpr, TOKENS: gl.constexpr):
    """Of what `_by_thread` gives, in int64, so that the compiler sees that a thread's differ by
    constants: what a warp stores at a time lies in one piece.
    """
    across: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, layout))
    warp = gl.arange(0, ROWS // 16, layout=gl.SliceLayout(1, gl.SliceLayout(2, across)))
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, across)))
    r = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, across)))
    down: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    octet = gl.arange(0, TOKENS // 8, layout=gl.SliceLayout(1, down))
    c = gl.arange(0, 8, layout=gl.SliceLayout(0, down))
    rows = gl.expand_dims(gl.expand_dims(warp * 64, 1), 2) + gl.expand_dims(gl.expand_dims(r * 8, 0), 1)
    rows = rows.to(gl.int64) + gl.expand_dims(gl.expand_dims(half.to(gl.int64) * 256, 0), 2)
    tokens = gl.expand_dims(octet.to(gl.int64) * 512, 1) + gl.expand_dims(c.to(gl.int64), 0)
    tokens = gl.expand_dims(gl.expand_dims(gl.expand_dims(tokens, 0), 1), 2)
    return gl.expand_dims(gl.expand_dims(rows, 3), 4) + tokens


@gluon.jit
def _store_part(part_ptr, acc):
    parts = _by_thread(acc)
    layout: gl.constexpr = parts.type.layout
    gl.store(part_ptr + _part_offset(layout, acc.shape[1]), parts)


@gluon.jit
def _add_part(part_ptr, acc):
    acc_layout: gl.constexpr = acc.type.layout
    sums = _by_thread(acc)
    layout: gl.constexpr = sums.type.layout
    sums += gl.load(part_ptr + _part_offset(layout, acc.shape[1]), cache_modifier=".cg")
    return gl.convert_layout(gl.reshape(sums, acc.shape), acc_layout, assert_trivial=True)


@gluon.jit
def _load(arguments, K: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr):
    x, words, scales, zeros, x_smem, words_smem, scales_smem, zeros_smem, full, empty, tiles_m, cut = arguments
    STAGES: gl.constexpr = full.shape[0]
    ROUNDS: gl.constexpr = K // UNIT
    TOKENS: gl.constexpr = x_smem.shape[1]
    TILES: gl.constexpr = words.block_shape[0]
    GROUPS: gl.constexpr = scales.block_shape[1] // 8
    BYTES: gl.constexpr = TOKENS * 128 + TILES * (512 + 32 * GROUPS + 16 * GROUPS * ZEROS)
    mine, pieces, total = _pieces(cut, ROUNDS)
    done = total * 0
    for piece in range(pieces):
        tile, first, end = _piece(piece, mine, cut, ROUNDS)
        row_tile = tile // tiles_m * TILES
        token = tile % tiles_m * TOKENS
        for round_ in range(first, end):
            number = done + round_ - first
            stage = number % STAGES
            arrived = full.index(stage)
            mbarrier.wait(empty.index(stage), number // STAGES & 1 ^ 1)
            mbarrier.expect(arrived, BYTES)
            load_async(words, [row_tile, round_ * 128], arrived, words_smem.index(stage))
            group = round_ * UNIT // GROUP * 8
            load_async(scales, [row_tile, group], arrived, scales_smem.index(stage))
            if ZEROS:
                load_async(zeros, [row_tile, group], arrived, zeros_smem.index(stage))
            load_async(x, [token, round_ * UNIT], arrived, x_smem.index(stage))
        done += end - first


@gluon.jit
def _multiply(CONSUMER: gl.constexpr, arguments, K: gl.constexpr, ZEROS: gl.constexpr, BIAS: gl.constexpr):
    x_smem, words_smem, scales_smem, zeros_smem, full, empty = arguments[:6]
    out, out_smem, bias_ptr, partial_ptr, arrivals_ptr, N, tiles_m, cut = arguments[6:]
    whole, _, sharers = cut
    ROUNDS: gl.constexpr = K // UNIT
    TOKENS: gl.constexpr = x_smem.shape[1]
    STAGES: gl.constexpr = full.shape[0]
    dtype: gl.constexpr = x_smem.dtype
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row = CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc_layout))
    out_tile = out_smem.index(CONSUMER)
    PART: gl.constexpr = CONSUMERS * ROWS * TOKENS
    mine, pieces, total = _pieces(cut, ROUNDS)
    done = total * 0
    words, scales, zeros = _read(0, words_smem, scales_smem, zeros_smem, full, total > 0, CONSUMER, ZEROS)
    a = _unpack(words, scales, zeros, ZEROS, dtype, a_layout)
    words, scales, zeros = _read(1, words_smem, scales_smem, zeros_smem, full, total > 1, CONSUMER, ZEROS)
    for piece in range(pieces):
        tile, first, end = _piece(piece, mine, cut, ROUNDS)
        acc = gl.zeros([ROWS, TOKENS], gl.float32, layout=acc_layout)
        for round_ in range(first, end):
            number = done + round_ - first
            stage = number % STAGES
            acc = warpgroup_mma(a, x_smem.index(stage).permute((1, 0)), acc, is_async=True)
            next_a = _unpack(words, scales, zeros, ZEROS, dtype, a_layout)
            # Here and not at the loop's head, because ptxas moves no arithmetic across a branch:
            # without one it puts the unpacking behind the wait for the product, and nothing
            # overlaps.
            words, scales, zeros = _read(
                number + 2, words_smem, scales_smem, zeros_smem, full, number + 2 < total, CONSUMER, ZEROS
            )
            acc, a = warpgroup_mma_wait(0, deps=[acc, a])
            mbarrier.arrive(empty.index(stage), count=1)
            a = next_a
        done += end - first
        last = True
        if end - first < ROUNDS:
            # Where the parts of this program's tile begin.
            part = gl.program_id(0) % sharers
            parts = partial_ptr + (gl.program_id(0) - part).to(gl.int64) * PART + CONSUMER * ROWS * TOKENS
            _store_part(parts + part.to(gl.int64) * PART, acc)
            barrier()
            counter = arrivals_ptr + CONSUMERS * (tile - whole) + CONSUMER
            arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            barrier()
            last = arrived == sharers - 1
            if last:
                gl.store(counter, 0)
                acc = gl.zeros([ROWS, TOKENS], gl.float32, layout=acc_layout)
                for other in range(sharers):
                    acc = _add_part(parts + other.to(gl.int64) * PART, acc)
        if last:
            first_row = tile // tiles_m * (CONSUMERS * ROWS)
            if BIAS:
                bias = gl.load(bias_ptr + first_row + row, mask=first_row + row < N, other=0.0)
                acc += bias.to(gl.float32)[:, None]
            tma.store_wait(0)
            barrier()
            out_tile.permute((1, 0)).store(acc.to(dtype))
            fence_async_shared()
            barrier()
            store_async(out, [tile % tiles_m * TOKENS, first_row + CONSUMER * ROWS], out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles_m", "whole", "left", "sharers"])
def _gluon_kernel(
    x,  # descriptor of [M, K], [TOKENS, 64] a load
    words,  # descriptor of [N / 16, K * 2] int32, [4 * CONSUMERS, 128] a load
    scales,  # descriptor of [N / 16, groups * 8] int32, [4 * CONSUMERS, 8 * groups of a round] a load
    zeros,  # descriptor of [N / 16, groups * 8] int16, likewise, if ZEROS
    out,  # descriptor of [M, N], [TOKENS, 64] a store
    bias_ptr,  # [N], read if BIAS
    partial_ptr,  # [left, sharers, 64 * CONSUMERS, TOKENS] fp32
    arrivals_ptr,  # [left, CONSUMERS] int32, all zero before and after
    N,
    tiles_m,
    whole,  # tiles that are one program's each, the first ones
    left,  # the others
    sharers,  # programs that share each of those; at least 2 if there are any
    # meta-parameters
    K: gl.constexpr,
    GROUP: gl.constexpr,
    ZEROS: gl.constexpr,
    BIAS: gl.constexpr,
    STAGES: gl.constexpr,
):
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    x_smem = gl.allocate_shared_memory(x.dtype, [STAGES, x.block_shape[0], x.block_shape[1]], x.layout)
    words_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 4 * CONSUMERS, 128], words.layout)
    scales_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 4 * CONSUMERS, scales.block_shape[1]], scales.layout)
    zeros_smem = scales_smem
    if ZEROS:
        zeros_smem = gl.allocate_shared_memory(gl.int16, [STAGES, 4 * CONSUMERS, zeros.block_shape[1]], zeros.layout)
    out_smem = gl.allocate_shared_memory(x.dtype, [CONSUMERS, out.block_shape[0], out.block_shape[1]], out.layout)
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    cut = (whole, left, sharers)
    load = (x, words, scales, zeros, x_smem, words_smem, scales_smem, zeros_smem, full, empty, tiles_m, cut)
    work = (
        x_smem, words_smem, scales_smem, zeros_smem, full, empty, out, out_smem, bias_ptr,
        partial_ptr, arrivals_ptr, N, tiles_m, cut,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_multiply, (FIRST, work, K, ZEROS, BIAS)),
            (_multiply, (SECOND, work, K, ZEROS, BIAS)),
            (_load, (load, K, GROUP, ZEROS)),
        ],
        [4, 1],  # warps of all roles but the first, which has the launch's four
        [232, 40],  # their registers a thread; the first has what is left
    )


def launch(x: Tensor, weight: Int4Weight, bias: Tensor | None, out: Tensor, plan: Int4Plan) -> None:
    """`linear_int4.launch` of a plan of this kernel, for what `takes_gluon`; M, N and K are not 0."""
    tokens, rows = out.shape
    consumers = CONSUMERS.value
    tiles_m = triton.cdiv(tokens, plan.tokens)
    tiles = triton.cdiv(rows, 64 * consumers) * tiles_m
    programs = min(plan.programs, multiprocessors(x.device))
    left = tiles % programs
    sharers = min(plan.splits, programs // left, weight.depth // 64) if left else 1
    if sharers == 1:
        left = 0
    if tiles < programs:
        programs = tiles * sharers
    groups = max(1, 64 // weight.group)

    def table(tensor: Tensor, block: int) -> TensorDescriptor:
        tensor = tensor.view(tensor.shape[0], -1)
        layout = gl.NVMMASharedLayout(0, tensor.element_size() * 8, 2)
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [4 * consumers, block], layout)

    swizzled = gl.NVMMASharedLayout(128, 16, 2)
    scales = table(weight.scales, groups * 8)
    partial = torch.empty((left * sharers, 64 * consumers, plan.tokens), dtype=torch.float32, device=x.device)
    _gluon_kernel[(programs,)](
        TensorDescriptor(x, list(x.shape), list(x.stride()), [plan.tokens, 64], swizzled),
        table(weight.words, 128),
        scales,
        scales if weight.zeros is None else table(weight.zeros, groups * 8),
        TensorDescriptor(out, list(out.shape), list(out.stride()), [plan.tokens, 64], swizzled),
        x if bias is None else bias,
        partial,
        arrivals(x.device),
        rows,
        tiles_m,
        tiles - left,
        left,
        sharers,
        weight.depth,
        weight.group,
        weight.zeros is not None,
        bias is not None,
        plan.ahead,
        num_warps=4,
    )
