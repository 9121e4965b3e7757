"""Hugging Face folders: `model.safetensors`, or shards named by `model.safetensors.index.json`.

The index is not trusted: a shard's name must be a plain file name, and the file it leads to must
lie in the folder (or in the hub cache's `blobs`, where the cache's own links lead). Header checks
are those of the `safetensors` package (Rust).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.model_config import ModelError, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = ("F64", "F32", "F16", "BF16")


class SafetensorsSource:
    """All shards of a folder as one set of tensors. Opened lazily, one memory map a shard."""

    norms_include_one = False

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._files: dict[str, Any] = {}  # tensor -> its open shard
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, str] = {}  # our name -> the file's
        for path in find_shards(folder):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt", device="cpu")
            for stored in file.keys():  # noqa: SIM118 - not a dict
                name = text_model_name(stored)
                if name is None:
                    continue
                if name in self._files:
                    raise ModelError(f"{path}: {stored}: also in another shard")
                part = file.get_slice(stored)
                if part.get_dtype() not in _DTYPES:
                    raise ModelError(f"{path}: {stored}: type {part.get_dtype()} is not one of {', '.join(_DTYPES)}")
                self._files[name], self._stored[name] = file, stored
                self._shapes[name] = tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: not a whole safetensors file: {error}") from None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def fill(self, name: str, destination: Tensor) -> None:
        destination.copy_(self._files[name].get_tensor(self._stored[name]))

    def dtype(self) -> str | None:
        """The type of the first matrix, for files whose config does not say."""
        kinds = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        for name, shape in self._shapes.items():
            if len(shape) == 2:
                return kinds.get(self._files[name].get_slice(self._stored[name]).get_dtype())
        return None


def text_model_name(stored: str) -> str | None:
    """Name of a tensor in the text model; None for the vision part of a checkpoint that has both
    (Gemma 3).
    """
    if stored.startswith(
        ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
    ):
        return None
    for prefix, replacement in (("language_model.", ""), ("model.language_model.", "model.")):
        if stored.startswith(prefix):
            return replacement + stored[len(prefix) :]
    return stored


def shard_names(index: Path) -> list[str]:
    """The files that an index names, each a plain name. Raises `ModelError`."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{index}: weight_map: is not an object of file names")
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: weight_map: {name!r} is not the plain name of a .safetensors file")
    return names


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises `ModelError` that names what is missing or unsafe."""
    index = folder / INDEX
    if index.exists():
        return [_shard(folder, name, index) for name in shard_names(index)]
    single = folder / SINGLE
    if single.exists():
        return [_shard(folder, single.name, folder)]
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
