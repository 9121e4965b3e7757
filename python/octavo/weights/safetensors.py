"""Hugging Face folders: `model.safetensors`, or shards named by `model.safetensors.index.json`.

The index is not trusted: a shard's name must be a plain file name, and the file it leads to must
lie in the folder (or in the hub cache's `blobs`, where the cache's own links lead). Header checks
are those of the `safetensors` package (Rust).
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.model_config import ModelError, read_json

if TYPE_CHECKING:
    from octavo._core import BlockMatrix

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}


class SafetensorsSource:
    """All shards of a folder as one set of tensors. Opened lazily, one memory map a shard."""

    norms_include_one = False

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._files: dict[str, Any] = {}  # tensor -> its open shard
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, str] = {}  # our name -> the file's
        self._dtypes: dict[str, torch.dtype] = {}
        self._shards: dict[str, str] = {}  # our name -> name of its shard
        self._places: dict[str, Path] = {}  # the file's name -> its shard
        self._others: dict[str, Path] = {}  # the same of tensors that the text model has not
        stale: list[str] = []
        paths, index = find_shards(folder)
        for path in paths:
            self._open(path, index, stale)
        if stale:
            logger.warning(
                "%s: %d tensors are in two files, and taken from the one that the index names: %s%s",
                folder,
                len(stale),
                ", ".join(stale[:5]),
                ", ..." if len(stale) > 5 else "",
            )

    def _open(self, path: Path, index: Mapping[str, str], stale: list[str]) -> None:
        """index: tensor -> file. stale: takes the names of tensors that an earlier file had too."""
        try:
            file: Any = safe_open(path, framework="pt", device="cpu")
            for stored in file.keys():  # noqa: SIM118 - not a dict
                name = text_model_name(stored)
                if name is None:
                    self._others[stored] = path
                    continue
                if name in self._files:
                    stale.append(name)
                    if self._belongs_to_earlier(name, stored, path, index):
                        continue
                part = file.get_slice(stored)
                if part.get_dtype() not in _DTYPES:
                    raise ModelError(f"{path}: {stored}: type {part.get_dtype()} is not one of {', '.join(_DTYPES)}")
                self._files[name], self._stored[name], self._shards[name] = file, stored, path.name
                self._places[stored] = path
                self._shapes[name] = tuple(part.get_shape())
                self._dtypes[name] = _DTYPES[part.get_dtype()]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: not a whole safetensors file: {error}") from None

    def _belongs_to_earlier(self, name: str, stored: str, path: Path, index: Mapping[str, str]) -> bool:
        """Of a tensor that an earlier file and this one have: which of the two the index names."""
        earlier, named = self._shards[name], index.get(stored)
        if earlier == path.name or named not in (earlier, path.name):
            raise ModelError(f"{path}: {stored}: also in {earlier} as {self._stored[name]}")
        return named == earlier

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype_of(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def fill(self, name: str, destination: Tensor) -> None:
        destination.copy_(self._files[name].get_tensor(self._stored[name]))

    def stored_names(self) -> dict[str, str | None]:
        """Every tensor of the files -> its name here; None for those of no text model."""
        return {stored: name for name, stored in self._stored.items()} | dict.fromkeys(self._others)

    def read(self, stored: str) -> Tensor:
        """A tensor as the file has it, by the file's name; nothing of it is read before it is used.

        The file is mapped for this tensor: what was read of it goes when the tensor does, while a
        mapping that stays would count every tensor that was ever read.
        """
        with safe_open(self._others.get(stored) or self._places[stored], framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def blocks(self, name: str) -> "BlockMatrix":
        raise NotImplementedError(f"{self.name}: {name}: no blocks in safetensors")

    def dtype(self) -> str | None:
        """The type of the first matrix that is not quantised, for files whose config does not say."""
        kinds = {torch.float64: "float32", torch.float32: "float32"}
        kinds |= {torch.float16: "float16", torch.bfloat16: "bfloat16"}
        matrices = (name for name, shape in self._shapes.items() if len(shape) == 2 and name.endswith(".weight"))
        return next((kinds[kind] for name in matrices if (kind := self._dtypes[name]) in kinds), None)

    def call(self, name: str, other: str) -> None:
        """The tensor `name` is found as `other` instead."""
        self._files[other] = self._files.pop(name)
        self._shapes[other] = self._shapes.pop(name)
        self._stored[other] = self._stored.pop(name)
        self._shards[other] = self._shards.pop(name)
        self._dtypes[other] = self._dtypes.pop(name)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors of one shape hold the same numbers."""
        first, second = (self._files[name].get_tensor(self._stored[name]) for name in (one, other))
        return first.dtype == second.dtype and torch.equal(first, second)


def text_model_name(stored: str) -> str | None:
    """Name of a tensor in the text model; None for the vision part of a checkpoint that has both
    (Gemma 3). Files that were saved without the head lack the prefix `model.`.
    """
    if stored.startswith(
        ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
    ):
        return None
    for prefix, replacement in (("language_model.", ""), ("model.language_model.", "model.")):
        if stored.startswith(prefix):
            stored = replacement + stored[len(prefix) :]
            break
    return f"model.{stored}" if stored.startswith(("embed_tokens.", "layers.", "norm.")) else stored


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index says; each file a plain name. Raises `ModelError`."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{index}: weight_map: is not an object of file names")
    for name in sorted(set(table.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: weight_map: {name!r} is not the plain name of a .safetensors file")
    return table


def shard_names(index: Path) -> list[str]:
    """The files that an index names. Raises `ModelError`."""
    return sorted(set(weight_map(index).values()))


def find_shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a folder, and which tensor the index says to be where (without an
    index nothing). `model.safetensors` goes before an index, as in transformers.

    Raises `ModelError` that names what is missing or unsafe.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.exists():
        path = _shard(folder, single.name, folder)
        if index.exists() and shard_names(index) != [SINGLE]:
            logger.warning("%s: %s is read, and not the files that %s names", folder, SINGLE, INDEX)
        return [path], {}
    if index.exists():
        return [_shard(folder, name, index) for name in shard_names(index)], weight_map(index)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise ModelError(
            f"{folder / pickled[0]}: pickled checkpoints can run code when read and are refused; convert once on a "
            "machine you trust: transformers' AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise ModelError(f"{folder}: no model.safetensors and no {INDEX}")


def _shard(folder: Path, name: str, named_by: Path) -> Path:
    path = folder / name
    if not path.is_file():
        raise ModelError(f"{path}: missing, but {named_by.name} names it")
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":  # the hub cache links from snapshots/REVISION to blobs
        roots.append(folder.resolve().parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise ModelError(f"{path}: a link that leads out of the folder")
    return path
