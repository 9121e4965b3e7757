"""compressed-tensors' "pack-quantized": words along the inputs, signed numbers plus half their
range, scales and packed zeros along the outputs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

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
class PackedFormat(GroupedFormat):
    """4 or 8 bits a number."""

    symmetric: bool
    act_order: bool = False  # the group of each input is in the file

    first: ClassVar = "weight_packed"

    def stored(self, name: str, rows: int, inputs: int, dtype: torch.dtype, shape_of: ShapeOf) -> Stored:
        return _PackedStored(name, rows, inputs, self, shape_of(f"{name}.weight_shape") is not None)

    def __str__(self) -> str:
        return f"compressed-tensors, {self.bits} bits, {self.scales_are_of}{', act-order' * self.act_order}"


class _PackedStored(GroupedStored):
    form: PackedFormat
    weight_packed: Tensor  # [rows, inputs / (32 / bits)] int32, the first input lowest
    weight_scale: Tensor  # [rows, groups]
    weight_zero_point: Tensor  # [rows / (32 / bits), groups] int32, the first row lowest; unless symmetric
    weight_g_idx: Tensor  # [inputs] int32, with act-order
    weight_shape: Tensor  # [2] int64, where the file has it

    def __init__(self, name: str, rows: int, inputs: int, form: PackedFormat, has_shape: bool) -> None:
        super().__init__(name, rows, inputs, form)
        self.has_shape = has_shape
        in_word = 32 // form.bits
        self.weight_packed = torch.empty(rows, -(-inputs // in_word), dtype=torch.int32, device="meta")
        self.weight_scale = torch.empty(rows, self.groups, dtype=torch.float32, device="meta")
        if not form.symmetric:
            self.weight_zero_point = torch.empty(-(-rows // in_word), self.groups, dtype=torch.int32, device="meta")
        if form.act_order:
            self.weight_g_idx = torch.empty(inputs, dtype=torch.int32, device="meta")
        if has_shape:
            self.weight_shape = torch.empty(2, dtype=torch.int64, device="meta")

    def own_parts(self) -> Iterable[WeightPart]:
        def part(name: str, **how: Any) -> WeightPart:
            return WeightPart(f"{self.name}.{name}", self, name, tuple(getattr(self, name).shape), **how)

        yield part("weight_packed", init=random_words, kinds=(torch.int32,))
        yield part("weight_scale", init=small_scales(self.inputs, self.form.bits), kinds=FLOATS)
        if not self.form.symmetric:
            yield part("weight_zero_point", init=random_words, kinds=(torch.int32,))
        if self.form.act_order:
            yield self.index_part("weight_g_idx")
        if self.has_shape:
            yield part("weight_shape", init=random_words, kinds=(torch.int64, torch.int32), refuse=self._shape_problem)

    def finish(self) -> None:
        if self.form.act_order:
            self.order = order_of(self.weight_g_idx)

    def numbers(self, start: int, stop: int) -> Numbers:
        bits = self.form.bits
        values = unpack_words(self.weight_packed[start:stop], bits)[:, : self.inputs]
        if self.order is not None:
            values = values[:, self.order]
        zeros = None
        if not self.form.symmetric:
            zeros = unpack_words(self.weight_zero_point.t(), bits).t()[start:stop].short()
        values, zeros = from_unsigned(values, zeros, bits)
        return Numbers(values, self.weight_scale[start:stop], zeros)

    def _shape_problem(self, shape: Tensor) -> str | None:
        wanted = [self.rows, self.inputs]
        return None if shape.tolist() == wanted else f"is {shape.tolist()}, but the config says {wanted}"
