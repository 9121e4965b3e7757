"""The checkpoint that is quantised: a folder, or a GGUF file expanded to 16 bits."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.model_config import ModelConfig, ModelError, read_json
from octavo.models.registry import config_from_folder
from octavo.weights.gguf import GgufSource
from octavo.weights.gguf_config import config_from_gguf, values_from_gguf
from octavo.weights.gguf_split import open_other_parts
from octavo.weights.gguf_text import write_gguf_text
from octavo.weights.load import resolve
from octavo.weights.quantization.config import read_recipe
from octavo.weights.safetensors import INDEX, SafetensorsSource
from octavo.weights.source import Source
from octavo.weights.text import open_gguf
from octavo.weights.tied import settle_head

TEXTS = (".json", ".jinja", ".model", ".txt", ".md", ".tiktoken")
"""Endings of files that are carried along, beside the weights; LICENSE and NOTICE are too."""


class Original(Protocol):
    """Where weights come from, under the names that they keep."""

    name: str  # for people
    place: Path
    reading: int  # bytes that reading takes beside the tensors that are read
    config: ModelConfig
    values: dict[str, Any]  # config.json

    @property
    def source(self) -> Source:
        """The tensors of the text model, under our names."""

    def names(self) -> Mapping[str, str | None]:
        """Every tensor's name -> ours; None for what is no part of the text model."""

    def nbytes(self, name: str) -> int:
        """Of a tensor, as `read` gives it."""

    def read(self, name: str) -> Tensor:
        """A tensor as it is to be written, norms as Hugging Face keeps them."""

    def fingerprint(self) -> list[Any]:
        """Tells it from another, or from itself after a change."""

    def write_texts(self, folder: Path) -> None:
        """Tokenizer, template and the like."""


def open_original(model: str) -> Original:
    """A folder, a `.gguf` file, a hub id or the default model. Raises `ModelError`."""
    place = resolve(model, "auto")
    assert place is not None
    return GgufOriginal(place) if place.suffix == ".gguf" else FolderOriginal(place)


class FolderOriginal:
    """Safetensors."""

    def __init__(self, folder: Path) -> None:
        recipe = read_recipe(folder)
        if recipe is not None:
            raise ModelError(
                f"{folder}: its weights are quantised already, by {recipe.method}; give the model that it was made of"
            )
        self.name = str(folder)
        self.place = folder
        self.reading = 0
        self.source = SafetensorsSource(folder)
        self.config = settle_head(config_from_folder(folder), self.source)
        self.values = read_json(folder / "config.json")

    def names(self) -> Mapping[str, str | None]:
        return self.source.stored_names()

    def nbytes(self, name: str) -> int:
        return self.source.read(name).nbytes  # of a memory map: nothing of it is read

    def read(self, name: str) -> Tensor:
        return self.source.read(name)

    def fingerprint(self) -> list[Any]:
        paths = sorted(self.place.glob("*.safetensors"))
        return [str(self.place.resolve()), *([path.name, *_state(path)] for path in paths)]

    def write_texts(self, folder: Path) -> None:
        for path in sorted(self.place.iterdir()):
            wanted = path.suffix in TEXTS or path.name.startswith(("LICENSE", "NOTICE"))
            if wanted and path.is_file() and path.name not in ("config.json", INDEX):
                shutil.copyfile(path, folder / path.name)
        templates = self.place / "additional_chat_templates"
        if templates.is_dir():
            (folder / templates.name).mkdir(exist_ok=True)
            for path in templates.glob("*.jinja"):
                shutil.copyfile(path, folder / templates.name / path.name)


class GgufOriginal:
    """A GGUF file, whose blocks are expanded: to the type of its plain weights, or to bfloat16."""

    def __init__(self, path: Path) -> None:
        header = open_gguf(path)
        parts = open_other_parts(path, header)
        self.name = str(path)
        self.config = config_from_gguf(header, parts)
        dtype = self.config.checkpoint_dtype or "bfloat16"
        self.values = {**values_from_gguf(header, parts), "dtype": dtype}
        self.place = path
        self._dtype = getattr(torch, dtype)
        self.source = GgufSource(header, self.config, parts)
        # What of a mapped file is read stays, and a tensor is expanded to float32 on its way.
        mapped = sum(Path(part.path).stat().st_size for part in (header, *parts))
        self.reading = mapped + 4 * max(math.prod(shape) for shape in self.source.shapes().values())

    def names(self) -> Mapping[str, str | None]:
        return {name: name for name in self.source.shapes()}

    def nbytes(self, name: str) -> int:
        return math.prod(self.source.shapes()[name]) * int(self._dtype.itemsize)

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self.source.shapes()[name])
        self.source.fill(name, tensor)
        if self.config.norm_add_one and name.endswith("norm.weight"):
            tensor.sub_(1.0)
        return tensor.to(self._dtype)

    def fingerprint(self) -> list[Any]:
        return [str(self.place.resolve()), *_state(self.place)]

    def write_texts(self, folder: Path) -> None:
        write_gguf_text(self.place, folder)
        ends = list(self.config.eos_token_ids)
        values = {"bos_token_id": self.config.bos_token_id, "eos_token_id": ends}
        (folder / "generation_config.json").write_text(json.dumps(values, indent=2) + "\n")


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
