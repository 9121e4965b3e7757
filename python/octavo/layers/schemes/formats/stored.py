"""What every format comes down to, and what a format has to say of one projection.

A `Format` is what a checkpoint's config says of a projection; its `stored` makes the layer that
holds that projection's tensors as the file has them. They live until the scheme above has packed
them, piece by piece: `numbers` gives some rows at a time, so that no whole matrix is ever unpacked.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from octavo.layers.weight import Layer, WeightPart

ShapeOf = Callable[[str], tuple[int, ...] | None]
"""The shape of a tensor of the file; None where it has none of that name."""

PIECE = 1 << 24
"""Numbers that are unpacked at a time: 64 MiB where each takes 4 bytes on the way."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Numbers:
    """Rows of a weight [N, K]: `(number - zero) * scale`, a scale and a zero for each row and group
    of consecutive k.
    """

    values: Tensor  # [n, K]: uint8 of 0..15 (4 bits), int8 or float8_e4m3fn
    scales: Tensor  # [n, groups], any float dtype
    zeros: Tensor | None  # [n, groups] int16; None: 8 everywhere for 4 bits, 0 for 8

    def dequantise(self) -> Tensor:
        """[n, K] float32."""
        rows, depth = self.values.shape
        values = self.values.float().view(rows, self.scales.shape[1], -1)
        zeros = 8.0 if self.values.dtype == torch.uint8 else 0.0
        values = values - (zeros if self.zeros is None else self.zeros.float().unsqueeze(-1))
        return values.mul_(self.scales.float().unsqueeze(-1)).view(rows, depth)


class Stored(Layer, ABC):
    """One projection [rows, inputs] as a file has it."""

    def __init__(self, name: str, rows: int, inputs: int) -> None:
        self.name = name
        self.rows = rows
        self.inputs = inputs

    @abstractmethod
    def numbers(self, start: int, stop: int) -> Numbers:
        """Rows `start` to `stop`, both multiples of 8; columns in groups (`permutation`)."""

    def permutation(self) -> Tensor | None:
        """[inputs] int64 where column k of `numbers` belongs to input `permutation[k]`; None: to
        input k.
        """
        return None

    def input_scale(self) -> Tensor | None:
        """[1] float32: the scale of the activations, where the file has one."""
        return None

    def pieces(self) -> Iterator[Numbers]:
        """All rows, some at a time: a multiple of 16, but for the last."""
        step = max(16, PIECE // self.inputs // 16 * 16)
        for start in range(0, self.rows, step):
            yield self.numbers(start, min(start + step, self.rows))


@dataclass(frozen=True)
class Format(ABC):
    """What a checkpoint's config says of a projection. Two projections with equal formats can be
    one matrix.
    """

    first: ClassVar[str]  # the tensor that only a projection of this format has

    @property
    @abstractmethod
    def weight_dtype(self) -> torch.dtype:
        """As `Numbers.values` has it."""

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The type to which activations are rounded before the product; None: not at all."""
        return None

    @property
    def row_dtype(self) -> torch.dtype | None:
        """`input_dtype` where each row of activations gets its own scale."""
        return self.input_dtype

    def group_of(self, inputs: int) -> int:
        """How many consecutive inputs of a row have one scale."""
        return inputs

    @abstractmethod
    def stored(self, name: str, rows: int, inputs: int, dtype: torch.dtype, shape_of: ShapeOf) -> Stored:
        """The layer of one projection; dtype: of plain weights."""

    @abstractmethod
    def __str__(self) -> str:
        """For people: `GPTQ, 4 bits, groups of 128`."""


@dataclass(frozen=True)
class GroupedFormat(Format):
    """Numbers of 4 or 8 bits in words of 32; so many consecutive inputs of a row have one scale."""

    bits: int
    group: int  # -1: whole rows

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits == 4 else torch.int8

    def group_of(self, inputs: int) -> int:
        return inputs if self.group == -1 else self.group

    @property
    def scales_are_of(self) -> str:
        """How a person says it."""
        return "a scale a row" if self.group == -1 else f"groups of {self.group}"


class GroupedStored(Stored):
    """A projection in such a format."""

    order: Tensor | None = None  # what sorts inputs by their groups, where they are not sorted

    def __init__(self, name: str, rows: int, inputs: int, form: GroupedFormat) -> None:
        super().__init__(name, rows, inputs)
        self.form = form
        self.groups = -(-inputs // form.group_of(inputs))

    def index_part(self, name: str) -> WeightPart:
        """The attribute `name`, [inputs] int32: the group of each input."""
        return WeightPart(
            f"{self.name}.{name}",
            self,
            name,
            (self.inputs,),
            init=dummy_index(self.groups),
            kinds=(torch.int32, torch.int64),
            refuse=lambda index: index_problem(index, self.groups),
        )

    def problems(self) -> Iterable[str]:
        size = self.form.group_of(self.inputs)
        if self.inputs % size:
            yield f"{self.name}.{self.form.first}: {self.inputs} inputs are not a multiple of the group size {size}"

    def permutation(self) -> Tensor | None:
        return self.order


def index_problem(index: Tensor, groups: int) -> str | None:
    """Why `index` [inputs] does not name each group as often as it has inputs."""
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        return f"names groups {low} to {high}, but there are {groups}"
    counts = torch.bincount(index.long(), minlength=groups)
    if bool((counts != counts[0]).any()):
        return f"cuts {len(index)} inputs into groups of {int(counts.min())} to {int(counts.max())}"
    return None


def order_of(index: Tensor) -> Tensor | None:
    """What sorts inputs by their groups: [inputs] int64; None where they are sorted."""
    return torch.argsort(index, stable=True) if bool((index[1:] < index[:-1]).any()) else None


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [.., W] -> uint8 [.., W * 32 / bits], the lowest bits of a word first. bits: 4 or 8."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def from_unsigned(values: Tensor, zeros: Tensor | None, bits: int) -> tuple[Tensor, Tensor | None]:
    """Unsigned numbers and their zeros (any integers; None: the middle) as `Numbers` has them: 8
    bits are signed there, and zeros that are all in the middle are left out.
    """
    middle = 1 << bits - 1
    if zeros is not None:
        zeros = None if bool((zeros == middle).all()) else zeros.to(torch.int16)
    if bits == 4:
        return values, zeros
    return (values ^ 128).view(torch.int8), None if zeros is None else zeros - 128


# ---- for dummy weights ---------------------------------------------------------------------------


def random_words(tensor: Tensor, generator: torch.Generator) -> None:
    """Any bits."""
    tensor.view(torch.uint8).random_(generator=generator)


def dummy_index(groups: int) -> Callable[[Tensor, torch.Generator], None]:
    """Inputs in the order of their groups."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.arange(len(tensor), device=tensor.device) // -(-len(tensor) // groups))

    return fill


def small_scales(inputs: int, bits: int) -> Callable[[Tensor, torch.Generator], None]:
    """Scales of random numbers of so many bits that give a matrix variance 1 / inputs."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(12**0.5 / (1 << bits) * inputs**-0.5)

    return fill
