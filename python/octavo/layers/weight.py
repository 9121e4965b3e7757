"""How a layer says which checkpoint tensors its own tensors are made of, before any memory is taken.

A layer starts with tensors on the `meta` device and lists a `Slot` for every checkpoint tensor it wants. The loader
checks all slots against the files, then calls `allocate`, fills `Slot.destination()` and lets each layer `finish`.
Several slots may be row ranges of one tensor: that is how q, k and v become one matrix without a second copy.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """One checkpoint tensor and its place: `rows` of tensor `attribute` of `layer`."""

    name: str  # as Hugging Face names it
    layer: Any
    attribute: str
    start: int
    shape: tuple[int, ...]
    init: str = "normal"  # of dummy weights: "normal" (variance 1 / last dimension), "zeros" or "ones"
    add_one: bool = False  # Gemma's files keep norm weights minus one

    def destination(self) -> Tensor:
        """The view to fill; its shape is `shape`."""
        tensor: Tensor = getattr(self.layer, self.attribute)
        return tensor[self.start : self.start + self.shape[0]]


class Layer:
    """Base of everything that has weights: its own slots, and those of the layers it is made of."""

    def own_slots(self) -> Iterable[Slot]:
        """Slots of this layer's own tensors."""
        return ()

    def own_bytes(self) -> int:
        """Memory of this layer's weights, as they are after `finish`."""
        return sum(getattr(self, attribute).nbytes for attribute in {slot.attribute for slot in self.own_slots()})

    def finish(self) -> None:
        """Called once after the weights are in place, to choose or pack what the forward pass will use."""

    def children(self) -> Iterator["Layer"]:
        """The layers held in attributes, directly or in a list."""
        for value in vars(self).values():
            if isinstance(value, Layer):
                yield value
            elif isinstance(value, list):
                yield from (item for item in value if isinstance(item, Layer))

    def layers(self) -> Iterator["Layer"]:
        """This layer and all below it."""
        yield self
        for child in self.children():
            yield from child.layers()

    def slots(self) -> list[Slot]:
        """Every checkpoint tensor wanted by this layer and those below it."""
        return [slot for layer in self.layers() for slot in layer.own_slots()]


def allocate(slots: Iterable[Slot], device: torch.device) -> None:
    """Replaces the meta tensors behind `slots` by uninitialised ones on `device`."""
    for slot in slots:
        tensor: Tensor = getattr(slot.layer, slot.attribute)
        if tensor.is_meta:
            # Not `empty_like`: on a meta tensor it imports sympy, which takes seconds.
            setattr(slot.layer, slot.attribute, torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
