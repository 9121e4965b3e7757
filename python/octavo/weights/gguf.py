"""The tensors of GGUF files, dequantised in torch from a memory map.

The header is read and checked by the Rust core (`_core.GgufFile`), so offsets and lengths can be
trusted here. Block layouts are those of ggml's `ggml-quants`; the names and the permutation of q
and k those of llama.cpp's converter.
"""

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.model_config import ModelConfig, ModelError
from octavo.models.registry import GGUF_FAMILIES
from octavo.weights.names import hugging_face_name

CHUNK_ELEMENTS = 1 << 18  # dequantised at once: 1 MB in float32, inside the caches; with 1 << 22 it takes 6x as long


class GgufHeader(Protocol):
    """What is used of `_core.GgufFile`."""

    @property
    def path(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    def metadata(self) -> dict[str, Any]: ...
    def tensors(self) -> list[tuple[str, str, list[int], int, int]]: ...


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
            with open(part.path, "rb") as file:
                # A private map: torch wants writable memory, and pages are still read only when
                # touched.
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            for stored, kind, shape, offset, length in part.tensors():
                if kind not in _BLOCKS:
                    raise ModelError(f"{part.path}: {stored}: type {kind} is not one of {', '.join(_BLOCKS)}")
                name = hugging_face_name(stored, family.gguf_blocks)
                if name in self._tensors:
                    raise ModelError(f"{part.path}: {stored}: also in another part")
                self._tensors[name] = _Stored(kind, tuple(shape), offset, length, memory)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self._tensors.items()}

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.float32  # that `fill` makes of every block

    def fill(self, name: str, destination: Tensor) -> None:
        stored = self._tensors[name]
        kind, shape = stored.kind, stored.shape
        raw = torch.frombuffer(stored.memory, dtype=torch.uint8, count=stored.length, offset=stored.offset)
        raw = raw.view(shape[0], -1)
        heads = self._heads.get(name.split(".")[-2]) if "." in name else None
        if heads:
            raw = undo_permutation(raw, heads)
        columns = shape[1] if len(shape) > 1 else 1
        rows = max(1, CHUNK_ELEMENTS // columns)
        for start, part in _chunks(raw, rows):
            values = dequantise(part.reshape(-1), kind)
            destination[start : start + part.shape[0]].copy_(values.view(part.shape[0], *shape[1:]))


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: its blocks' type, its shape, its bytes in the map of its file."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    length: int
    memory: mmap.mmap


def _chunks(raw: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, raw.shape[0], rows):
        yield start, raw[start : start + rows]


def undo_permutation(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's `llama` files interleave the two rotary halves of each head; puts the rows back.
    rows [out, any].
    """
    half = rows.shape[0] // heads // 2
    return rows.view(heads, half, 2, -1).transpose(1, 2).reshape(rows.shape)


def dequantise(raw: Tensor, kind: str) -> Tensor:
    """raw [bytes] uint8 -> [elements] float32, by the block layout of `kind`.

    One row or many: blocks do not cross rows.
    """
    block_bytes, decode = _BLOCKS[kind]
    return decode(raw.view(-1, block_bytes)).reshape(-1)


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda raw: raw.reshape(-1).view(dtype).float()


def _half(raw: Tensor, start: int) -> Tensor:
    return raw[:, start : start + 2].contiguous().view(torch.float16).float()  # [blocks, 1]


def _nibbles(raw: Tensor, start: int) -> Tensor:
    """16 bytes hold elements 0-15 in their low and 16-31 in their high halves."""
    packed = raw[:, start : start + 16]
    return torch.cat((packed & 15, packed >> 4), dim=1).float()  # [blocks, 32]


def _q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:].view(torch.int8).float().mul_(_half(raw, 0))


def _q4_0(raw: Tensor) -> Tensor:
    return _nibbles(raw, 2).sub_(8.0).mul_(_half(raw, 0))


def _q4_1(raw: Tensor) -> Tensor:
    return _nibbles(raw, 4).mul_(_half(raw, 0)).add_(_half(raw, 2))


_BLOCKS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "F32": (4, _plain(torch.float32)),
    "F16": (2, _plain(torch.float16)),
    "BF16": (2, _plain(torch.bfloat16)),
    "Q8_0": (34, _q8_0),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
}
