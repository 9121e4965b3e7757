"""16-bit weights that are quantised while they are loaded, rounded to the nearest number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from octavo.kernels import ops
from octavo.layers.schemes.formats.stored import Format, Numbers, ShapeOf, Stored

GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class OnlineFormat(Format):
    """fp8: a scale a row, activations rounded too, a scale a token. int8: a scale a row. int4: a
    scale a group of 128 inputs, or of 64 or 32 where that does not divide.
    """

    kind: str  # "fp8", "int8" or "int4"

    first: ClassVar = "weight"

    @property
    def weight_dtype(self) -> torch.dtype:
        return {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[self.kind]

    @property
    def input_dtype(self) -> torch.dtype | None:
        return torch.float8_e4m3fn if self.kind == "fp8" else None

    def group_of(self, inputs: int) -> int:
        return next((group for group in GROUPS if inputs % group == 0), inputs) if self.kind == "int4" else inputs

    def stored(self, name: str, rows: int, inputs: int, dtype: torch.dtype, shape_of: ShapeOf) -> Stored:
        return OnlineStored(name, rows, inputs, self)

    def __str__(self) -> str:
        return f"{self.kind}, quantised while loading"


class OnlineStored(Stored):
    """Rows of a plain weight, which whoever has loaded it lends."""

    weight: Tensor  # [rows, inputs]

    def __init__(self, name: str, rows: int, inputs: int, form: OnlineFormat) -> None:
        super().__init__(name, rows, inputs)
        self.form = form

    def problems(self) -> Iterable[str]:
        if self.form.kind == "int4" and self.inputs % GROUPS[-1]:
            yield f"{self.name}.weight: {self.inputs} inputs are not a multiple of {GROUPS[-1]}, the smallest group"

    def numbers(self, start: int, stop: int) -> Numbers:
        weight = self.weight[start:stop]
        if self.form.kind == "int4":
            return round_to_int4(weight, self.form.group_of(self.inputs))
        values, scales = ops.quantize_rows(weight, self.form.weight_dtype)
        return Numbers(values, scales.unsqueeze(1), None)


def round_to_int4(weight: Tensor, group: int) -> Numbers:
    """weight [n, K]: the largest magnitude of a group becomes -8 steps, whichever its sign, so that
    all sixteen numbers are used; scales have the weight's dtype, and zeros are 8.
    """
    rows, depth = weight.shape
    groups = weight.float().view(rows, depth // group, group)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (largest / -8.0).to(weight.dtype)
    steps = torch.nan_to_num(groups / scales.float(), 0.0, 0.0, 0.0)  # a group of zeros has a scale of zero
    values = steps.round_().add_(8.0).clamp_(0.0, 15.0).to(torch.uint8)
    return Numbers(values.view(rows, depth), scales.squeeze(-1), None)
