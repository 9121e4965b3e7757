"""Filling a model's slots from a checkpoint: everything is compared first, memory is taken afterwards.

Knows no file format; `safetensors.py`, `gguf.py` and `dummy.py` do.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from octavo.layers.weight import allocate
from octavo.model_config import ModelError
from octavo.models.registry import Model


class Source(Protocol):
    """A checkpoint whose tensors go by Hugging Face's names."""

    name: str  # the file or folder, for errors
    norms_include_one: bool  # whether Gemma's norm weights already hold 1 + w

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor that a model may want, with its shape; reads headers only."""

    def fill(self, name: str, destination: Tensor) -> None:
        """Writes one tensor into `destination`, converting to its dtype and device."""


def fill_model(model: Model, source: Source, device: torch.device) -> None:
    """Compares names and shapes, allocates on `device`, reads every tensor.

    Raises `ModelError` listing all that differs.
    """
    slots = model.slots()
    check(model, source)
    allocate(slots, device)
    with _one_thread():
        for slot in tqdm(slots, desc="Loading weights", unit=" tensors", disable=not sys.stderr.isatty(), leave=False):
            destination = slot.destination()
            source.fill(slot.name, destination)
            if slot.add_one and not source.norms_include_one:
                destination.add_(1.0)
    for layer in model.layers():
        layer.finish()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small copies gain nothing from torch's thread team, and on a busy machine each waits for its slowest member."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check(model: Model, source: Source) -> None:
    """Raises one `ModelError` that lists every missing, superfluous or misshapen tensor."""
    found = dict(source.shapes())
    problems = []
    for slot in model.slots():
        shape = found.pop(slot.name, None)
        if shape is None:
            problems.append(f"{slot.name}: missing")
        elif shape != slot.shape:
            problems.append(f"{slot.name}: shape {list(shape)}, but the config says {list(slot.shape)}")
    problems.extend(f"{name}: not part of the model" for name in found if not _harmless(name, model))
    if problems:
        raise ModelError(f"{source.name}: {len(problems)} tensors do not fit the config: {'; '.join(problems)}")


def _harmless(name: str, model: Model) -> bool:
    """Tensors that files carry and nobody needs: a tied head's copy, and rotary tables of old checkpoints."""
    tied_copy = name == "lm_head.weight" and model.config.tie_word_embeddings
    return tied_copy or name.endswith(("rotary_emb.inv_freq", "rope_freqs.weight"))
