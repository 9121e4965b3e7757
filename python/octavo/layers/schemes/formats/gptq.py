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
    Format,
    Numbers,
    ShapeOf,
    Stored,
    dummy_index,
    from_unsigned,
    group_problem,
    group_size,
    index_problem,
    order_of,
    random_words,
    small_scales,
    unpack_words,
)
from octavo.layers.weight import WeightPart


@dataclass(frozen=True)
class GptqFormat(Format):
    """4 or 8 bits a number, with zeros."""

    bits: int
    group: int  # -1: whole rows
    act_order: bool = False
    zeros_less_one: bool = True  # the first version of the format keeps every zero minus one

    first: ClassVar = "qweight"

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits == 4 else torch.int8

    def group_of(self, inputs: int) -> int:
        return group_size(self.group, inputs)

    def stored(self, name: str, rows: int, inputs: int, dtype: torch.dtype, shape_of: ShapeOf) -> Stored:
        indexed = self.act_order or shape_of(f"{name}.g_idx") is not None
        return _GptqStored(name, rows, inputs, self, indexed)

    def __str__(self) -> str:
        return f"GPTQ, {self.bits} bits, {groups_of(self.group)}{', act-order' * self.act_order}"


def groups_of(group: int) -> str:
    """How a person says it."""
    return "a scale a row" if group == -1 else f"groups of {group}"


class _GptqStored(Stored):
    qweight: Tensor  # [inputs / (32 / bits), rows] int32, the first input lowest
    qzeros: Tensor  # [groups, rows / (32 / bits)] int32
    scales: Tensor  # [groups, rows]
    g_idx: Tensor  # [inputs] int32, where the file has it
    order: Tensor | None = None  # what sorts it, where it is not sorted

    def __init__(self, name: str, rows: int, inputs: int, form: GptqFormat, indexed: bool) -> None:
        super().__init__(name, rows, inputs)
        self.form = form
        self.indexed = indexed
        self.groups = -(-inputs // group_size(form.group, inputs))
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
            yield WeightPart(
                f"{self.name}.g_idx",
                self,
                "g_idx",
                (self.inputs,),
                init=dummy_index(self.groups),
                kinds=(torch.int32, torch.int64),
                refuse=lambda index: index_problem(index, self.groups),
            )

    def problems(self) -> Iterable[str]:
        if problem := group_problem(self.form.group, self.inputs):
            yield f"{self.name}.qweight: {problem}"

    def finish(self) -> None:
        if self.indexed:
            self.order = order_of(self.g_idx)

    def permutation(self) -> Tensor | None:
        return self.order

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
