"""The product of 8-bit activations and weights on Hopper, written in Gluon: one warp feeds shared memory, four or
eight multiply.

A program for each multiprocessor takes an equal stretch of the line of (tile, step of K), whatever the shape: so all
of them finish together, and none waits for a last wave. A tile that several programs share goes to scratch in
pieces, and the last to arrive adds them up in the order of K (so the answer never depends on the schedule).

The first weights of a stretch are on their way before the preceding kernel has ended: there is room for two programs'
buffers in a multiprocessor, and weights depend on nobody.

Source of the line of steps: Osama et al., "Stream-K" (2023).
"""

import functools

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

from octavo.kernels.arrivals import MAX_ARRIVALS, arrivals
from octavo.kernels.linear_8bit_table import Stream

# Gluon is young: both have other names after Triton 3.6.
_all_threads = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _wait_for_predecessor():
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _let_successor_start():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _stretch(rows, columns, steps, BLOCK_A: gl.constexpr, BLOCK_B: gl.constexpr, SPLIT: gl.constexpr):
    """My part of the line, [begin, end), and the line's length."""
    tiles = gl.cdiv(rows, BLOCK_A) * gl.cdiv(columns, BLOCK_B)
    program, programs = gl.program_id(0), gl.num_programs(0)
    if SPLIT:
        total = tiles * steps
        return program * total // programs, (program + 1) * total // programs, total
    return program * tiles // programs * steps, (program + 1) * tiles // programs * steps, tiles * steps


@gluon.jit
def _place(tile, rows, columns, BLOCK_A: gl.constexpr, BLOCK_B: gl.constexpr, A_IS_WEIGHT: gl.constexpr):
    """First row and column of a tile: those of the tokens change fastest, so each weight comes from memory once."""
    if A_IS_WEIGHT:
        across = gl.cdiv(columns, BLOCK_B)
        return tile // across * BLOCK_A, tile % across * BLOCK_B
    across = gl.cdiv(rows, BLOCK_A)
    return tile % across * BLOCK_A, tile // across * BLOCK_B


@gluon.jit
def _feed(
    a_desc,
    b_desc,
    a_buffer,
    b_buffer,
    full,
    empty,
    rows,
    columns,
    K,
    BLOCK_A: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    A_IS_WEIGHT: gl.constexpr,
    TRIGGER: gl.constexpr,
):
    steps = gl.cdiv(K, BLOCK_K)
    begin, end, _ = _stretch(rows, columns, steps, BLOCK_A, BLOCK_B, SPLIT)
    A_BYTES: gl.constexpr = BLOCK_A * BLOCK_K * a_buffer.dtype.primitive_bitwidth // 8
    BYTES: gl.constexpr = A_BYTES + BLOCK_B * BLOCK_K * b_buffer.dtype.primitive_bitwidth // 8
    ahead = gl.minimum(end - begin, STAGES)
    for stage in range(ahead):
        row, column = _place((begin + stage) // steps, rows, columns, BLOCK_A, BLOCK_B, A_IS_WEIGHT)
        k = (begin + stage) % steps * BLOCK_K
        mbarrier.expect(full.index(stage), BYTES)
        if A_IS_WEIGHT:
            _load(a_desc, [row, k], full.index(stage), a_buffer.index(stage))
        else:
            _load(b_desc, [column, k], full.index(stage), b_buffer.index(stage))
    _wait_for_predecessor()
    if TRIGGER == 0:
        _let_successor_start()
    for stage in range(ahead):
        row, column = _place((begin + stage) // steps, rows, columns, BLOCK_A, BLOCK_B, A_IS_WEIGHT)
        k = (begin + stage) % steps * BLOCK_K
        if A_IS_WEIGHT:
            _load(b_desc, [column, k], full.index(stage), b_buffer.index(stage))
        else:
            _load(a_desc, [row, k], full.index(stage), a_buffer.index(stage))
    for position in range(begin + ahead, end):
        row, column = _place(position // steps, rows, columns, BLOCK_A, BLOCK_B, A_IS_WEIGHT)
        k = position % steps * BLOCK_K
        turn = position - begin
        stage = turn % STAGES
        mbarrier.wait(empty.index(stage), (turn // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), BYTES)
        _load(a_desc, [row, k], full.index(stage), a_buffer.index(stage))
        _load(b_desc, [column, k], full.index(stage), b_buffer.index(stage))
    if TRIGGER == 1:
        _let_successor_start()


@gluon.jit
def _multiply(
    a_buffer,
    b_buffer,
    full,
    empty,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    a_scale_stride,
    b_scale_stride,
    out_stride,
    rows,
    columns,
    K,
    BLOCK_A: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    SPLIT: gl.constexpr,
    A_IS_WEIGHT: gl.constexpr,
    BIAS: gl.constexpr,
):
    MIXED: gl.constexpr = a_buffer.dtype != b_buffer.dtype  # 16-bit activations: A is converted in registers
    INTEGER: gl.constexpr = b_buffer.dtype == gl.int8
    WIDTH: gl.constexpr = min(BLOCK_B, 128) if INTEGER else BLOCK_B
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, WIDTH, 16 if MIXED else 32]
    )
    steps = gl.cdiv(K, BLOCK_K)
    begin, end, total = _stretch(rows, columns, steps, BLOCK_A, BLOCK_B, SPLIT)
    programs = gl.num_programs(0)
    turn = 0
    _wait_for_predecessor()
    for tile in range(begin // steps, gl.cdiv(end, steps)):
        first = gl.maximum(begin - tile * steps, 0)
        last = gl.minimum(end - tile * steps, steps)
        sums = gl.zeros([BLOCK_A, BLOCK_B], gl.int32 if INTEGER else gl.float32, layout)
        for step in range(first, last):
            stage = turn % STAGES
            mbarrier.wait(full.index(stage), turn // STAGES & 1)
            b = b_buffer.index(stage).permute((1, 0))
            if MIXED:
                a = a_buffer.index(stage).load(gl.DotOperandLayout(0, layout, 2)).to(b_buffer.dtype)
                sums = warpgroup_mma(a, b, sums, is_async=False)
                mbarrier.arrive(empty.index(stage), count=1)
            else:
                sums = warpgroup_mma(a_buffer.index(stage), b, sums, is_async=True)
                sums = warpgroup_mma_wait(1, deps=[sums])
                mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1, pred=step > first)
            turn += 1
        if not MIXED:
            sums = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1)
        product = sums.to(gl.float32)

        inner_row = gl.arange(0, BLOCK_A, gl.SliceLayout(1, layout))
        inner_column = gl.arange(0, BLOCK_B, gl.SliceLayout(0, layout))
        complete = True
        if SPLIT:
            lowest = ((tile * steps + 1) * programs - 1) // total
            highest = ((tile * steps + steps) * programs - 1) // total
            complete = lowest == highest
            if not complete:
                # A program has at most two pieces: the end of a tile that others began, the start of another.
                AREA: gl.constexpr = BLOCK_A * BLOCK_B
                inner = partial_ptr + inner_row[:, None] * BLOCK_B + inner_column[None, :]
                program = gl.program_id(0)
                gl.store(inner + (2 * program + (program == lowest).to(gl.int32)) * AREA, product)
                _all_threads()  # the counter tells of the whole program's stores
                pieces = highest - lowest + 1
                complete = gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") == pieces - 1
                if complete:
                    gl.store(arrivals_ptr + tile, 0)
                    product = gl.zeros([BLOCK_A, BLOCK_B], gl.float32, layout)
                    for piece in range(lowest, highest + 1):
                        slot = 2 * piece + (piece == lowest).to(gl.int32)
                        product += gl.load(inner + slot * AREA, cache_modifier=".cg")
        if complete:
            row, column = _place(tile, rows, columns, BLOCK_A, BLOCK_B, A_IS_WEIGHT)
            row += inner_row
            column += inner_column
            product *= gl.load(a_scale_ptr + row * a_scale_stride, mask=row < rows, other=0.0)[:, None]
            if not MIXED:
                product *= gl.load(b_scale_ptr + column * b_scale_stride, mask=column < columns, other=0.0)[None, :]
            inside = (row < rows)[:, None] & (column < columns)[None, :]
            if A_IS_WEIGHT:
                if BIAS:
                    product += gl.load(bias_ptr + row, mask=row < rows, other=0.0).to(gl.float32)[:, None]
                pointers = out_ptr + column.to(gl.int64)[None, :] * out_stride + row[:, None]
            else:
                if BIAS:
                    product += gl.load(bias_ptr + column, mask=column < columns, other=0.0).to(gl.float32)[None, :]
                pointers = out_ptr + row.to(gl.int64)[:, None] * out_stride + column[None, :]
            gl.store(pointers, product.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _stream_kernel(
    # descriptors: the weight [N, K] and the activations [M, K], 8 bits each; A is the one whose rows the matrix unit
    # takes 64 at a time
    a_desc,
    b_desc,
    # pointers
    a_scale_ptr,  # [rows] or [1] fp32
    b_scale_ptr,  # [columns] or [1] fp32
    bias_ptr,  # [N], read if BIAS
    out_ptr,  # [M, N]
    partial_ptr,  # [2 * programs, BLOCK_A, BLOCK_B] fp32, used if SPLIT
    arrivals_ptr,  # [tiles] int32, zero before and after, used if SPLIT
    # strides, in elements
    a_scale_stride,
    b_scale_stride,
    out_stride,
    # dimensions
    rows,  # of A
    columns,  # rows of B
    K,
    # meta-parameters
    BLOCK_A: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    SPLIT: gl.constexpr,
    A_IS_WEIGHT: gl.constexpr,
    BIAS: gl.constexpr,
    TRIGGER: gl.constexpr,
):
    a_buffer = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_A, BLOCK_K], a_desc.layout)
    b_buffer = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_B, BLOCK_K], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    a_buffer,
                    b_buffer,
                    full,
                    empty,
                    a_scale_ptr,
                    b_scale_ptr,
                    bias_ptr,
                    out_ptr,
                    partial_ptr,
                    arrivals_ptr,
                    a_scale_stride,
                    b_scale_stride,
                    out_stride,
                    rows,
                    columns,
                    K,
                    BLOCK_A,
                    BLOCK_B,
                    BLOCK_K,
                    STAGES,
                    WARPS,
                    SPLIT,
                    A_IS_WEIGHT,
                    BIAS,
                ),
            ),
            (
                _feed,
                (
                    a_desc,
                    b_desc,
                    a_buffer,
                    b_buffer,
                    full,
                    empty,
                    rows,
                    columns,
                    K,
                    BLOCK_A,
                    BLOCK_B,
                    BLOCK_K,
                    STAGES,
                    SPLIT,
                    A_IS_WEIGHT,
                    TRIGGER,
                ),
            ),
        ],
        [1],
        [24],
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def stream_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether this kernel takes these: on Hopper, with rows that start at multiples of 16 bytes."""
    aligned = all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0 and tensor.stride(1) == 1
        for tensor in (x, weight)
    )
    return not x.is_cpu and aligned and _is_hopper(x.device)


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    width = min(128, columns * tensor.element_size())
    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * tensor.element_size(), rank=2)
    return TensorDescriptor.from_tensor(tensor, [rows, columns], layout)


def stream(
    config: Stream,
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    """`linear_8bit.linear_w8a8`, or without x_scale `linear_w8a16`, by this kernel, where `stream_serves`."""
    (num_tokens, size), channels = x.shape, weight.shape[0]
    out = torch.empty((num_tokens, channels), dtype=out_dtype, device=x.device)
    swap = config.weight_rows
    (a, a_scale, block_a), (b, b_scale, block_b) = [
        (weight, weight_scale, config.block_n),
        (x, weight_scale if x_scale is None else x_scale, config.block_m),
    ][:: 1 if swap else -1]
    tiles = triton.cdiv(a.shape[0], block_a) * triton.cdiv(b.shape[0], block_b)
    steps = triton.cdiv(size, config.block_k)
    programs = min(_multiprocessors(x.device) * config.per_multiprocessor, tiles * (steps if config.split else 1))
    partial, counters = out, out
    if config.split:
        assert tiles <= MAX_ARRIVALS
        partial = torch.empty(2 * programs * block_a * block_b, dtype=torch.float32, device=x.device)
        counters = arrivals(x.device)
    _stream_kernel[(programs,)](
        _descriptor(a, block_a, config.block_k),
        _descriptor(b, block_b, config.block_k),
        a_scale,
        b_scale,
        out if bias is None else bias,
        out,
        partial,
        counters,
        0 if a_scale.numel() == 1 else 1,
        0 if b_scale.numel() == 1 else 1,
        channels,
        a.shape[0],
        b.shape[0],
        size,
        block_a,
        block_b,
        config.block_k,
        config.stages,
        config.warps,
        config.split,
        swap,
        bias is not None,
        config.trigger,
        num_warps=config.warps,
        maxnreg=config.registers,
        launch_pdl=True,
    )
    return out
