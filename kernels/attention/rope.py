"""Head norms, rotary embedding and the write into the KV pages, in one launch between the qkv
projection and attention.

A program takes one token and a few heads: first the programs of the query heads, then those of the
key-and-value heads. K and V are read once from the projection and written once, into their page; K
is never written back. Source: Su et al., "RoFormer" (2021), in the half-split ("NeoX") pairing that
the Llama family uses.
"""

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.kv_quant import quantise
from octavo.kernels.launch import has_pdl, let_successor_start, wait_for_inputs

# 1024 components a program (8 heads of 128) by 4 warps: 16-byte accesses, and 5 programs a token
# for 32/8 heads, so one token spreads over several SMs and 2048 tokens make ten thousand programs.
_COMPONENTS = 1024


@triton.jit
def _rotate_and_store(
    source,  # [HEADS, 1] pointers to the heads
    target,  # [HEADS, 1] pointers to where they go
    exists,  # [HEADS, 1]
    norm_ptr,  # [D]
    cos_sin_ptr,  # the token's row of the table
    eps,
    HAS_NORM: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    HALF: tl.constexpr = ROTARY // 2
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    in_half = pair < HALF
    here = exists & in_half
    cos = tl.load(cos_sin_ptr + pair, mask=in_half, other=0.0)
    sin = tl.load(cos_sin_ptr + HALF + pair, mask=in_half, other=0.0)
    first = tl.load(source + pair, mask=here, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + pair, mask=here, other=0.0).to(tl.float32)
    if ROTARY < DIM:
        other = ROTARY + tl.arange(0, BLOCK_REST)[None, :]
        in_rest = other < DIM
        rest = tl.load(source + other, mask=exists & in_rest, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        if ROTARY < DIM:
            squares += tl.sum(rest * rest, axis=1)
        inverse_rms = tl.rsqrt(squares / DIM + eps)[:, None]
        first *= inverse_rms * tl.load(norm_ptr + pair, mask=in_half, other=0.0).to(tl.float32)
        second *= inverse_rms * tl.load(norm_ptr + HALF + pair, mask=in_half, other=0.0).to(tl.float32)
        if ROTARY < DIM:
            rest *= inverse_rms * tl.load(norm_ptr + other, mask=in_rest, other=0.0).to(tl.float32)
    dtype = target.dtype.element_ty
    tl.store(target + pair, (first * cos - second * sin).to(dtype), mask=here)
    tl.store(target + HALF + pair, (second * cos + first * sin).to(dtype), mask=here)
    if ROTARY < DIM:
        tl.store(target + other, rest.to(dtype), mask=exists & in_rest)


@triton.jit
def _rotate_and_quantise(
    source,  # [HEADS, 1] pointers to the heads
    target,  # [HEADS, 1] pointers to where their codes go
    scales,  # [HEADS] pointers to where their scales go
    exists,  # [HEADS, 1]
    norm_ptr,  # [D]
    cos_sin_ptr,  # the token's row of the table
    eps,
    HAS_NORM: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,  # 0: V
    BLOCK_W: tl.constexpr,  # >= D / 2
):
    WIDTH: tl.constexpr = (DIM + 1) // 2
    HALF: tl.constexpr = ROTARY // 2
    low = tl.arange(0, BLOCK_W)[None, :]
    high = WIDTH + low
    in_low = low < WIDTH
    in_high = in_low & (high < DIM)
    x_low = tl.load(source + low, mask=exists & in_low, other=0.0).to(tl.float32)
    x_high = tl.load(source + high, mask=exists & in_high, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(x_low * x_low + x_high * x_high, axis=1)
        inverse_rms = tl.rsqrt(squares / DIM + eps)[:, None]
        norm_low = tl.load(norm_ptr + low, mask=in_low, other=0.0).to(tl.float32)
        norm_high = tl.load(norm_ptr + high, mask=in_high, other=0.0).to(tl.float32)
        x_low *= inverse_rms * norm_low
        x_high *= inverse_rms * norm_high
    if ROTARY > 0:
        if ROTARY == DIM:
            # The halves are each other's partners.
            cos = tl.load(cos_sin_ptr + low, mask=in_low, other=0.0)
            sin = tl.load(cos_sin_ptr + HALF + low, mask=in_low, other=0.0)
            x_low, x_high = x_low * cos - x_high * sin, x_high * cos + x_low * sin
        else:
            # Only ROTARY components turn, and a component's partner is anywhere: it is read again.
            partner_low = tl.where(low < HALF, low + HALF, low - HALF)
            partner_high = tl.where(high < HALF, high + HALF, high - HALF)
            turns_low = low < ROTARY
            turns_high = high < ROTARY
            p_low = tl.load(source + partner_low, mask=exists & turns_low, other=0.0).to(tl.float32)
            p_high = tl.load(source + partner_high, mask=exists & turns_high, other=0.0).to(tl.float32)
            if HAS_NORM:
                p_low *= inverse_rms * tl.load(norm_ptr + partner_low, mask=turns_low, other=0.0).to(tl.float32)
                p_high *= inverse_rms * tl.load(norm_ptr + partner_high, mask=turns_high, other=0.0).to(tl.float32)
            cos_low = tl.load(cos_sin_ptr + low % HALF, mask=turns_low, other=1.0)
            sin_low = tl.load(cos_sin_ptr + HALF + low % HALF, mask=turns_low, other=0.0)
            cos_high = tl.load(cos_sin_ptr + high % HALF, mask=turns_high, other=1.0)
            sin_high = tl.load(cos_sin_ptr + HALF + high % HALF, mask=turns_high, other=0.0)
            x_low = x_low * cos_low + tl.where(low < HALF, -p_low, p_low) * sin_low
            x_high = x_high * cos_high + tl.where(high < HALF, -p_high, p_high) * sin_high
    codes_low, codes_high, scale = quantise(x_low, x_high, target.dtype.element_ty)
    tl.store(target + low, codes_low, mask=exists & in_low)
    if target.dtype.element_ty != tl.uint8:
        tl.store(target + high, codes_high, mask=exists & in_high)
    tl.store(scales[:, None], scale[:, None], mask=exists)


@triton.jit
def _rope_and_cache_kernel(
    # pointers
    q_ptr,  # [T, Hq, D], written in place
    k_ptr,  # [T, Hkv, D]
    v_ptr,  # [T, Hkv, D]
    positions_ptr,  # [T]
    cos_sin_ptr,  # [max_positions, ROTARY] fp32
    cache_ptr,  # [num_blocks, 2, Hkv, BLOCK_SIZE, D], or codes (D / 2 bytes in 4 bits)
    scales_ptr,  # [num_blocks, 2, Hkv, BLOCK_SIZE] if QUANTISED
    slot_mapping_ptr,  # [T] int64
    q_norm_ptr,  # [D] if HAS_Q_NORM
    k_norm_ptr,  # [D] if HAS_K_NORM
    eps,
    # strides, in elements
    q_stride,
    k_stride,
    v_stride,
    cache_block_stride,
    cache_kv_stride,
    cache_head_stride,
    cache_offset_stride,
    scales_block_stride,
    scales_kv_stride,
    scales_head_stride,
    # meta-parameters
    NUM_Q: tl.constexpr,
    NUM_KV: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,  # heads a program
    BLOCK_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    QUANTISED: tl.constexpr,
    PDL: tl.constexpr,  # starts while its predecessor ends, and lets its successor do so
):
    wait_for_inputs(PDL)
    let_successor_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos_sin_ptr += position * ROTARY
    Q_CHUNKS: tl.constexpr = (NUM_Q + HEADS - 1) // HEADS
    if chunk < Q_CHUNKS:
        head = chunk * HEADS + tl.arange(0, HEADS)[:, None]
        pointers = q_ptr + token * q_stride + head * DIM
        _rotate_and_store(
            pointers,
            pointers,
            head < NUM_Q,
            q_norm_ptr,
            cos_sin_ptr,
            eps,
            HAS_Q_NORM,
            DIM,
            ROTARY,
            BLOCK_HALF,
            BLOCK_REST,
        )
    else:
        head = (chunk - Q_CHUNKS) * HEADS + tl.arange(0, HEADS)[:, None]
        slot = tl.load(slot_mapping_ptr + token)
        page = cache_ptr + (slot // BLOCK_SIZE) * cache_block_stride + (slot % BLOCK_SIZE) * cache_offset_stride
        page += head * cache_head_stride
        k_head = k_ptr + token * k_stride + head * DIM
        v_head = v_ptr + token * v_stride + head * DIM
        exists = head < NUM_KV
        if QUANTISED:
            scales = scales_ptr + (slot // BLOCK_SIZE) * scales_block_stride + slot % BLOCK_SIZE
            scales += ((chunk - Q_CHUNKS) * HEADS + tl.arange(0, HEADS)) * scales_head_stride
            _rotate_and_quantise(
                k_head, page, scales, exists, k_norm_ptr, cos_sin_ptr, eps, HAS_K_NORM, DIM, ROTARY, BLOCK_DIM // 2
            )
            _rotate_and_quantise(
                v_head,
                page + cache_kv_stride,
                scales + scales_kv_stride,
                exists,
                k_norm_ptr,
                cos_sin_ptr,
                eps,
                False,
                DIM,
                0,
                BLOCK_DIM // 2,
            )
        else:
            _rotate_and_store(
                k_head,
                page,
                exists,
                k_norm_ptr,
                cos_sin_ptr,
                eps,
                HAS_K_NORM,
                DIM,
                ROTARY,
                BLOCK_HALF,
                BLOCK_REST,
            )
            component = tl.arange(0, BLOCK_DIM)[None, :]
            inside = exists & (component < DIM)
            v = tl.load(v_head + component, mask=inside)
            tl.store(page + cache_kv_stride + component, v.to(cache_ptr.dtype.element_ty), mask=inside)


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    kv_scales: Tensor | None = None,
) -> None:
    """Per-head RMSNorm of q and k (where weights are given), NeoX rotary, then k and v into their
    pages.

    q [T, Hq, D] is rotated in place; k, v [T, Hkv, D] are only read; all three may be views with
    strided rows. positions [T] int; cos_sin [max_positions, rotary_dim] fp32 = (cos | sin),
    contiguous; kv_cache [num_blocks, 2, Hkv, block_size, D]; slot_mapping [T] int64 = block *
    block_size + offset. With kv_scales [num_blocks, 2, Hkv, block_size] fp32 the cache holds codes
    of its dtype (formats: `kv_quant.py`), and each head's scale is written beside them.
    """
    tokens, num_q, dim = q.shape
    num_kv, rotary = k.shape[1], cos_sin.shape[1]
    if tokens == 0:
        return
    scales = q if kv_scales is None else kv_scales
    pdl = has_pdl(q.device)
    block_dim = triton.next_power_of_2(dim)
    heads = max(1, min(_COMPONENTS // block_dim, triton.next_power_of_2(num_q)))
    grid = (tokens, triton.cdiv(num_q, heads) + triton.cdiv(num_kv, heads))
    _rope_and_cache_kernel[grid](
        q,
        k,
        v,
        positions,
        cos_sin,
        kv_cache,
        scales,
        slot_mapping,
        q if q_norm is None else q_norm,
        k if k_norm is None else k_norm,
        eps,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        kv_cache.stride(3),
        scales.stride(0),
        scales.stride(1),
        scales.stride(2),
        num_q,
        num_kv,
        dim,
        rotary,
        kv_cache.shape[3],
        heads,
        block_dim,
        triton.next_power_of_2(rotary // 2),
        triton.next_power_of_2(max(1, dim - rotary)),
        q_norm is not None,
        k_norm is not None,
        kv_scales is not None,
        pdl,
        launch_pdl=pdl,
        num_warps=4,
        enable_fp_fusion=True,
    )
