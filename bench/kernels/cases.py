"""What is timed: each op at the shapes of Llama-2-7B, Llama-3-8B and 70B, with its counted bytes or
operations.

Peer figures are vLLM 0.26's on an H100 (FA3 for attention), measured once: microseconds; small ops
with rotating inputs.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench.kernels.timing import rotations
from torch import Tensor

from octavo.kernels.attention import decode, kv_block, prefill, rope
from octavo.kernels.pointwise import activation, norm

BLOCK_SIZE = 64
KV_NAMES = {torch.bfloat16: "", torch.float8_e4m3fn: ", fp8 KV", torch.int8: ", int8 KV", torch.uint8: ", int4 KV"}


@dataclass
class Case:
    """One row of the table."""

    op: str
    shape: str
    calls: list[Callable[[], object]]  # ours, on rotating inputs
    bytes: float  # read and written once each
    flops: float = 0.0
    torch_calls: list[Callable[[], object]] | None = None  # what torch offers for the same
    peer: float | None = None  # microseconds
    goal: float | None = None


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def small_ops() -> Iterator[Case]:
    peers = {
        ("norm", 4096): (2.22, 2.97, 5.50, 28.3),
        ("norm", 8192): (2.63, 3.53, 8.67, 49.1),
        ("silu", 11008): (3.52, 4.57, 8.42, 48.2),
        ("silu", 14336): (3.92, 4.81, 9.87, 60.6),
        ("silu", 28672): (6.88, 7.77, 17.96, 120.0),
        ("rope", (32, 32)): (5.80, 9.77, 14.92, 71.9),
        ("rope", (32, 8)): (4.80, 7.82, 10.41, 42.8),
        ("rope", (64, 8)): (5.76, 10.00, 13.88, 63.5),
    }
    goals = {"norm": 2.0, "silu": 2.2, "rope": 2.5}
    for (op, size), figures in peers.items():
        for tokens, peer in zip((1, 32, 256, 2048), figures, strict=True):
            goal = goals[op] if tokens == 1 else None
            yield {"norm": norm_case, "silu": silu_case, "rope": rope_case}[op](tokens, size, peer, goal)
    for kv, tokens in itertools.product(kv_block.EXTREMES, (1, 2048)):
        yield rope_case(tokens, (32, 8), None, goals["rope"] if tokens == 1 else None, kv)


def norm_case(tokens: int, hidden: int, peer: float, goal: float | None) -> Case:
    size = tokens * hidden * 2 * 4
    weight = random(hidden)
    sets = [(random(tokens, hidden), random(tokens, hidden)) for _ in range(rotations(size))]
    calls = [lambda x=x, r=r: norm.add_rms_norm(x, r, weight, 1e-5) for x, r in sets]
    plain = [lambda x=x, r=r: F.rms_norm(r.add_(x), (hidden,), weight, 1e-5) for x, r in sets]
    return Case("add_rms_norm", f"{tokens} x {hidden}", calls, size, torch_calls=plain, peer=peer, goal=goal)


def silu_case(tokens: int, inner: int, peer: float, goal: float | None) -> Case:
    size = tokens * inner * 2 * 3
    sets = [random(tokens, 2 * inner) for _ in range(rotations(size))]
    calls = [lambda x=x: activation.silu_and_mul(x) for x in sets]
    plain = [lambda x=x: F.silu(x[:, :inner]) * x[:, inner:] for x in sets]
    return Case("silu_and_mul", f"{tokens} x {inner}", calls, size, torch_calls=plain, peer=peer, goal=goal)


def pages(
    num_blocks: int, num_kv: int, block_size: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, int]:
    """A cache of random numbers or codes, its scales, and the bytes of a block."""
    size = kv_block.block_bytes(num_kv, block_size, dim, dtype)
    if dtype == torch.bfloat16:
        blocks = random(num_blocks, size // 2).view(torch.uint8)
    else:
        blocks = torch.randint(0, 120, (num_blocks, size), device="cuda", dtype=torch.uint8)  # no fp8 NaN
    cache, scales = kv_block.split_cache(blocks, num_kv, block_size, dim, dtype)
    return cache, None if scales is None else scales.fill_(0.01), size


def rope_case(
    tokens: int, heads: tuple[int, int], peer: float | None, goal: float | None, kv: torch.dtype = torch.bfloat16
) -> Case:
    num_q, num_kv, dim = *heads, 128
    cache, scales, block_bytes = pages(2048, num_kv, BLOCK_SIZE, dim, kv)
    size = tokens * (2 * (2 * num_q + 2 * num_kv) * dim + block_bytes // BLOCK_SIZE)
    table, weight = torch.rand(4096, dim, device="cuda"), random(dim)
    calls = []
    for _ in range(rotations(size)):
        q, k, v = random(tokens, num_q + 2 * num_kv, dim).split([num_q, num_kv, num_kv], 1)
        slots = torch.randperm(2048 * BLOCK_SIZE, device="cuda")[:tokens]
        positions = torch.randint(0, 4096, (tokens,), device="cuda")
        arguments = (q, k, v, positions, table, cache, slots, weight, weight, 1e-5, scales)
        calls.append(lambda a=arguments: rope.rope_and_cache(*a))
    name = f"{tokens} x {num_q}/{num_kv}, norms{KV_NAMES[kv]}"
    return Case("rope_and_cache", name, calls, size, peer=peer, goal=goal)


DECODE = {
    "1x1k": [1024],
    "1x8k": [8192],
    "1x32k": [32768],
    "8x4k": [4096] * 8,
    "32x1k": [1024] * 32,
    "32x4k": [4096] * 32,
    "128x1k": [1024] * 128,
    "31x512+1x32k": [512] * 31 + [32768],
}
DECODE_PEERS = {
    (32, 32): (14.03, 53.3, 186, 185, 188, 710, 717, 276),
    (32, 8): (10.95, 20.6, 54.2, 53.6, 55.1, 187, 194, 80.7),
    (64, 8): (10.77, 21.0, 55.3, 54.3, 55.8, 187, 195, 81.4),
}
DECODE_GOALS = {((32, 8), "1x1k"): 8, ((32, 8), "1x8k"): 15, ((32, 8), "32x1k"): 50, ((32, 8), "32x4k"): 183}
DECODE_GOALS[(32, 8), "31x512+1x32k"] = 72
QUANTISED_DECODE = {
    (torch.float8_e4m3fn, "8x4k"): (35.8, 27),
    (torch.float8_e4m3fn, "32x4k"): (115, 95),
    (torch.int8, "8x4k"): (None, 27),
    (torch.int8, "32x4k"): (None, 95),
    (torch.uint8, "8x4k"): (None, None),
    (torch.uint8, "32x4k"): (None, 60),
}


def decode_ops() -> Iterator[Case]:
    for heads, figures in DECODE_PEERS.items():
        for (name, lens), peer in zip(DECODE.items(), figures, strict=True):
            yield decode_case(heads, name, lens, peer=peer)
    for (kv, name), (peer, goal) in QUANTISED_DECODE.items():
        yield decode_case((32, 8), name, DECODE[name], peer=peer, goal=goal, kv=kv)
    yield decode_case((32, 8), "32x1k, 4 tokens a row", [1024] * 32, query_len=4)
    # What it costs that one row of many verifies drafts: told the rows' starts, or all rows padded
    # to as many tokens.
    yield decode_case((32, 8), "128x1k, one of 8 tokens", [1024] * 128, query_len=8, tokens=[8] + [1] * 127)
    yield decode_case((32, 8), "128x1k, 8 tokens a row", [1024] * 128, query_len=8)
    yield decode_case((32, 8), "32x4k, window 1024", [4096] * 32, window=1024)


def decode_case(
    heads,
    name,
    lens,
    query_len=1,
    window=0,
    block_size=BLOCK_SIZE,
    peer=None,
    goal=None,
    kv=torch.bfloat16,
    tokens=None,
) -> Case:
    num_q, num_kv, dim = *heads, 128
    keys = sum(min(length, window) if window else length for length in lens)
    size = keys * kv_block.block_bytes(num_kv, block_size, dim, kv) // block_size
    max_blocks = max(lens) // block_size
    blocks_a_set = sum(length // block_size for length in lens)
    sets = rotations(size)
    cache, scales, _ = pages(sets * blocks_a_set, num_kv, block_size, dim, kv)
    order = torch.randperm(sets * blocks_a_set, device="cuda", dtype=torch.int32)
    slots = torch.arange(len(lens), device="cuda", dtype=torch.int32)
    seq_lens = torch.tensor(lens, device="cuda", dtype=torch.int32)
    starts = None if tokens is None else torch.tensor([0, *tokens], device="cuda").cumsum(0, dtype=torch.int32)
    calls = []
    for index in range(sets):
        table = torch.zeros(len(lens), max_blocks, device="cuda", dtype=torch.int32)
        at = index * blocks_a_set
        for row, length in enumerate(lens):
            table[row, : length // block_size] = order[at : at + length // block_size]
            at += length // block_size
        q = random(sum(tokens or [query_len] * len(lens)), num_q, dim)
        arguments = (q, cache, table, slots, seq_lens, query_len, dim**-0.5, window, 0.0, scales, starts)
        calls.append(lambda a=arguments: decode.decode_attention(*a))
    plain = None
    if len(set(lens)) == 1 and not window and query_len == 1 and scales is None:
        contiguous = cache.view(sets, 2, len(lens), num_kv, -1, dim)
        q = random(len(lens), num_q, 1, dim)
        plain = [
            lambda kv=kv: F.scaled_dot_product_attention(q, kv[0], kv[1], enable_gqa=num_q != num_kv)
            for kv in contiguous
        ]
    goal = DECODE_GOALS.get((heads, name)) if scales is None else goal
    name = f"{num_q}/{num_kv} {name}{KV_NAMES[kv]}"
    return Case("decode_attention", name, calls, size, torch_calls=plain, peer=peer, goal=goal)


PREFILL = {"512": [512], "2048": [2048], "8192": [8192], "16x512": [512] * 16}
PREFILL_PEERS = {
    (32, 32): (16.15, 77.6, 945, 145),
    (32, 8): (15.00, 72.7, 859, 130),
    (64, 8): (21.3, 138, 1878, 249),
}
PREFILL_GOALS = {"2048": 450e12, "8192": 560e12, "16x512": 300e12}  # FLOP/s


def prefill_ops() -> Iterator[Case]:
    for heads, figures in PREFILL_PEERS.items():
        for (name, lens), peer in zip(PREFILL.items(), figures, strict=True):
            yield prefill_case(heads, name, lens, peer=peer)
    yield prefill_case((32, 8), "512 after 7680", [512], cached=7680)
    yield prefill_case((32, 8), "8192, window 1024", [8192], window=1024)
    for kv in kv_block.EXTREMES:
        yield prefill_case((32, 8), "2048", [2048], kv=kv, goal=90)
        yield prefill_case((32, 8), "512 after 7680", [512], cached=7680, kv=kv)
        yield prefill_case((32, 32), "16x512", [512] * 16, kv=kv)


def prefill_case(
    heads, name, lens, cached=0, window=0, block_size=BLOCK_SIZE, peer=None, goal=None, kv=torch.bfloat16
) -> Case:
    num_q, num_kv, dim = *heads, 128
    if window:
        pairs = sum(sum(min(position + 1, window) for position in range(length)) for length in lens)
    else:
        pairs = sum(length * length / 2 + length * cached for length in lens)  # half of the square, as FA3 counts
    flops = 4 * pairs * num_q * dim
    size = sum(lens) * 2 * num_q * dim * 2 + (sum(lens) + cached * len(lens)) * 2 * num_kv * dim * 2
    blocks = [(length + cached) // block_size for length in lens]
    cache, scales, _ = pages(sum(blocks), num_kv, block_size, dim, kv)
    table = torch.randperm(sum(blocks), device="cuda", dtype=torch.int32).view(len(lens), -1)
    slots = torch.arange(len(lens), device="cuda", dtype=torch.int32)
    starts = torch.tensor([0, *lens], device="cuda").cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor([length + cached for length in lens], device="cuda", dtype=torch.int32)
    q = random(sum(lens), num_q, dim)
    arguments = (q, cache, table, slots, starts, seq_lens, max(lens), dim**-0.5, window, 0.0, scales)
    plain = None
    if not cached and not window and scales is None:
        shape = (len(lens), lens[0])
        contiguous_q = random(*shape, num_q, dim).transpose(1, 2)
        k, v = random(*shape, num_kv, dim).transpose(1, 2), random(*shape, num_kv, dim).transpose(1, 2)
        plain = [lambda: F.scaled_dot_product_attention(contiguous_q, k, v, is_causal=True, enable_gqa=num_q != num_kv)]
    if peer and heads == (32, 8) and name in PREFILL_GOALS:
        goal = flops / PREFILL_GOALS[name] * 1e6
    calls = [lambda: prefill.prefill_attention(*arguments)]
    name = f"{num_q}/{num_kv} {name}{KV_NAMES[kv]}"
    return Case("prefill_attention", name, calls, size, flops, plain, peer, goal)


def all_cases() -> Iterator[Case]:
    yield from small_ops()
    yield from decode_ops()
    yield from prefill_ops()
