"""Weights kept as 8-bit numbers, int8 or fp8 (e4m3), with a scale a row or one for all: FP8 as
Hugging Face and AutoFP8 write it, and compressed-tensors' "float-quantized" and "int-quantized".
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from octavo.layers.schemes.formats.stored import FLOATS, Format, Numbers, ShapeOf, Stored
from octavo.layers.weight import WeightPart

SCALE_NAMES = ("weight_scale", "weight_scale_inv")  # the latter of transformers; both multiply
INPUT_SCALE_NAMES = ("input_scale", "activation_scale")


@dataclass(frozen=True)
class EightBitFormat(Format):
    """One number a byte."""

    method: str  # for people: "FP8", "compressed-tensors"
    dtype: torch.dtype  # int8 or float8_e4m3fn
    rounds_input: bool  # W8A8: activations are rounded to `dtype` too
    static_input: bool = False  # with one scale that the file has; otherwise a token has its own

    first: ClassVar = "weight"

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def input_dtype(self) -> torch.dtype | None:
        return self.dtype if self.rounds_input else None

    @property
    def row_dtype(self) -> torch.dtype | None:
        return None if self.static_input else self.input_dtype

    def stored(self, name: str, rows: int, inputs: int, dtype: torch.dtype, shape_of: ShapeOf) -> Stored:
        return _EightBitStored(name, rows, inputs, self, shape_of)

    def __str__(self) -> str:
        kind = "fp8" if self.dtype == torch.float8_e4m3fn else "int8"
        rounded = "static " if self.static_input else "dynamic "
        return f"{self.method}, {kind} weights, {rounded + kind if self.rounds_input else '16-bit'} activations"


class _EightBitStored(Stored):
    weight: Tensor  # [rows, inputs]
    scale: Tensor  # [rows, 1], [rows] or [1], as the file has it
    in_scale: Tensor  # [1], where activations have a static scale

    def __init__(self, name: str, rows: int, inputs: int, form: EightBitFormat, shape_of: ShapeOf) -> None:
        super().__init__(name, rows, inputs)
        self.form = form

        def find(names: tuple[str, ...], shapes: list[tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
            """The name that the file uses, and its shape if it is one of `shapes` (else the first)."""
            known = next((one for one in names if shape_of(f"{name}.{one}") is not None), names[0])
            shape = shape_of(f"{name}.{known}")
            return known, shapes[0] if shape is None or shape not in shapes else shape

        self.scale_name, self.scale_shape = find(SCALE_NAMES, [(rows, 1), (rows,), (1,), (), (1, 1)])
        self.weight = torch.empty(rows, inputs, dtype=form.dtype, device="meta")
        self.scale = torch.empty(self.scale_shape or 1, dtype=torch.float32, device="meta")
        if form.static_input:
            self.input_name, self.input_shape = find(INPUT_SCALE_NAMES, [(1,), (), (1, 1)])
            self.in_scale = torch.empty(self.input_shape or 1, dtype=torch.float32, device="meta")

    def own_parts(self) -> Iterable[WeightPart]:
        dtype = self.form.dtype
        shape = (self.rows, self.inputs)
        yield WeightPart(f"{self.name}.weight", self, "weight", shape, init=self._dummy, kinds=(dtype,))
        full, init = f"{self.name}.{self.scale_name}", self._dummy_scale
        yield WeightPart(full, self, "scale", self.scale_shape, init=init, kinds=FLOATS, refuse=_scale_problem)
        if self.form.static_input:
            full, init = f"{self.name}.{self.input_name}", self._dummy_input_scale
            yield WeightPart(full, self, "in_scale", self.input_shape, init=init, kinds=FLOATS, refuse=_divisor_problem)

    def numbers(self, start: int, stop: int) -> Numbers:
        scale = self.scale.reshape(-1, 1)
        scale = scale.expand(stop - start, 1) if len(scale) == 1 else scale[start:stop]
        return Numbers(self.weight[start:stop], scale, None)

    def input_scale(self) -> Tensor | None:
        return self.in_scale.reshape(1) if self.form.static_input else None

    def _dummy(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.view(torch.int8).random_(-64, 64, generator=generator)

    def _dummy_scale(self, tensor: Tensor, generator: torch.Generator) -> None:
        spread = 37.0 if self.form.dtype == torch.int8 else 0.5  # of what `_dummy` makes, as numbers of the type
        tensor.fill_(self.inputs**-0.5 / spread)

    def _dummy_input_scale(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(4.0 / (127.0 if self.form.dtype == torch.int8 else 448.0))


def _scale_problem(scale: Tensor) -> str | None:
    """Of weights: a row of zeros has a scale of zero."""
    sound = bool((scale >= 0).all() & scale.isfinite().all())
    return None if sound else "holds a scale that is negative or not finite"


def _divisor_problem(scale: Tensor) -> str | None:
    """Of activations, which are divided by it."""
    return None if bool((scale > 0).all() & scale.isfinite().all()) else "holds a scale that is not a number above 0"
