"""The folder that is written: a file for each layer, whole once it is there, and what remembers how
they were made until all are.

The config and the index come last, so that nothing loads a folder that is not complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from octavo.model_config import read_json
from octavo.weights.safetensors import INDEX, SINGLE

STATE = "octavo_quantize.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Output:
    """A folder of `count` files of weights, of which some may have been finished before."""

    def __init__(self, folder: Path, state: Mapping[str, Any], count: int) -> None:
        """state: what decides every number, compared with what an earlier run has left.

        Raises `ValueError` for a folder that holds anything else.
        """
        self.folder = folder
        self.state = {**state, "files": count}
        self.count = count
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output {folder}: is a file")
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not (folder / STATE).exists():
            raise ValueError(f"--output {folder}: exists and holds files; give a folder that is new or empty")
        before = read_json(folder / STATE)
        other = [key for key, value in self.state.items() if before.get(key) != json.loads(json.dumps(value))]
        if other:
            shown = ", ".join(f"{key} {before.get(key)!r} and not {self.state[key]!r}" for key in other)
            raise ValueError(
                f"--output {folder}: an unfinished run with other options is there: {shown[:600]}; repeat those, or "
                "give another folder"
            )

    def path(self, number: int) -> Path:
        """Of file `number`, from 0."""
        name = f"model-{number + 1:05}-of-{self.count:05}.safetensors" if self.count > 1 else SINGLE
        return self.folder / name

    def has(self, number: int) -> bool:
        """Whether an earlier run has finished it."""
        return self.path(number).exists()

    def begin(self) -> None:
        """Makes the folder. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_text(STATE, json.dumps(self.state, indent=2) + "\n")

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Raises OSError."""

        def save(path: Path) -> None:
            save_file(dict(tensors), path, metadata={"format": "pt"})
            path.chmod((self.folder / STATE).stat().st_mode)  # the library keeps files to their owner

        self._whole(self.path(number), save)

    def finish(self, config: Mapping[str, Any], write_texts: Callable[[Path], None]) -> None:
        """Writes what makes a model of the files. Raises OSError."""
        files: dict[str, str] = {}
        total = 0
        for number in range(self.count):
            path = self.path(number)
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    files[name] = path.name
                    total += file.get_tensor(name).nbytes  # of the memory map; nothing is read
        write_texts(self.folder)
        if self.count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
            self._write_text(INDEX, json.dumps(index, indent=2) + "\n")
        self._write_text("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        (self.folder / STATE).unlink()

    def _write_text(self, name: str, text: str) -> None:
        self._whole(self.folder / name, lambda path: path.write_text(text, encoding="utf-8"))

    def _whole(self, path: Path, write: Callable[[Path], object]) -> None:
        """All of a file, or nothing under its name."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except SafetensorError as error:
            raise OSError(_number_of(error), str(error), str(path)) from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def is_full(error: OSError) -> bool:
    """Whether there was no room."""
    return error.errno in _FULL


def free_bytes(folder: Path) -> int:
    """Of the disk on which `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _number_of(error: SafetensorError) -> int:
    """The library tells the system's error in words."""
    text = str(error)
    return next((number for number in _FULL if os.strerror(number) in text), errno.EIO)
