"""A GGUF file that was cut into parts, as `llama-gguf-split` does: NAME-00001-of-00003.gguf and so on.

The first part has the metadata; a user names that one.
"""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.model_config import ModelError
from octavo.weights.text import open_gguf

if TYPE_CHECKING:
    from octavo import _core

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def open_other_parts(path: Path, first: "_core.GgufFile") -> "list[_core.GgufFile]":
    """The parts that follow `first`, which is the file at `path`; none of a file that is whole.

    Raises `ModelError` that names `split.count`, or the part that is missing or of another file.
    """
    metadata = first.metadata()
    count = metadata.get("split.count", 1)
    if count in (0, 1):
        return []
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise ModelError(
            f"{path}: split.count: {count} parts, but the name does not end in -00001-of-{count:05}.gguf, by which the "
            "others are found"
        )
    if metadata.get("split.no", 0) != 0:
        raise ModelError(
            f"{path}: split.no: part {metadata['split.no'] + 1} of split.count {count}; give the first, "
            f"{match[1]}-00001-of-{match[3]}.gguf"
        )
    parts = [
        _open(path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf"), path, number, count)
        for number in range(2, count + 1)
    ]
    tensors = sum(len(part.tensors()) for part in (first, *parts))
    if metadata.get("split.tensors.count", tensors) != tensors:
        raise ModelError(
            f"{path}: split.tensors.count: {metadata['split.tensors.count']}, but the {count} parts hold {tensors}"
        )
    logger.info("%s: read with its other parts, split.count is %d", path, count)
    return parts


def _open(path: Path, first: Path, number: int, count: int) -> "_core.GgufFile":
    if not path.is_file():
        raise ModelError(f"{first}: split.count: {count} parts, but {path.name} is missing or no regular file")
    part = open_gguf(path)
    metadata: dict[str, Any] = part.metadata()
    if (metadata.get("split.no"), metadata.get("split.count")) != (number - 1, count):
        raise ModelError(f"{path}: split.no and split.count: not part {number} of {count}")
    return part
