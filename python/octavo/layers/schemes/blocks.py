"""Weights in the blocks of a GGUF file, multiplied as they are. Rows are put sixteen side by side when a
product is made of them; a table that is only looked up stays where the file is mapped.

The product is the extension's (`rust/cpu`). It takes what its input is made of, computes a norm or
a gate itself, and rounds the result to 16 bits, 32 numbers a scale. So a decoder layer crosses into
it once for each product and once for attention. Between these ops hidden states are `Floats`, memory
of the extension's: a tensor costs some 3 us to make and to look at, five of them a layer. Tensors stand
at both ends, ids and hidden states that leave the layers.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo import _core
from octavo.layers.schemes.scheme import InputForm, Matrix, Scheme
from octavo.layers.weight import Layer, WeightPart, zeros

FLOATS = InputForm(_core.rms_norm, _core.add_rms_norm, _core.silu_and_mul, _core.gelu_tanh_and_mul, lambda x: x)
"""Of what no product reads."""


def _add_rms_norm(x: Any, residual: Any, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape)
    _core.add_rms_norm(x, residual, weight, eps, out)
    return out


LEAVING = replace(FLOATS, add_rms_norm=_add_rms_norm)
"""Of the norm whose output leaves the layers."""


class BlockScheme(Scheme):
    """A matrix whose projections are in blocks, each of its own format. Whoever makes its input has
    multiplied: the ops of `input_form` are the product's.
    """

    bias: Tensor | None  # [out_features] float32

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.blocks: dict[str, _core.BlockMatrix] = {}
        self.bias = torch.empty(matrix.out_features, device="meta") if matrix.bias else None
        self.input_form = replace(FLOATS)  # its own; `finish` has its ops

    def hold(self, name: str, blocks: _core.BlockMatrix) -> None:
        """Takes the blocks of one projection."""
        self.blocks[name] = blocks

    def own_parts(self) -> Iterable[WeightPart]:
        for name, start, rows in self.matrix.spans():
            shape = (rows, self.matrix.in_features)
            yield WeightPart(f"{name}.weight", self, "blocks", shape, hold=partial(self.hold, name))
            if self.bias is not None:
                yield WeightPart(f"{name}.bias", self, "bias", (rows,), start=start, init=zeros)

    def finish(self) -> None:
        self.product = _core.BlockProduct([self.blocks[name] for name in self.matrix.projections], self.bias)
        form = self.input_form
        form.rms_norm, form.add_rms_norm = self.product.rms_norm, self.product.add_rms_norm
        form.silu_and_mul, form.gelu_tanh_and_mul = self.product.silu_and_mul, self.product.gelu_tanh_and_mul
        form.from_plain = self._make_logits if self.matrix.makes_logits else self.product.plain

    def own_bytes(self) -> int:
        held = sum(blocks.nbytes for blocks in self.blocks.values())
        return held + (0 if self.bias is None else self.bias.nbytes)

    def _make_logits(self, hidden: Tensor) -> Tensor:
        out = torch.empty(hidden.shape[0], self.matrix.out_features)
        self.product.plain(hidden, out)
        return out

    def __call__(self, x: Any) -> Any:
        """-> x, `Floats` [num_tokens, out_features]; logits are a tensor."""
        return x


class BlockTable(Layer):
    """A table of embeddings in blocks."""

    blocks: _core.BlockMatrix

    def __init__(self, name: str, rows: int, size: int) -> None:
        self.name = name
        self.shape = (rows, size)

    def hold(self, blocks: _core.BlockMatrix) -> None:
        """Takes the table's blocks."""
        self.blocks = blocks

    def own_parts(self) -> Iterable[WeightPart]:
        yield WeightPart(f"{self.name}.weight", self, "blocks", self.shape, hold=self.hold)

    def own_bytes(self) -> int:
        return self.blocks.nbytes

    def __call__(self, indices: Tensor, scale: float) -> Any:
        """indices [n] -> `Floats` [n, size], times `scale`."""
        return self.blocks.take(indices.int(), scale)
