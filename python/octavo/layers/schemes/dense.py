"""Weights as the checkpoint has them, and the product of plain matrices."""

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from octavo.kernels import ops
from octavo.kernels.linear.dense_table import dense_token_limits
from octavo.layers.schemes.scheme import Matrix, Scheme
from octavo.layers.weight import WeightPart, zeros


class PlainScheme(Scheme):
    """Base of the schemes whose checkpoint tensors are `weight` and `bias`, rows of one matrix."""

    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None  # [out_features]

    def __init__(self, matrix: Matrix, dtype: torch.dtype) -> None:
        self.matrix = matrix
        self.weight = torch.empty(matrix.out_features, matrix.in_features, dtype=dtype, device="meta")
        self.bias = torch.empty(matrix.out_features, dtype=dtype, device="meta") if matrix.bias else None

    def own_parts(self) -> Iterable[WeightPart]:
        for name, start, rows in self.matrix.spans():
            yield WeightPart(f"{name}.weight", self, "weight", (rows, self.matrix.in_features), start=start)
            if self.matrix.bias:
                yield WeightPart(f"{name}.bias", self, "bias", (rows,), start=start, init=zeros)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [num_tokens, in_features] by weight and bias as they are -> [num_tokens, out_features] of
    x's dtype.
    """
    # On a CPU a matrix that FBGEMM cannot hold may stand among those that take float32.
    return ops.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


class DenseScheme(PlainScheme):
    """The matrix as it is: on a GPU `kernels/linear/dense.py` for few tokens, cuBLAS for many."""

    def rehearse(self, done: set[Hashable]) -> None:
        """With every number of tokens from which another kernel takes over."""
        kind = (DenseScheme, self.weight.shape, self.bias is None)
        if kind in done:
            return
        done.add(kind)
        x = self.weight.new_zeros(max(dense_token_limits()), self.matrix.in_features)
        for tokens in dense_token_limits():
            self(x[:tokens])

    def __call__(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight, self.bias)
