"""Filling a model from a checkpoint: everything is compared first, memory is taken afterwards,
layer by layer.

Knows no file format; `safetensors.py`, `gguf.py` and `dummy.py` do.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from octavo.layers.weight import Layer, WeightPart, allocate
from octavo.model_config import ModelError
from octavo.models.registry import Model
from octavo.weights.finite import FiniteCheck

if TYPE_CHECKING:
    from octavo._core import BlockMatrix

KV_SCALES = (".k_scale", ".v_scale", ".kv_scale", ".k_proj.output_scale", ".v_proj.output_scale")
ZERO_IN_VAIN = (".bias", ".weight_zero_point", ".input_zero_point")
"""What AutoGPTQ and early compressed-tensors wrote whether there was any or not."""


class Source(Protocol):
    """A checkpoint whose tensors go by Hugging Face's names."""

    name: str  # the file or folder, for errors
    norms_include_one: bool  # whether norm weights already hold 1 + w (`WeightPart.add_one`)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor that a model may want, with its shape; reads headers only."""

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a tensor's numbers, in the file or as `fill` decodes them."""

    def fill(self, name: str, destination: Tensor) -> None:
        """Writes one tensor into `destination`, converting to its dtype and device."""

    def blocks(self, name: str) -> "BlockMatrix":
        """One tensor in the file's own blocks. Only asked of files that have blocks."""


def fill_model(
    model: Model, source: Source, device: torch.device, finished: Callable[[Layer], None] | None = None
) -> None:
    """Compares names and shapes of all tensors, then allocates, reads and finishes one layer after
    another. finished: is called with each, before the next one is allocated.

    Raises `ModelError` listing all that differs, or all that hold numbers nobody can compute with.
    """
    check(model, source)
    progress = tqdm(
        total=len(model.parts()), desc="Loading weights", unit=" tensors", disable=not sys.stderr.isatty(), leave=False
    )
    with progress, FiniteCheck() as finite:
        for layer in model.layers():
            parts = allocate(layer, device)
            with _one_thread():
                for part in parts:
                    if part.hold is not None:
                        blocks = source.blocks(part.name)
                        finite.look_at_blocks(part.name, blocks)
                        part.hold(blocks)
                        continue
                    _fill(part, source)
                    finite.look(part.name, part.destination())
            layer.finish()
            if finished is not None:
                finished(layer)
            progress.update(len(parts))
        broken = finite.broken()
    if broken:
        raise ModelError(
            f"{source.name}: NaN or infinite numbers in {len(broken)} tensors, as held in memory: {', '.join(broken)}"
        )


def _fill(part: WeightPart, source: Source) -> None:
    destination = part.destination()
    source.fill(part.name, destination)
    if part.add_one and not source.norms_include_one:
        destination.add_(1.0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small copies gain nothing from torch's thread team, and on a busy machine each waits for its
    slowest member.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check(model: Model, source: Source) -> None:
    """Raises one `ModelError` that lists every missing, superfluous, misshapen or mistyped tensor,
    and the small ones whose values cannot be.
    """
    found = dict(source.shapes())
    problems = list(_problems_of_layers(model))
    for part in model.parts():
        shape = found.pop(part.name, None)
        if shape is None:
            problems.append(f"{part.name}: missing")
        elif shape != part.shape:
            problems.append(f"{part.name}: shape {list(shape)}, but the config says {list(part.shape)}")
        elif (dtype := source.dtype_of(part.name)) not in part.kinds:
            wanted = ", ".join(map(_name, part.kinds))
            problems.append(f"{part.name}: holds {_name(dtype)} numbers, but the config says {wanted}")
        elif part.refuse is not None and (problem := part.refuse(_read(source, part.name, shape))) is not None:
            problems.append(f"{part.name}: {problem}")
    problems.extend(f"{name}: not part of the model" for name in found if not _harmless(name, model, source))
    if problems:
        raise ModelError(f"{source.name}: {len(problems)} tensors do not fit the config: {'; '.join(problems)}")


def check_layers(model: Model, name: str) -> None:
    """As `check`, for a model that gets no checkpoint's weights. name: of the model."""
    if problems := list(_problems_of_layers(model)):
        raise ModelError(f"{name}: {len(problems)} tensors cannot be held: {'; '.join(problems)}")


def _problems_of_layers(model: Model) -> Iterator[str]:
    return (problem for layer in model.layers() for problem in layer.problems())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(source: Source, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=source.dtype_of(name))
    source.fill(name, tensor)
    return tensor


def _harmless(name: str, model: Model, source: Source) -> bool:
    """Tensors that files carry and nobody needs: a tied head's copy, rotary tables of old
    checkpoints, scales for caches of keys and values in 8 bits, and biases and zeros that are zero.
    """
    tied_copy = name == "lm_head.weight" and model.config.tie_word_embeddings
    read_with_the_config = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    if tied_copy or name.endswith(("rotary_emb.inv_freq", *KV_SCALES)) or name in read_with_the_config:
        return True
    return name.endswith(ZERO_IN_VAIN) and not bool(_read(source, name, source.shapes()[name]).any())
