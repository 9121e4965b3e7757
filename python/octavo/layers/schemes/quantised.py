"""The scheme of a matrix in 4 or 8 bits, whatever format its checkpoint has.

While it is loaded it holds its projections as the file stores them (`formats/`); `finish` makes
products of them (`products.py`) and lets them go. Nearly always that is one product. Projections
that disagree about what they do to their input (act-order of their own, static scales of their own)
get one each.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from octavo.layers.schemes.formats.stored import Format, ShapeOf, Stored
from octavo.layers.schemes.products import Product
from octavo.layers.schemes.scheme import InputForm, Matrix, Scheme
from octavo.layers.weight import WeightPart, zeros

MakeProduct = Callable[[list[Stored], Tensor | None], Product]


class QuantisedScheme(Scheme):
    """A matrix whose projections all have one format."""

    bias: Tensor | None  # [out_features]

    def __init__(
        self,
        matrix: Matrix,
        form: Format,
        dtype: torch.dtype,
        shape_of: ShapeOf,
        *,
        input_form: InputForm,
        make: MakeProduct,
        refusal: str | None,
    ) -> None:
        """dtype: of plain weights. make: of projections that lie one below the other, and their
        bias. refuse: why the device cannot multiply by the matrix.
        """
        self.matrix = matrix
        self.input_form = input_form
        self.stored = [form.stored(name, rows, matrix.in_features, dtype, shape_of) for name, _, rows in matrix.spans()]
        self.bias = torch.empty(matrix.out_features, dtype=dtype, device="meta") if matrix.bias else None
        self.products: list[Product] = []
        self._make = make
        self._refusal = refusal
        self._first = form.first

    def own_parts(self) -> Iterable[WeightPart]:
        if self.bias is not None:
            for name, start, rows in self.matrix.spans():
                yield WeightPart(f"{name}.bias", self, "bias", (rows,), start=start, init=zeros)

    def problems(self) -> Iterable[str]:
        if self._refusal is not None:
            yield f"{next(iter(self.matrix.projections))}.{self._first}: {self._refusal}"

    def finish(self) -> None:
        start = 0
        for alike in _alike(self.stored):
            rows = sum(stored.rows for stored in alike)
            bias = None if self.bias is None else self.bias[start : start + rows]
            self.products.append(self._make(alike, bias))
            start += rows
        self.stored.clear()

    def own_bytes(self) -> int:
        held = sum(product.nbytes for product in self.products)
        return held + (0 if self.bias is None else self.bias.nbytes)

    def rehearse(self, done: set[Hashable]) -> None:
        for product in self.products:
            product.rehearse(done)

    def __call__(self, x: Any) -> Tensor:
        if len(self.products) == 1:
            return self.products[0](x)
        return torch.cat([product(x) for product in self.products], dim=-1)


def _alike(stored: list[Stored]) -> Iterator[list[Stored]]:
    """Runs of projections that treat their input alike."""
    run: list[Stored] = []
    for one in stored:
        if run and not (
            _equal(run[0].permutation(), one.permutation()) and _equal(run[0].input_scale(), one.input_scale())
        ):
            yield run
            run = []
        run.append(one)
    yield run


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


class SideBySide(Scheme):
    """Projections of one input that a checkpoint holds in different forms: a scheme each."""

    def __init__(self, matrix: Matrix, make: Callable[[Matrix], Scheme], form_of: Callable[[str], object]) -> None:
        """make: the scheme of projections with equal forms."""
        self.schemes: list[Scheme] = []
        for _, names in groupby(matrix.projections, form_of):
            part = {name: matrix.projections[name] for name in names}
            self.schemes.append(make(replace(matrix, projections=part)))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([scheme(scheme.input_form.from_plain(x)) for scheme in self.schemes], dim=-1)
