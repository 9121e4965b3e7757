"""The plain-PyTorch twin of every model op: same names, same signatures, any device.

Tests and benchmarks compare the Triton kernels with these, and CPUs run them, so they are written
for few torch calls: with one token in flight a call costs more than its arithmetic. They know
nothing of requests or layers; the twins of `prepare` and `sample` live in `step.py`.

Layouts (DESIGN.md): a KV cache is `[num_blocks, 2, num_kv_heads, block_size, head_dim]` (K at index
0, V at 1), a block table `[slots, max_blocks]` int32. The memory behind a row's last key may hold
another request's leftovers, NaN included, so values outside a row's length never take part, not
even multiplied by zero.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension, in fp32, rounded once at the end.

    x [..., H] bf16/fp16/fp32; weight [H]; returns [..., H] of x's dtype.
    """
    # Not F.rms_norm: on a CPU that is twice as many small ops (16 us against 9 for one row of 576).
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse_rms = torch.addcmul(_scalar(eps, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (wide * inverse_rms).mul_(weight).to(x.dtype)


@functools.cache
def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, device=device)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual += x` in place, then `rms_norm(residual)`. x, residual [..., H]; returns [..., H]."""
    return rms_norm(residual.add_(x), weight, eps)


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(gate) * up` of x [..., 2 * I] = (gate | up); returns [..., I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """`gelu_tanh(gate) * up` of x [..., 2 * I] = (gate | up); returns [..., I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of x [T, K], weight [N, K], bias [N], all of one dtype; returns [T, N]."""
    return F.linear(x, weight, bias)


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

    q [T, Hq, D] is rotated in place; k, v [T, Hkv, D] are only read. positions [T] int; cos_sin
    [max_positions, rotary_dim] fp32 = (cos | sin); slot_mapping [T] int64 = block * block_size +
    offset. The first rotary_dim of the D components are rotated. The pages may be of a narrower
    dtype than q, k and v; with kv_scales [num_blocks, 2, Hkv, block_size] fp32 they hold codes of
    their dtype (`kv_quant.py`) and the scales are written beside them.
    """
    num_q, num_kv, block_size = q.shape[1], k.shape[1], kv_cache.shape[3]
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin.index_select(0, positions).view(-1, 1, 2, half).split(1, dim=2)
    heads = torch.cat((q, k, v), dim=1).float()  # [T, Hq + 2 * Hkv, D]
    if q_norm is not None:
        heads[:, :num_q] = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        heads[:, num_q : num_q + num_kv] = rms_norm(k, k_norm, eps)
    rotated = heads[:, : num_q + num_kv, : 2 * half].unflatten(2, (2, half))
    turned = rotated * cos
    turned[:, :, :1].addcmul_(rotated[:, :, 1:], sin, value=-1)
    turned[:, :, 1:].addcmul_(rotated[:, :, :1], sin)
    rotated.copy_(turned)
    q.copy_(heads[:, :num_q])
    new_kv = heads[:, num_q:].view(-1, 2, num_kv, q.shape[2])
    if kv_scales is not None:
        new_kv, scales = quantise_kv(new_kv, kv_cache.dtype)
    if new_kv.shape[0] == 1:  # the commonest step of a CPU: plain indices are cheaper than tensors of them
        block, offset = divmod(int(slot_mapping), block_size)
        kv_cache[block, :, :, offset] = new_kv[0]
        if kv_scales is not None:
            kv_scales[block, :, :, offset] = scales[0]
        return
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    if kv_scales is not None:
        kv_scales.permute(0, 3, 1, 2).index_put_((blocks, offsets), scales)
    if kv_cache.dtype == torch.float8_e4m3fn:  # which torch cannot scatter
        kv_cache, new_kv = kv_cache.view(torch.uint8), new_kv.view(torch.uint8)
    kv_cache.permute(0, 3, 1, 2, 4).index_put_((blocks, offsets), new_kv.to(kv_cache.dtype))


def quantise_kv(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (codes [..., D, or D / 2 if dtype is uint8] of dtype, scales [...] fp32): see
    `kv_quant.py`.
    """
    x = x.float()
    if dtype == torch.uint8:
        extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scales = extreme / -8.0
    else:
        scales = x.abs().amax(-1) / (127.0 if dtype == torch.int8 else 448.0)
    steps = torch.nan_to_num(x / scales.unsqueeze(-1), 0.0, 0.0, 0.0)  # a head of zeros has a scale of zero
    if dtype == torch.uint8:
        low, high = (steps + 8.5).clamp(0.5, 15.5).floor().to(torch.uint8).chunk(2, dim=-1)
        return low | (high << 4), scales
    if dtype == torch.int8:
        return (steps + 0.5).floor().clamp(-127, 127).to(torch.int8), scales
    return steps.clamp(-448, 448).to(dtype), scales


def dequantise_kv(codes: Tensor, scales: Tensor) -> Tensor:
    """The reverse: [..., D] in fp32."""
    if codes.dtype == torch.uint8:
        values = torch.cat((codes & 15, codes >> 4), dim=-1).float().sub_(8.0)
    else:
        values = codes.float()
    return values.mul_(scales.unsqueeze(-1))


def _pages(kv_cache: Tensor, kv_scales: Tensor | None, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The pages `blocks` [N] head by head, [2, Hkv, N, block_size, D]; codes are dequantised to
    dtype.
    """
    if kv_cache.dtype == torch.float8_e4m3fn:  # which torch cannot gather
        codes = kv_cache.view(torch.uint8).permute(1, 2, 0, 3, 4).index_select(2, blocks).view(kv_cache.dtype)
    else:
        codes = kv_cache.permute(1, 2, 0, 3, 4).index_select(2, blocks)
    if kv_scales is None:
        return codes.to(dtype)
    return dequantise_kv(codes, kv_scales.permute(1, 2, 0, 3).index_select(2, blocks)).to(dtype)


def decode_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    row_slots: Tensor,
    seq_lens: Tensor,
    query_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    kv_scales: Tensor | None = None,
    query_start_loc: Tensor | None = None,
) -> Tensor:
    """Attention of rows that bring a few new tokens each, over the pages of their slot.

    q [tokens, Hq, D], row by row; row_slots, seq_lens [R] int32. Every row has `query_len` tokens;
    or with query_start_loc [R + 1] int32 row r has
    `q[query_start_loc[r] : query_start_loc[r + 1]]`, 1 to `query_len` of them. They are the last of
    its `seq_lens[r]` positions; the one at `position` sees keys
    `max(0, position - window + 1) .. position` (window 0: from 0). logits = scale * q @ k, then
    soft_cap * tanh(logits / soft_cap) if soft_cap > 0. With kv_scales the cache holds codes
    (`kv_quant.py`). Returns [tokens, Hq, D]; a token that sees nothing gets zeros: so does every
    token of a row with a `seq_len` of 0, which may have any number of them, more than `query_len`
    too.
    """
    cache = (kv_cache, block_table, row_slots, seq_lens)
    settings = (scale, window, soft_cap, kv_scales)
    if query_start_loc is None:
        return _attend_rows(q, *cache, query_len, query_len, *settings)
    counts = query_start_loc.diff().view(-1, 1)
    tokens = query_start_loc[:-1, None].long() + torch.arange(query_len, device=q.device)  # [R, query_len]
    padded = q[tokens.view(-1).clamp(max=q.shape[0] - 1)]
    answers = _attend_rows(padded, *cache, query_len, counts, *settings)
    answered = tokens < query_start_loc[1:, None]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    out[tokens[answered]] = answers[answered.view(-1)]
    return out


def _attend_rows(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    row_slots: Tensor,
    seq_lens: Tensor,
    query_len: int,
    counts: Tensor | int,
    scale: float,
    window: int,
    soft_cap: float,
    kv_scales: Tensor | None,
) -> Tensor:
    """`decode_attention` of q [R * query_len, Hq, D], where the first `counts` ([R, 1], or one
    number for all) of a row's places are its tokens: what the others hold, and their answers, mean
    nothing.
    """
    num_rows, num_q, dim = row_slots.shape[0], q.shape[1], q.shape[2]
    num_kv, block_size = kv_cache.shape[2], kv_cache.shape[3]
    group = num_q // num_kv
    lengths = seq_lens.tolist()
    longest = max(lengths)
    first_block = max(0, min(lengths) - query_len + 1 - window) // block_size if window else 0
    num_blocks = max(1, -(-longest // block_size) - first_block)
    blocks = block_table.index_select(0, row_slots)[:, first_block : first_block + num_blocks]
    num_keys = num_blocks * block_size
    # One gather puts the pages in head-major order: [2, Hkv, R, num_keys, D]. The heads of a group
    # are rows of one product, so K and V are read once and never repeated.
    pages = _pages(kv_cache, kv_scales, blocks.reshape(-1), q.dtype)
    pages = pages.view(2, num_kv, num_rows, num_keys, dim)
    queries = q.view(num_rows, query_len, num_kv, group, dim).permute(2, 0, 1, 3, 4)
    queries = queries.reshape(num_kv, num_rows, query_len * group, dim)
    if num_rows == 1 and query_len == 1:
        # The commonest step of a CPU needs no mask: cut to the keys it sees.
        start = max(0, longest - window) if window else 0
        used = slice(start - first_block * block_size, longest - first_block * block_size)
        keys, values = pages[:, :, :, used].unbind(0)
        out = _attend(queries, keys, values, None, scale, soft_cap)
    else:
        position = torch.arange(first_block * block_size, first_block * block_size + num_keys, device=q.device)
        ends = seq_lens.view(-1, 1)
        last = ends - counts + torch.arange(1, query_len + 1, device=q.device)  # [R, L] one past the last visible key
        if isinstance(counts, Tensor):
            last = torch.minimum(last, ends)  # behind a row's last token nothing may be read
        visible = position < last.unsqueeze(-1)  # [R, L, num_keys]
        if window:
            visible &= position >= last.unsqueeze(-1) - window
        pages.masked_fill_(~visible.any(1).unsqueeze(-1), 0)
        mask = visible.unsqueeze(2).expand(-1, -1, group, -1).reshape(num_rows, query_len * group, num_keys)
        out = _attend(queries, pages[0], pages[1], mask, scale, soft_cap)
    out = out.view(num_kv, num_rows, query_len, group, dim).permute(1, 2, 0, 3, 4)
    return out.reshape(num_rows * query_len, num_q, dim)


def prefill_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    row_slots: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of rows of different query lengths over the pages of their slot, which
    already hold this step's keys.

    q [T, Hq, D]; row r's tokens are `query_start_loc[r] .. query_start_loc[r + 1]` (relative to q's
    first) and are the last of its seq_lens[r] positions. Visibility, scale, soft_cap and kv_scales
    as in `decode_attention`. Returns [T, Hq, D].
    """
    num_q, dim = q.shape[1], q.shape[2]
    num_kv, block_size = kv_cache.shape[2], kv_cache.shape[3]
    group = num_q // num_kv
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for row, slot in enumerate(row_slots.tolist()):
        begin, end, seq_len = starts[row], starts[row + 1], lengths[row]
        if begin == end:
            continue
        query_len = end - begin
        computed = seq_len - query_len
        first_key = max(0, computed - window + 1) if window else 0
        first_block = first_key // block_size
        blocks = block_table[slot, first_block : -(-seq_len // block_size)]
        pages = _pages(kv_cache, kv_scales, blocks, q.dtype)
        pages = pages.view(2, num_kv, 1, -1, dim)[
            :, :, :, first_key - first_block * block_size : seq_len - first_block * block_size
        ]
        # The heads of a group share their K and V by a stride of zero, not by a copy.
        keys, values = pages.expand(-1, -1, group, -1, -1).unbind(0)
        queries = q[begin:end].view(query_len, num_kv, group, dim).permute(1, 2, 0, 3)
        mask = None
        if first_key or computed or (window and window < query_len) or soft_cap:
            position = torch.arange(first_key, seq_len, device=q.device)
            query_position = torch.arange(computed, seq_len, device=q.device).unsqueeze(-1)
            mask = position <= query_position
            if window:
                mask &= position > query_position - window
        attended = _attend(queries, keys, values, mask, scale, soft_cap, is_causal=mask is None)
        out[begin:end] = attended.permute(2, 0, 1, 3).reshape(query_len, num_q, dim)
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, soft_cap: float, is_causal: bool = False
) -> Tensor:
    """Softmax attention. q [A, B, M, D], k and v [A, B, N, D], mask broadcastable to [A, B, M, N],
    True where visible.
    """
    if soft_cap:
        logits = torch.matmul(q.float(), k.float().transpose(-1, -2)).mul_(scale / soft_cap).tanh_().mul_(soft_cap)
        if mask is not None:
            logits.masked_fill_(~mask, float("-inf"))
        return torch.matmul(torch.softmax(logits, dim=-1).nan_to_num_(0.0), v.float()).to(q.dtype)
    if q.dtype == torch.float16 and not q.is_cuda:
        # CPUs have no fp16 product worth the name; upcasting K and V is 5x faster.
        return F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), mask, is_causal=is_causal, scale=scale
        ).half()
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)


def copy_blocks(kv_caches: list[Tensor], pairs: Tensor) -> None:
    """Copies whole blocks inside each cache. kv_caches: [num_blocks, bytes] uint8 each; pairs [N,
    2] int32 = (source, destination).
    """
    sources, destinations = pairs.long().unbind(1)
    for cache in kv_caches:
        cache[destinations] = cache[sources]
