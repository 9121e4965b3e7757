"""RMSNorm, alone and fused with the residual addition before it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from octavo.kernels import ops
from octavo.layers.cpu_linear import activation_dtype
from octavo.layers.weight import Layer, Slot


class RMSNorm(Layer):
    """Computed in float32, returned in the dtype of its input."""

    def __init__(self, name: str, size: int, eps: float, *, dtype: torch.dtype, add_one: bool = False) -> None:
        """add_one: the file keeps weights minus one (Gemma).

        They are then held in float32: 1 + w would lose bits of w.
        """
        self.name = name
        self.eps = eps
        self.add_one = add_one
        self.weight = torch.empty(size, dtype=torch.float32 if add_one else dtype, device="meta")

    def own_slots(self) -> Iterable[Slot]:
        init = "zeros" if self.add_one else "ones"
        yield Slot(f"{self.name}.weight", self, "weight", 0, tuple(self.weight.shape), init=init, add_one=self.add_one)

    def finish(self) -> None:
        self.weight = self.weight.to(torch.promote_types(self.weight.dtype, activation_dtype(self.weight)))

    def __call__(self, x: Tensor) -> Tensor:  # x [num_tokens, size]
        out: Tensor = ops.rms_norm(x, self.weight, self.eps)
        return out

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x, in place; returns the norm of the sum. Both [num_tokens, size]."""
        out: Tensor = ops.add_rms_norm(x, residual, self.weight, self.eps)
        return out
