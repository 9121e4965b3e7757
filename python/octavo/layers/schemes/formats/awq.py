"""AWQ in its "gemm" layout: words along the outputs, their eight in an order of their own.

Lin et al. 2023; the tensors are those of AutoAWQ.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from octavo.layers.schemes.formats.stored import (
    FLOATS,
    GroupedFormat,
    GroupedStored,
    Numbers,
    ShapeOf,
    Stored,
    from_unsigned,
    random_words,
    small_scales,
    unpack_words,
)
from octavo.layers.weight import WeightPart

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # output i of eight lies in nibble _PLACES[i] of its word


@dataclass(frozen=True)
class AwqFormat(GroupedFormat):
    """4 bits a number, with zeros."""

    first: ClassVar = "qweight"

    def stored(self, name: str, rows: int, inputs: int, dtype: torch.dtype, shape_of: ShapeOf) -> Stored:
        return _AwqStored(name, rows, inputs, self)

    def __str__(self) -> str:
        return f"AWQ, 4 bits, {self.scales_are_of}"


class _AwqStored(GroupedStored):
    qweight: Tensor  # [inputs, rows / 8] int32
    qzeros: Tensor  # [groups, rows / 8] int32
    scales: Tensor  # [groups, rows]

    def __init__(self, name: str, rows: int, inputs: int, form: AwqFormat) -> None:
        super().__init__(name, rows, inputs, form)
        self.qweight = torch.empty(inputs, rows // 8, dtype=torch.int32, device="meta")
        self.qzeros = torch.empty(self.groups, rows // 8, dtype=torch.int32, device="meta")
        self.scales = torch.empty(self.groups, rows, dtype=torch.float32, device="meta")

    def own_parts(self) -> Iterable[WeightPart]:
        for name, kinds, init in (
            ("qweight", (torch.int32,), random_words),
            ("qzeros", (torch.int32,), lambda tensor, generator: tensor.view(torch.uint8).fill_(0x88)),
            ("scales", FLOATS, small_scales(self.inputs, 4)),
        ):
            shape = tuple(getattr(self, name).shape)
            yield WeightPart(f"{self.name}.{name}", self, name, shape, init=init, kinds=kinds)

    def numbers(self, start: int, stop: int) -> Numbers:
        values = _in_order(self.qweight[:, start // 8 : stop // 8]).t()
        zeros = _in_order(self.qzeros[:, start // 8 : stop // 8]).t()
        values, zeros_ = from_unsigned(values, zeros, 4)
        return Numbers(values, self.scales[:, start:stop].t(), zeros_)


def _in_order(words: Tensor) -> Tensor:
    """int32 [a, W] -> uint8 [a, 8 * W]."""
    eights = unpack_words(words, 4).view(*words.shape, 8)
    return eights[..., list(_PLACES)].flatten(-2)
