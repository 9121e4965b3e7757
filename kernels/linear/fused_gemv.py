"""A linear layer for one to `MAX_ROWS` tokens with what stands before and after it: RMSNorm in front, SiLU-and-multiply
or the residual addition behind. So a decoder layer takes six launches: norm + qkv, rope and cache, attention, out +
add, norm + gate and up + silu, down + add. On an H100 a 7B is faster with eight, where only gate and up have something
fused to them and the other products are those of `dense.py`.

With so few tokens a linear layer is the reading of its weights, at 3 TB/s if enough of it is under way at any time:

- All threads of a program lie along K, 8 components (16 bytes) each, and keep sums of their own for each of the
  program's channels; what they hold of x serves all channels, and they add up only once, at the end. (With threads
  along the channels too, x would have to change its layout in every round, over shared memory and two barriers.)
- The loop over K is unrolled where it is short, so the next weights are requested while the last are multiplied.
- The first weights are requested before the kernel before this one has finished (`launch.py`).
- Each program normalises x for itself, reading 8 KiB that lie in the L2, while its first weights are on their way.

Twins: `reference/fused.py`. Sums are fp32; each intermediate is rounded where the separate ops would.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launch import has_pdl, let_successor_start, wait_for_inputs

MAX_ROWS = 4  # with more, the loads of x cost more than those of the weights: tensor cores are for them


@triton.jit
def _load_row(row_ptr, norm_ptr, inverse_rms, k, inside, NORM: tl.constexpr):
    """Components k of one token, normalised: # [BLOCK_K] f32."""
    x = tl.load(row_ptr + k, mask=inside, other=0.0)
    if NORM:
        weight = tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * (inverse_rms * weight)).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _fused_gemv_kernel(
    # pointers
    x_ptr,  # [ROWS, K]
    weight_ptr,  # [N, K], or [2 * N, K] = (gate | up) if SILU
    norm_ptr,  # [K] if NORM
    out_ptr,  # [ROWS, N]; read and written if ADD
    eps,
    # strides, in elements
    x_stride,
    out_stride,
    # meta-parameters
    ROWS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,  # channels a program (of gate and of up)
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,  # the power of two at or above K
):
    let_successor_start(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weight_ptr += n.to(tl.int64)[:, None] * K + k[None, :]
    in_channels = n < N
    # Weights are requested one round ahead; those of the first round are no kernel's output.
    inside = in_channels[:, None] & (k < K)[None, :]
    weight = tl.load(weight_ptr, mask=inside, other=0.0, eviction_policy="evict_first")
    if SILU:
        up_weight = tl.load(weight_ptr + N * K, mask=inside, other=0.0, eviction_policy="evict_first")
    wait_for_inputs(PDL)

    inverse_rms = ()
    sums = ()
    up_sums = ()
    for row in tl.static_range(ROWS):
        if NORM:
            column = tl.arange(0, BLOCK_X)
            whole = tl.load(x_ptr + row * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
            inverse_rms += (tl.rsqrt(tl.sum(whole * whole, 0) / K + eps),)
        else:
            inverse_rms += (1.0,)
        sums += (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),)
        up_sums += (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),)
    for start in tl.range(0, K, BLOCK_K):
        inside = in_channels[:, None] & (start + BLOCK_K + k < K)[None, :]
        ahead = weight_ptr + (start + BLOCK_K)
        next_weight = tl.load(ahead, mask=inside, other=0.0, eviction_policy="evict_first")
        if SILU:
            next_up_weight = tl.load(ahead + N * K, mask=inside, other=0.0, eviction_policy="evict_first")
        new_sums = ()
        new_up_sums = ()
        for row in tl.static_range(ROWS):
            x = _load_row(x_ptr + row * x_stride, norm_ptr, inverse_rms[row], start + k, start + k < K, NORM)
            new_sums += (sums[row] + x[None, :] * weight.to(tl.float32),)
            if SILU:
                new_up_sums += (up_sums[row] + x[None, :] * up_weight.to(tl.float32),)
            else:
                new_up_sums += (up_sums[row],)
        sums = new_sums
        up_sums = new_up_sums
        weight = next_weight
        if SILU:
            up_weight = next_up_weight
    dtype = out_ptr.dtype.element_ty
    for row in tl.static_range(ROWS):
        y = tl.sum(sums[row], 1)
        if SILU:
            gate = y.to(dtype).to(tl.float32)
            y = gate * tl.sigmoid(gate) * tl.sum(up_sums[row], 1).to(dtype).to(tl.float32)
        out_ptrs = out_ptr + row * out_stride + n
        if ADD:
            y = y.to(dtype).to(tl.float32) + tl.load(out_ptrs, mask=in_channels, other=0.0).to(tl.float32)
        tl.store(out_ptrs, y.to(dtype), mask=in_channels)


def _config(rows: int, size: int, silu: bool) -> dict[str, int]:
    """Tile and warps; size: K."""
    block_k = min(2048, triton.next_power_of_2(size))
    rows_padded = triton.next_power_of_2(rows)
    # 32 sums and 16 registers of weights on their way a thread: four programs of eight warps share a multiprocessor.
    return {
        "BLOCK_N": max(1, (2 if silu else 4) // max(1, rows_padded // 2)),
        "BLOCK_K": block_k,
        "num_warps": max(1, min(8, block_k // 256)),
    }


def _launch(
    x: Tensor, weight: Tensor, norm: Tensor | None, out: Tensor, eps: float, *, silu: bool = False, add: bool = False
) -> None:
    rows, size = x.shape
    channels = out.shape[1]
    if rows > MAX_ROWS:
        raise ValueError(f"fused_gemv: {rows} rows, at most {MAX_ROWS}")
    if rows == 0:
        return
    config = _config(rows, size, silu)
    pdl = has_pdl(x.device)
    _fused_gemv_kernel[(triton.cdiv(channels, config["BLOCK_N"]),)](
        x,
        weight,
        x if norm is None else norm,
        out,
        eps,
        x.stride(0),
        out.stride(0),
        rows,
        size,
        channels,
        norm is not None,
        silu,
        add,
        pdl,
        BLOCK_X=triton.next_power_of_2(size),
        **config,
        launch_pdl=pdl,
        enable_fp_fusion=True,
    )


def norm_linear(x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm(x) @ weight.T` [M, N] of x [M, K] (rows may be strided), norm [K], weight [N, K] contiguous.

    Raises ValueError beyond `MAX_ROWS` rows, as all ops of this file.
    """
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    _launch(x, weight, norm, out, eps)
    return out


def norm_linear_silu(x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`silu(gate) * up` [M, I] with (gate | up) = `rms_norm(x) @ weight.T`, of x [M, K] (rows may be strided),
    norm [K], weight [2 * I, K] contiguous.
    """
    out = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    _launch(x, weight, norm, out, eps, silu=True)
    return out


def linear_silu(x: Tensor, weight: Tensor) -> Tensor:
    """`silu(gate) * up` [M, I] with (gate | up) = `x @ weight.T`, of x [M, K] (rows may be strided), weight [2 * I, K]
    contiguous.
    """
    out = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    _launch(x, weight, None, out, 0.0, silu=True)
    return out


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    """`residual += x @ weight.T` in place, of x [M, K], weight [N, K] contiguous, residual [M, N]; rows of x and
    residual may be strided.
    """
    _launch(x, weight, None, residual, 0.0, add=True)
