"""RMSNorm, alone and fused with the residual addition before it."""

from collections.abc import Iterable
from typing import Any

import torch

from octavo.layers.schemes.choice import Schemes
from octavo.layers.schemes.scheme import PLAIN, InputForm
from octavo.layers.weight import Layer, WeightPart, ones


class RMSNorm(Layer):
    """Computed in float32, returned in the form that its reader takes."""

    def __init__(
        self,
        name: str,
        size: int,
        eps: float,
        *,
        schemes: Schemes,
        form: InputForm = PLAIN,
        add_one: bool = False,
    ) -> None:
        """form: `input_form` of the product that reads the output, or where none does one of `schemes`.
        add_one: the file keeps weights minus one.

        Those are held in float32: 1 + w would lose bits of w.
        """
        self.name = name
        self.eps = eps
        self.form = form
        self.add_one = add_one
        self.activation_dtype = schemes.activation_dtype
        self.hold = schemes.hold
        self.weight = torch.empty(size, dtype=torch.float32 if add_one else schemes.dtype, device="meta")

    def own_parts(self) -> Iterable[WeightPart]:
        shape = tuple(self.weight.shape)
        yield WeightPart(f"{self.name}.weight", self, "weight", shape, init=ones, add_one=self.add_one)

    def finish(self) -> None:
        self.weight = self.weight.to(torch.promote_types(self.weight.dtype, self.activation_dtype))
        self.operand = self.hold(self.weight)

    def __call__(self, x: Any) -> Any:  # x [num_tokens, size]
        return self.form.rms_norm(x, self.operand, self.eps)

    def add(self, x: Any, residual: Any) -> Any:
        """residual += x, in place; returns the norm of the sum. Both [num_tokens, size]."""
        return self.form.add_rms_norm(x, residual, self.operand, self.eps)
