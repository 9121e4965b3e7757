"""What a scheme is: a layer that holds one weight matrix in its own form and multiplies by it.

A scheme is chosen when the model is built, so that it says itself which checkpoint tensors it is
made of (`own_parts`: names, shapes, dtypes, places), takes their memory only when its turn comes,
and packs or quantises them in `finish` before the next layer is loaded.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.layers import pointwise
from octavo.layers.weight import Layer


@dataclass(frozen=True)
class Matrix:
    """A weight [out_features, in_features]: projections of one input, one below the other (q, k, v;
    gate, up).
    """

    projections: Mapping[str, int]  # name in the checkpoint, without ".weight" -> output features
    in_features: int
    bias: bool = False
    makes_logits: bool = False

    @property
    def out_features(self) -> int:
        """Of all projections."""
        return sum(self.projections.values())

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """(name, first output, number of outputs) of each projection."""
        start = 0
        for name, rows in self.projections.items():
            yield name, start, rows
            start += rows


@dataclass(slots=True)
class InputForm:
    """The form in which a scheme takes its input, as the ops that make it.

    The layer before a product calls these, because a norm or an activation that quantises its own
    output saves a launch and a trip through memory. One matrix has one producer and one form.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Any]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Any]
    silu_and_mul: Callable[[Tensor], Any]
    gelu_tanh_and_mul: Callable[[Tensor], Any]
    from_plain: Callable[[Tensor], Any]  # of what has no fused op: the output of attention


PLAIN = InputForm(
    pointwise.rms_norm,
    pointwise.add_rms_norm,
    pointwise.silu_and_mul,
    pointwise.gelu_tanh_and_mul,
    lambda x: x,
)
"""A tensor [num_tokens, in_features] of the hidden states' dtype."""


class Scheme(Layer, ABC):
    """y = x W^T + b; the output holds the matrix's projections side by side, in their order."""

    input_form: InputForm = PLAIN

    @abstractmethod
    def __call__(self, x: Any) -> Tensor:
        """x [num_tokens, in_features] as `input_form` makes it -> [num_tokens, out_features]."""
