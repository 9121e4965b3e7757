"""Weights as numbers of few bits: the grid of each group, and what rounding to it gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP8_MAX = 448.0


@dataclass(frozen=True)
class Rounded:
    """A weight [N, K] as `(number - zero) * scale`."""

    numbers: Tensor  # [N, K]: uint8 from 0; or int8 or float8_e4m3fn, without zeros and with one group
    scales: Tensor  # [N, G]
    zeros: Tensor | None  # [N, G] uint8
    groups: Tensor | None = None  # [K] int32: the group of each input, where they are not in order

    def rows(self, start: int, stop: int) -> Rounded:
        """Some rows of it."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return Rounded(self.numbers[start:stop], self.scales[start:stop], zeros, self.groups)

    def dequantise(self) -> Tensor:
        """[N, K] float32."""
        groups = self.groups
        if groups is None:
            depth, count = self.numbers.shape[1], self.scales.shape[1]
            groups = torch.arange(count, device=self.numbers.device).repeat_interleave(depth // count)
        values = self.numbers.float()
        if self.zeros is not None:
            values.sub_(self.zeros.float()[:, groups.long()])
        return values.mul_(self.scales.float()[:, groups.long()])


@dataclass(frozen=True)
class Grid:
    """Unsigned numbers of some bits, a scale and a zero a group of inputs of one row."""

    bits: int
    group: int  # inputs
    symmetric: bool  # zeros in the middle, and as far to both sides
    scale_dtype: torch.dtype  # in which scales are stored: numbers are rounded against what is stored
    lowest_zero: int = 0

    @property
    def top(self) -> int:
        """The largest number."""
        return (1 << self.bits) - 1

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [..., group] float32 -> scales and zeros [..., 1] float32, such that nothing is
        cut off.
        """
        if self.symmetric:
            scale = weight.abs().amax(-1, keepdim=True) * (2 / self.top)
            zero = torch.full_like(scale, (self.top + 1) // 2)
        else:
            low, high = (x.unsqueeze(-1) for x in torch.aminmax(weight, dim=-1))
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
            scale = (high - low) / self.top
            zero = torch.nan_to_num(-low / scale, 0.0).round_().clamp_(self.lowest_zero, self.top)
        scale = scale.to(self.scale_dtype).float()
        return torch.where(scale == 0, 1.0, scale), zero  # a group of zeros

    def number(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest numbers, as float32."""
        return (weight / scale).round_().add_(zero).clamp_(0, self.top)

    def nearest(self, weight: Tensor) -> Tensor:
        """What remains of weight [..., group] float32 after rounding, float32."""
        scale, zero = self.fit(weight)
        return self.number(weight, scale, zero).sub_(zero).mul_(scale)

    def round(self, weight: Tensor) -> Rounded:
        """weight [N, K] float32, each number to the nearest."""
        rows, depth = weight.shape
        groups = weight.view(rows, depth // self.group, self.group)
        scales, zeros = self.fit(groups)
        numbers = self.number(groups, scales, zeros).view(rows, depth)
        return self.rounded(numbers, scales.squeeze(-1), zeros.squeeze(-1))

    def rounded(self, numbers: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor | None = None) -> Rounded:
        """Of float32 tensors."""
        return Rounded(numbers.to(torch.uint8), scales.to(self.scale_dtype), zeros.to(torch.uint8), groups)


def round_rows(weight: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype) -> Rounded:
    """weight [N, K] float32 -> numbers of `dtype`, int8 or float8_e4m3fn, with a scale a row."""
    top = 127.0 if dtype == torch.int8 else FP8_MAX
    scale = (weight.abs().amax(1, keepdim=True) / top).to(scale_dtype)
    steps = (weight / torch.where(scale == 0, 1.0, scale.float())).clamp_(-top, top)
    return Rounded((steps.round_() if dtype == torch.int8 else steps).to(dtype), scale, None)
