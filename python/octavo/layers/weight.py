"""How a layer says which checkpoint tensors its own tensors are made of, before any memory is
taken.

A layer starts with tensors on the `meta` device and lists a `WeightPart` for every checkpoint
tensor it wants. The loader checks all parts against the files; then, layer by layer, it calls
`allocate`, fills each `WeightPart.destination()` and lets the layer `finish`. So at most one layer
is in memory both as the file has it and as the layer wants it. Several parts may be ranges of one
tensor: that is how q, k and v become one matrix without a second copy.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from octavo._core import BlockMatrix

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def normal(tensor: Tensor, generator: torch.Generator) -> None:
    """Variance 1 / (last dimension): a matrix of such weights keeps the scale of what it
    multiplies.
    """
    tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)


def zeros(tensor: Tensor, generator: torch.Generator) -> None:
    """All zero."""
    tensor.zero_()


def ones(tensor: Tensor, generator: torch.Generator) -> None:
    """All one."""
    tensor.fill_(1.0)


@dataclass(frozen=True)
class WeightPart:
    """One checkpoint tensor and its place: a range along `dim` of tensor `attribute` of `layer`."""

    name: str  # as Hugging Face names it
    layer: "Layer"
    attribute: str
    shape: tuple[int, ...]  # in the checkpoint; () is one element
    dim: int = 0
    start: int = 0  # first index along `dim`
    init: Callable[[Tensor, torch.Generator], object] = normal  # makes dummy weights in `destination()`
    kinds: tuple[torch.dtype, ...] = PLAIN_DTYPES  # that the file may have it in
    refuse: Callable[[Tensor], str | None] | None = None  # of a small tensor: what is wrong with its values
    add_one: bool = False  # the checkpoint may keep it minus one (`Source.norms_include_one`)
    hold: "Callable[[BlockMatrix], None] | None" = None  # takes the file's own blocks; nothing is filled then

    def destination(self) -> Tensor:
        """The view to fill, of shape `shape`, with the dtype of the layer's tensor."""
        tensor: Tensor = getattr(self.layer, self.attribute)
        return tensor.narrow(self.dim, self.start, self.shape[self.dim] if self.shape else 1).view(self.shape)


class Layer:
    """Base of everything that has weights: its own parts, and those of the layers it is made of."""

    def own_parts(self) -> Iterable[WeightPart]:
        """Parts of this layer's own tensors."""
        return ()

    def problems(self) -> Iterable[str]:
        """Why this layer's own tensors cannot be what the checkpoint's config says, whatever they
        hold; each begins with a tensor's name.
        """
        return ()

    def own_bytes(self) -> int:
        """Memory of this layer's own weights, as they are after `finish`."""
        return sum(getattr(self, attribute).nbytes for attribute in _filled(self.own_parts()))

    def finish(self) -> None:
        """Called once, when this layer's parts are filled and before the next layer's are
        allocated.

        Packs or quantises them into what the forward pass uses, and lets go of what that replaces.
        The layers below this one have finished.
        """

    def rehearse(self, done: set[Hashable]) -> None:
        """Launches this layer's own kernels in every variant that a step may ask for (GPU only).

        done: the kinds of kernels that were launched already. A layer adds its own, and does
        nothing if an equal one was here before.
        """

    def children(self) -> Iterator["Layer"]:
        """The layers held in attributes, directly or in a list."""
        for value in vars(self).values():
            if isinstance(value, Layer):
                yield value
            elif isinstance(value, list):
                yield from (item for item in value if isinstance(item, Layer))

    def layers(self) -> Iterator["Layer"]:
        """All layers below this one, each after those it is made of, then this one."""
        for child in self.children():
            yield from child.layers()
        yield self

    def parts(self) -> list[WeightPart]:
        """Every checkpoint tensor wanted by this layer and those below it."""
        return [part for layer in self.layers() for part in layer.own_parts()]


def _filled(parts: Iterable[WeightPart]) -> set[str]:
    """The tensors that these parts fill."""
    return {part.attribute for part in parts if part.hold is None}


def allocate(layer: Layer, device: torch.device) -> list[WeightPart]:
    """Replaces the layer's own meta tensors by uninitialised ones on `device`; returns the parts to
    fill.
    """
    parts = list(layer.own_parts())
    for attribute in _filled(parts):
        tensor: Tensor = getattr(layer, attribute)
        # Not `empty_like`: on a meta tensor it imports sympy, which takes seconds.
        setattr(layer, attribute, torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    return parts
