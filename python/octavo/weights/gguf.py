"""The tensors of GGUF files, in their blocks or as numbers.

The file is mapped, read and checked by the Rust core (`_core.GgufFile`), which also knows the
blocks (`rust/cpu/blocks.rs`). The names and the permutation of q and k are those of llama.cpp's
converter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from octavo.model_config import ModelConfig, ModelError
from octavo.models.registry import GGUF_FAMILIES
from octavo.weights.names import hugging_face_name

if TYPE_CHECKING:
    from octavo import _core

CHUNK_ELEMENTS = 1 << 18  # made of blocks at once: 1 MB in float32, inside the caches


class GgufHeader(Protocol):
    """What is used of `_core.GgufFile`."""

    @property
    def path(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    def metadata(self) -> dict[str, Any]: ...
    def tensors(self) -> list[tuple[str, str, list[int], int, int]]: ...
    def check_types(self) -> None: ...
    def matrix(self, name: str) -> _core.BlockMatrix: ...


class GgufSource:
    """The tensors of one file, or of all parts of a split one, under Hugging Face's names."""

    norms_include_one = True  # llama.cpp's converter adds it

    def __init__(
        self, header: GgufHeader, config: ModelConfig | None = None, other_parts: Sequence[GgufHeader] = ()
    ) -> None:
        """config: needed to undo the permutation of q and k, which depends on the number of heads."""
        self.name = header.path
        self._tensors: dict[str, _Stored] = {}
        self._heads = {}
        family = GGUF_FAMILIES[header.architecture]
        if config is not None and family.gguf_interleaves_heads:
            self._heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
        for part in (header, *other_parts):
            _check_types(part)
            for stored, _, shape, _, _ in part.tensors():
                name = hugging_face_name(stored, family.gguf_blocks)
                if name in self._tensors:
                    raise ModelError(f"{part.path}: {stored}: also in another part")
                self._tensors[name] = _Stored(part, stored, tuple(shape))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self._tensors.items()}

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.float32  # that `fill` makes of every block

    def blocks(self, name: str) -> _core.BlockMatrix:
        """One tensor where it lies in the file: its first dimension by all others."""
        stored = self._tensors[name]
        blocks = stored.part.matrix(stored.name)
        heads = self._heads.get(name.split(".")[-2]) if "." in name else None
        # llama.cpp's `llama` files interleave the two rotary halves of each head.
        return blocks.with_heads_apart(heads) if heads else blocks

    def fill(self, name: str, destination: Tensor) -> None:
        blocks = self.blocks(name)
        rows, columns = blocks.shape
        flat = destination.view(rows, columns)
        if flat.dtype == torch.float32 and flat.is_contiguous() and flat.is_cpu:
            blocks.read(0, flat)
            return
        at_once = max(1, CHUNK_ELEMENTS // columns)
        values = torch.empty(min(at_once, rows), columns)
        for start in range(0, rows, at_once):
            part = flat[start : start + at_once]
            blocks.read(start, values[: len(part)])
            part.copy_(values[: len(part)])


def _check_types(part: GgufHeader) -> None:
    from octavo import _core

    try:
        part.check_types()
    except _core.GgufError as error:
        raise ModelError(str(error)) from None


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is: the file, its name there, its shape."""

    part: GgufHeader
    name: str
    shape: tuple[int, ...]
