"""GPTQ: words along the inputs, zeros along the outputs, a scale a group, and with act-order the
group of each input.

Frantar et al. 2022; the tensors are those of AutoGPTQ and GPTQModel.
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
    order_of,
    random_words,
    small_scales,
    unpack_words,
)
from octavo.layers.weight import WeightPart


@dataclass(frozen=True)
class GptqFormat(GroupedFormat):
    """4 or 8 bits a number, with zeros."""

    act_order: bool = False
    zeros_less_one: bool = True  # the first version of the format keeps every zero minus one

    first: ClassVar = "qweight"

    def stored(self, name: str, rows: int, inputs: int, dtype: torch.dtype, shape_of: ShapeOf) -> Stored:
        indexed = self.act_order or shape_of(f"{name}.g_idx") is not None
        return _GptqStored(name, rows, inputs, self, indexed)

    def __str__(self) -> str:
        return f"GPTQ, {self.bits} bits, {self.scales_are_of}{', act-order' * self.act_order}"


class _GptqStored(GroupedStored):
    form: GptqFormat
    qweight: Tensor  # [inputs / (32 / bits), rows] int32, the first input lowest
    qzeros: Tensor  # [groups, rows / (32 / bits)] int32
    scales: Tensor  # [groups, rows]
    g_idx: Tensor  # [inputs] int32, where the file has it

    def __init__(self, name: str, rows: int, inputs: int, form: GptqFormat, indexed: bool) -> None:
        super().__init__(name, rows, inputs, form)
        self.indexed = indexed
        in_word = 32 // form.bits
        self.qweight = torch.empty(inputs // in_word, rows, dtype=torch.int32, device="meta")
        self.qzeros = torch.empty(self.groups, rows // in_word, dtype=torch.int32, device="meta")
        self.scales = torch.empty(self.groups, rows, dtype=torch.float32, device="meta")
        if indexed:
            self.g_idx = torch.empty(inputs, dtype=torch.int32, device="meta")

    def own_parts(self) -> Iterable[WeightPart]:
        for name, kinds, init in (
            ("qweight", (torch.int32,), random_words),
            ("qzeros", (torch.int32,), self._dummy_zeros),
            ("scales", FLOATS, small_scales(self.inputs, self.form.bits)),
        ):
            shape = tuple(getattr(self, name).shape)
            yield WeightPart(f"{self.name}.{name}", self, name, shape, init=init, kinds=kinds)
        if self.indexed:
            yield self.index_part("g_idx")

    def finish(self) -> None:
        if self.indexed:
            self.order = order_of(self.g_idx)

    def numbers(self, start: int, stop: int) -> Numbers:
        bits = self.form.bits
        values = unpack_words(self.qweight[:, start:stop].t(), bits)
        if self.order is not None:
            values = values[:, self.order]
        zeros = unpack_words(self.qzeros, bits)[:, start:stop].t().short() + self.form.zeros_less_one
        values, zeros_ = from_unsigned(values, zeros, bits)
        return Numbers(values, self.scales[:, start:stop].t(), zeros_)

    def _dummy_zeros(self, tensor: Tensor, generator: torch.Generator) -> None:
        middle = (1 << self.form.bits - 1) - self.form.zeros_less_one
        tensor.view(torch.uint8).fill_(middle if self.form.bits == 8 else middle * 0x11)
