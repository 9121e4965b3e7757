"""One internal layout for 4-bit weights of GPTQ and AWQ, made once at load.

A weight is a number 0..15; `(number - zero) * scale` is its value, with a zero and a scale a group
of consecutive k and output row. The kernels multiply weights x tokens on the tensor cores, so
numbers lie in the order in which a thread of `mma.m16n8k16` or `wgmma` holds its left operand: one
16-byte load of a lane brings its part of a tile of 16 rows x 64 k, and a warp reads a tile as 512
consecutive bytes.

A tile is 32 lanes x 4 words. Lane `4 * r + c` holds rows r and r + 8. The k of a number is
`16 * step + 8 * half + 2 * c + pair`; step = 2 * u + s. Words 2u and 2u + 1 hold step pair u: word
`2 * u + s`, low 16 bits pair 0 and high 16 bits pair 1, nibble `2 * upper row + half` of each. So
`(word >> 4 * i) & 0x000f000f` is a pair of neighbours in k, as the tensor cores want two 16-bit
numbers in a register, and `| 0x43004300` makes it two bf16 128 + number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS, DEPTH = 16, 64  # of a tile
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of an AWQ word is output _AWQ_ORDER[i] of its eight


@dataclass(frozen=True)
class Int4Weight:
    """A weight [N, K] in 4 bits."""

    words: Tensor  # [N / 16, K / 64, 128] int32
    scales: Tensor  # [N / 16, K / group, 8] int32: the scales of rows r (low half) and r + 8, in `dtype`
    zeros: Tensor | None  # [N / 16, K / group, 8] int16: the zeros of rows r (low byte) and r + 8; None: all are 8
    permutation: Tensor | None  # [K] int64: the weight's k-th column belongs to x[:, permutation[k]]; None: to x[:, k]
    group: int  # consecutive k with one scale
    dtype: torch.dtype  # of the scales and of the activations

    @property
    def rows(self) -> int:
        """N."""
        return self.words.shape[0] * ROWS

    @property
    def depth(self) -> int:
        """K."""
        return self.words.shape[1] * DEPTH

    @property
    def halves(self) -> int:
        """How many 32 k of a tile have one scale."""
        return 1 if self.group == 32 else 2

    @property
    def nbytes(self) -> int:
        """What a product reads of it."""
        return sum(tensor.nbytes for tensor in (self.words, self.scales, self.zeros) if tensor is not None)


def pack(numbers: Tensor, scales: Tensor, zeros: Tensor | None, permutation: Tensor | None = None) -> Int4Weight:
    """Numbers [N, K] of 0..15 (any integer type), scales [N, groups] fp16 or bf16, zeros [N,
    groups] of 0..16 or None for 8 everywhere; `permutation` [K] int64 if column k belongs to x[:,
    permutation[k]].

    Raises ValueError naming a size that does not fit the tiles: N in sixteens, K in 64s, groups of
    32 or of a multiple of 64 that divides K.
    """
    rows, depth = numbers.shape
    groups = scales.shape[1]
    if rows % ROWS:
        raise ValueError(f"int4 weight of {rows} outputs: outputs must be a multiple of {ROWS}")
    if depth % DEPTH:
        raise ValueError(f"int4 weight of {depth} inputs: inputs must be a multiple of {DEPTH}")
    if depth % groups or (depth // groups != 32 and depth // groups % DEPTH):
        raise ValueError(
            f"int4 weight of {depth} inputs in {groups} groups: a group must be 32 or a multiple of {DEPTH} inputs"
        )
    if scales.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"int4 scales of {scales.dtype}: must be float16 or bfloat16")
    # n = (tile, upper row, r), k = (tile, u, s, half, c, pair)
    parts = numbers.to(torch.int32).reshape(rows // 16, 2, 8, depth // 64, 2, 2, 2, 4, 2)
    parts = parts.permute(0, 3, 2, 7, 4, 5, 8, 1, 6)  # tile n, tile k | r, c | u, s | pair, upper row, half
    parts = parts.reshape(rows // 16, depth // 64, 128, 8)
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=numbers.device)
    words = (parts << shifts).sum(-1, dtype=torch.int64)  # the nibbles are disjoint, so the sum is their union
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return Int4Weight(
        words.contiguous(),
        _pair_rows(scales).view(torch.int32).squeeze(-1),
        None if zeros is None else _pair_rows(zeros.to(torch.uint8)).view(torch.int16).squeeze(-1),
        permutation,
        depth // groups,
        scales.dtype,
    )


def _pair_rows(values: Tensor) -> Tensor:
    """[N, groups] as [N / 16, groups, 8, 2]: rows r and r + 8 side by side."""
    rows, groups = values.shape
    return values.reshape(rows // 16, 2, 8, groups).permute(0, 3, 2, 1).contiguous()


def unpack(weight: Int4Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Back from the layout: numbers [N, K] int32, scales [N, groups] and zeros [N, groups] int32,
    columns permuted.
    """
    tiles, steps = weight.words.shape[:2]
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=weight.words.device)
    parts = ((weight.words[..., None] >> shifts) & 15).reshape(tiles, steps, 8, 4, 2, 2, 2, 2, 2)
    numbers = parts.permute(0, 7, 2, 1, 4, 5, 8, 3, 6).reshape(weight.rows, weight.depth)
    scales = _split_rows(weight.scales.unsqueeze(-1).view(weight.dtype))
    if weight.zeros is None:
        return numbers, scales, torch.full_like(scales, 8, dtype=torch.int32)
    return numbers, scales, _split_rows(weight.zeros.unsqueeze(-1).view(torch.uint8)).int()


def _split_rows(values: Tensor) -> Tensor:
    tiles, groups = values.shape[:2]
    return values.permute(0, 3, 2, 1).reshape(tiles * 16, groups)


def _nibbles(words: Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """int32 [..., W] as the eight numbers of each word, [..., W, 8]; place `order[i]` takes nibble
    i.
    """
    shifts = torch.tensor([4 * order.index(place) for place in range(8)], dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts) & 15


def pack_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, dtype: torch.dtype | None = None
) -> Int4Weight:
    """GPTQ's 4-bit tensors: qweight [K / 8, N] int32 with eight k a word, lowest first; qzeros
    [groups, N / 8] int32 with eight outputs a word, each one below its zero; scales [groups, N]
    fp16 or bf16; g_idx [K], the group of each k (act-order if it is not sorted). `dtype`: that of
    the activations, to which scales are rounded (default: theirs).

    Raises ValueError naming what does not fit: tensors that contradict each other, groups of
    unequal size, and what `pack` refuses.
    """
    groups, rows = scales.shape
    depth = qweight.shape[0] * 8
    if qweight.shape[1] != rows:
        raise ValueError(f"GPTQ qweight is for {qweight.shape[1]} outputs, scales for {rows}")
    if qzeros.shape != (groups, rows // 8) or rows % 8:
        raise ValueError(f"GPTQ qzeros {tuple(qzeros.shape)} do not fit {groups} groups x {rows} outputs")
    numbers = _nibbles(qweight.t().contiguous()).reshape(rows, depth)
    zeros = _nibbles(qzeros).reshape(groups, rows).t() + 1
    permutation = None
    if g_idx is not None:
        if g_idx.shape != (depth,):
            raise ValueError(f"GPTQ g_idx {tuple(g_idx.shape)} does not fit {depth} inputs")
        group_of = g_idx.long()
        counts = torch.bincount(group_of, minlength=groups)
        if counts.shape[0] != groups or (counts != depth // groups).any():
            raise ValueError(f"GPTQ g_idx does not cut {depth} inputs into {groups} equal groups")
        if (group_of[1:] < group_of[:-1]).any():
            permutation = torch.argsort(group_of, stable=True)
            numbers = numbers[:, permutation]
    return pack(
        numbers, scales.t().to(dtype or scales.dtype), None if (zeros == 8).all() else zeros, permutation=permutation
    )


def pack_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> Int4Weight:
    """AWQ's 4-bit tensors (the "gemm" format): qweight [K, N / 8] int32 and qzeros [groups, N / 8]
    int32 with eight outputs a word in the order 0, 2, 4, 6, 1, 3, 5, 7; scales [groups, N] fp16 or
    bf16. `dtype`: that of the activations, to which scales are rounded (default: theirs).

    Raises ValueError naming what does not fit: tensors that contradict each other, and what `pack`
    refuses.
    """
    groups, rows = scales.shape
    depth = qweight.shape[0]
    if qweight.shape[1] * 8 != rows:
        raise ValueError(f"AWQ qweight is for {qweight.shape[1] * 8} outputs, scales for {rows}")
    if qzeros.shape != (groups, rows // 8):
        raise ValueError(f"AWQ qzeros {tuple(qzeros.shape)} do not fit {groups} groups x {rows} outputs")
    numbers = _nibbles(qweight, _AWQ_ORDER).reshape(depth, rows).t()
    zeros = _nibbles(qzeros, _AWQ_ORDER).reshape(groups, rows).t()
    return pack(numbers, scales.t().to(dtype or scales.dtype), None if (zeros == 8).all() else zeros)
