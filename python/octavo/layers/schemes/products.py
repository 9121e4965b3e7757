"""Products by quantised weights, as a device holds and computes them.

On a GPU: 4 bits in `kernels/linear/int4_layout.py`'s layout, 8 bits row by row, each for the
kernels of their kind. A CPU multiplies by dequantised weights: its twins of those kernels unpack a
whole matrix at each call (a hundred times the product's own time, for one token and a matrix of
4096 x 4096), so a matrix is unpacked once, into what the CPU's scheme of plain weights wants. What
rounding of activations a checkpoint asks for happens on either.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.kernels import ops
from octavo.kernels.linear.eight_bit_table import GROUPED_TOKEN_LIMITS, TOKEN_LIMITS
from octavo.kernels.linear.int4_layout import Int4Weight, join, pack
from octavo.kernels.linear.int4_table import int4_rehearsal
from octavo.layers.schemes.dense import PlainScheme
from octavo.layers.schemes.formats.stored import Format, Numbers, Stored


class Product(ABC):
    """x W^T + b of one weight [N, K]."""

    nbytes: int  # of the weight, its scales and the like

    @abstractmethod
    def __call__(self, x: Any) -> Tensor:
        """x [num_tokens, K] in the scheme's form -> [num_tokens, N]."""

    def rehearse(self, done: set[Hashable]) -> None:
        """As `Layer.rehearse`; those who launch no kernels of ours have nothing to do."""
        return None


def _rehearse(product: Callable[[Tensor], Tensor], limits: Sequence[int], x: Tensor) -> None:
    """Every number of tokens from which another kernel takes over, and one more. x: one row."""
    for tokens in (*limits, limits[-1] + 1):
        product(x.new_zeros((tokens, x.shape[1])))


class Int4Product(Product):
    """4 bits, on a GPU."""

    def __init__(self, stored: list[Stored], bias: Tensor | None, dtype: torch.dtype) -> None:
        """dtype: of the activations, to which scales are rounded."""
        self.weight: Int4Weight = join(
            [
                pack(numbers.values, numbers.scales.to(dtype), numbers.zeros, stored[0].permutation())
                for one in stored
                for numbers in one.pieces()
            ]
        )
        self.bias = bias
        order = self.weight.permutation
        self.nbytes = self.weight.nbytes + (0 if order is None else order.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.int4_linear(x, self.weight, self.bias)

    def rehearse(self, done: set[Hashable]) -> None:
        weight = self.weight
        kind = (Int4Product, weight.rows, weight.depth, weight.group, weight.zeros is None, self.bias is None)
        if kind in done:
            return
        done.add(kind)
        from octavo.kernels.launch import has_gluon  # loads Triton

        for tokens in int4_rehearsal(weight.rows, weight.depth, has_gluon(weight.words.device)):
            self(weight.words.new_zeros((tokens, weight.depth), dtype=weight.dtype))


class EightBitProduct(Product):
    """8 bits with a scale a row or one for all, on a GPU; activations in 16 bits, or in 8 bits with
    scales.
    """

    def __init__(
        self,
        pieces: list[Numbers],
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        rounds_input: bool,
        input_scale: Tensor | None,
    ) -> None:
        """dtype: of what comes out. rounds_input: the product is of 8-bit activations, which come
        as numbers and scales, or plain where they are to be rounded with `input_scale`.
        """
        self.weight = torch.cat([numbers.values for numbers in pieces])  # [N, K]
        scale = torch.cat([numbers.scales.reshape(-1) for numbers in pieces]).float()
        # The library's product with one scale is faster than with one a row.
        self.scale = scale[:1].clone() if bool((scale == scale[0]).all()) else scale
        self.input_scale = input_scale
        self.rounds_input = rounds_input
        self.bias = bias
        self.dtype = dtype
        self.nbytes = self.weight.nbytes + self.scale.nbytes

    def __call__(self, x: Any) -> Tensor:
        if not self.rounds_input:
            return ops.linear_w8a16(x, self.weight, self.scale, self.bias)
        static = self.input_scale
        values, scale = x if static is None else ops.quantize_static(x, static, self.weight.dtype)
        return ops.linear_w8a8(values, scale, self.weight, self.scale, self.dtype, self.bias)

    def rehearse(self, done: set[Hashable]) -> None:
        kind = (
            EightBitProduct,
            self.weight.shape,
            self.weight.dtype,
            self.rounds_input,
            self.input_scale is None,
            self.scale.numel() == 1,
            self.bias is None,
        )
        if kind not in done:
            done.add(kind)
            by_row = self.rounds_input and self.input_scale is None  # which is the layer before's affair
            _rehearse(
                (lambda x: self(ops.quantize_rows(x, self.weight.dtype))) if by_row else self,
                TOKEN_LIMITS,
                self.weight.new_empty((1, self.weight.shape[1]), dtype=self.dtype),
            )


class GroupedProduct(Product):
    """int8 with a scale, and perhaps a zero, a group, on a GPU; activations in 16 bits."""

    def __init__(
        self, pieces: list[Numbers], bias: Tensor | None, dtype: torch.dtype, permutation: Tensor | None
    ) -> None:
        """dtype: of the activations. permutation: `Stored.permutation`."""
        self.weight = torch.cat([numbers.values for numbers in pieces])
        self.scales = torch.cat([numbers.scales for numbers in pieces]).float().contiguous()
        self.zeros: Tensor | None = None
        if any(numbers.zeros is not None for numbers in pieces):
            none = torch.zeros((), dtype=torch.int16, device=self.weight.device)
            self.zeros = torch.cat(
                [none.expand_as(n.scales) if n.zeros is None else n.zeros for n in pieces]
            ).contiguous()
        self.permutation = permutation
        self.bias = bias
        self.dtype = dtype
        held = (self.weight, self.scales, self.zeros, self.permutation)
        self.nbytes = sum(tensor.nbytes for tensor in held if tensor is not None)

    def __call__(self, x: Tensor) -> Tensor:
        if self.permutation is not None:
            x = x.index_select(1, self.permutation)
        return ops.linear_w8a16_grouped(x, self.weight, self.scales, self.zeros, self.bias)

    def rehearse(self, done: set[Hashable]) -> None:
        kind = (GroupedProduct, self.weight.shape, self.scales.shape, self.zeros is None, self.bias is None)
        if kind not in done:
            done.add(kind)
            _rehearse(self, GROUPED_TOKEN_LIMITS, self.weight.new_empty((1, self.weight.shape[1]), dtype=self.dtype))


def eight_bit_product(stored: list[Stored], bias: Tensor | None, dtype: torch.dtype, form: Format) -> Product:
    """The product of 8-bit weights, by what their scales and zeros turn out to be."""
    pieces = [numbers for one in stored for numbers in one.pieces()]
    permutation = stored[0].permutation()
    if permutation is not None or any(n.zeros is not None or n.scales.shape[1] > 1 for n in pieces):
        return GroupedProduct(pieces, bias, dtype, permutation)
    rounds_input, input_scale = form.input_dtype is not None, stored[0].input_scale()
    return EightBitProduct(pieces, bias, dtype, rounds_input=rounds_input, input_scale=input_scale)


class UnpackedProduct(Product):
    """Dequantised weights in the form of the CPU's plain ones."""

    def __init__(
        self, stored: list[Stored], bias: Tensor | None, plain: PlainScheme, input_dtype: torch.dtype | None
    ) -> None:
        """plain: of the weight's shape, empty. input_dtype: activations are rounded to its numbers."""
        weight = torch.empty(plain.weight.shape, dtype=plain.weight.dtype)
        row = 0
        for one in stored:
            order = one.permutation()
            for numbers in one.pieces():
                values = numbers.dequantise()
                rows = weight[row : row + len(values)]
                rows[:, slice(None) if order is None else order] = values.to(weight.dtype)
                row += len(values)
        plain.weight, plain.bias = weight, bias
        plain.finish()
        self.plain = plain
        self.input_dtype = input_dtype
        self.input_scale = stored[0].input_scale()
        self.nbytes = plain.own_bytes() - (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        if self.input_dtype is None:
            return self.plain(x)
        if self.input_scale is None:
            values, scale = ops.quantize_rows(x, self.input_dtype)
        else:
            values, scale = ops.quantize_static(x, self.input_scale, self.input_dtype)
        return self.plain((values.float() * scale.unsqueeze(-1)).to(x.dtype))
