"""One internal layout for 4-bit weights, whatever a checkpoint has, made once at load.

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
    parts = numbers.to(torch.uint8).reshape(rows // 16, 2, 8, depth // 64, 2, 2, 2, 4, 2)
    parts = parts.permute(0, 3, 2, 7, 4, 5, 8, 1, 6)  # tile n, tile k | r, c | u, s | pair, upper row, half
    words = (parts[..., 0] | parts[..., 1] << 4).reshape(rows // 16, depth // 64, 128, 4).view(torch.int32)
    return Int4Weight(
        words.squeeze(-1),
        _pair_rows(scales).view(torch.int32).squeeze(-1),
        None if zeros is None else _pair_rows(zeros.to(torch.uint8)).view(torch.int16).squeeze(-1),
        permutation,
        depth // groups,
        scales.dtype,
    )


def join(weights: list[Int4Weight]) -> Int4Weight:
    """Weights of one depth, group and permutation as one, their rows one below the other."""
    first = weights[0]
    if len(weights) == 1:
        return first
    zeros = None
    if any(weight.zeros is not None for weight in weights):
        eight = torch.tensor(0x0808, dtype=torch.int16, device=first.words.device)
        zeros = torch.cat([eight.expand_as(w.scales) if w.zeros is None else w.zeros for w in weights])
    return Int4Weight(
        torch.cat([weight.words for weight in weights]),
        torch.cat([weight.scales for weight in weights]),
        zeros,
        first.permutation,
        first.group,
        first.dtype,
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
