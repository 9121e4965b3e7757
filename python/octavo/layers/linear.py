"""Linear layers: one weight matrix for projections that read the same input (q, k, v; gate, up).

`Linear` knows its shape and its checkpoint tensors. How the product is computed is a `method` chosen in `finish` from
the weight's device and dtype (`layers/cpu_linear.py` has the CPU's); a quantisation scheme is another such method.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels import ops
from octavo.layers.cpu_linear import HalfMethod, PackedMethod, has_onednn, prefers_half
from octavo.layers.weight import Layer, Slot


class LinearMethod(Protocol):
    """Owns the weights in the form it multiplies with."""

    num_bytes: int  # of its weights in memory

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features]."""


class DenseMethod:
    """The product of weights as they are: on a GPU `kernels/linear/dense.py` for few tokens, cuBLAS for many."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        # On a CPU a matrix that FBGEMM cannot hold may stand among those that take float32.
        return ops.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


def linear_method(weight: Tensor, bias: Tensor | None) -> LinearMethod:
    """The fastest plain way to multiply by `weight` [out, in] on its device."""
    if weight.device.type == "cpu":
        if weight.dtype == torch.float32 and has_onednn():
            return PackedMethod(weight, bias)
        if prefers_half(weight):
            return HalfMethod(weight, bias)
    return DenseMethod(weight, bias)


class Linear(Layer):
    """y = x W^T + b for the parts of one fused matrix; the output holds the parts side by side, in their order."""

    method: LinearMethod

    def __init__(
        self, parts: Mapping[str, int], in_features: int, *, dtype: torch.dtype, bias: bool = False, name: str = ""
    ) -> None:
        """parts: checkpoint name of each projection (without `.weight`) and its number of output features."""
        self.parts = {f"{name}.{part}" if name else part: rows for part, rows in parts.items()}
        self.in_features = in_features
        self.out_features = sum(parts.values())
        self.weight = torch.empty(self.out_features, in_features, dtype=dtype, device="meta")
        self.bias = torch.empty(self.out_features, dtype=dtype, device="meta") if bias else None

    def own_slots(self) -> Iterable[Slot]:
        start = 0
        for name, rows in self.parts.items():
            yield Slot(f"{name}.weight", self, "weight", start, (rows, self.in_features))
            if self.bias is not None:
                yield Slot(f"{name}.bias", self, "bias", start, (rows,), init="zeros")
            start += rows

    def own_bytes(self) -> int:
        return self.method.num_bytes

    def finish(self) -> None:
        self.method = linear_method(self.weight, self.bias)
        del self.weight, self.bias  # the method owns them now: a packed form must not keep a second copy alive

    def __call__(self, x: Tensor) -> Tensor:  # x [num_tokens, in_features] -> [num_tokens, out_features]
        return self.method(x)
