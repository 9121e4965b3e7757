"""A 16-bit matrix that becomes few bits, or stays as it is, once it is in memory.

Until that is settled it multiplies by what the checkpoint has, so that whoever judges it can compare.
Who makes its input asks `input_form` as of any scheme; the ops there are those of what was settled last.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.kernels import ops
from octavo.layers.schemes.dense import PlainScheme
from octavo.layers.schemes.formats.online import OnlineFormat, OnlineStored
from octavo.layers.schemes.products import Product
from octavo.layers.schemes.quantised import MakeProduct
from octavo.layers.schemes.scheme import PLAIN, InputForm, Matrix
from octavo.layers.weight import Layer


class OnlineScheme(PlainScheme):
    """Loaded as a plain matrix; `quantise` makes the product of few bits beside it, `settle` keeps one."""

    def __init__(
        self,
        matrix: Matrix,
        form: OnlineFormat,
        dtype: torch.dtype,
        *,
        input_form: InputForm,
        make: MakeProduct,
        make_plain: Callable[[Matrix], PlainScheme],
        refusal: str | None,
        judged: bool,
    ) -> None:
        """dtype: of the plain weights. input_form: of the product that `make` makes. refusal: why the
        device cannot multiply by it. judged: somebody will call `settle`; else it quantises itself as
        soon as it is loaded.
        """
        super().__init__(matrix, dtype)
        self.judged = judged
        self.product: Product | None = None
        self.plain: PlainScheme | None = None
        self._stored = tuple(OnlineStored(name, rows, matrix.in_features, form) for name, _, rows in matrix.spans())
        self._make = make
        self._make_plain = make_plain
        self._refusal = refusal
        self._form_of_product = input_form
        self._form = PLAIN
        self.input_form = InputForm(*(partial(self._make_input, field.name) for field in fields(InputForm)))

    def _make_input(self, op: str, *args: Any) -> Any:
        return getattr(self._form, op)(*args)

    def children(self) -> Iterator[Layer]:
        return iter(())  # what the weight becomes is this layer's own

    def problems(self) -> Iterable[str]:
        for stored in self._stored:
            yield from stored.problems()
        if self._refusal is not None:
            yield f"{next(iter(self.matrix.projections))}.weight: {self._refusal}"

    def finish(self) -> None:
        if not self.judged:
            self.quantise()
            self.settle(keep=False)

    def quantise(self) -> None:
        """Makes the product of few bits and multiplies by it; the weight stays beside it."""
        for stored, (_, start, rows) in zip(self._stored, self.matrix.spans(), strict=True):
            stored.weight = self.weight[start : start + rows]
        self.product = self._make(list(self._stored), self.bias)
        self._form = self._form_of_product

    def settle(self, *, keep: bool) -> None:
        """Ends the choice. keep: the matrix stays in 16 bits; else the weight is let go."""
        if keep:
            self.product = None
            self._form = PLAIN
            self.plain = self._make_plain(self.matrix)
            self.plain.weight, self.plain.bias = self.weight, self.bias
            self.plain.finish()
            del self.bias
        del self.weight
        for stored in self._stored:
            del stored.weight
        self._stored = ()

    def own_bytes(self) -> int:
        if self.plain is not None:
            return self.plain.own_bytes()
        assert self.product is not None, "not settled"
        return self.product.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def rehearse(self, done: set[Hashable]) -> None:
        settled = self.plain or self.product
        assert settled is not None, "not settled"
        settled.rehearse(done)

    def __call__(self, x: Any) -> Tensor:
        if self.product is not None:
            return self.product(x)
        if self.plain is not None:
            return self.plain(x)
        if self.weight.is_cpu:  # hidden states are float32 there, and torch's own 16-bit product is slow
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return ops.linear(x, self.weight, self.bias)
