"""One decoder layer in memory by itself, and the calibration's text on its way through.

The layer is the product's own (`models/`); only its matrices are others: plain ones in float32 that
tell who watches what comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.layers.embedding import Embedding
from octavo.layers.schemes.choice import Schemes
from octavo.layers.schemes.dense import PlainScheme
from octavo.layers.schemes.formats.stored import Format
from octavo.layers.schemes.scheme import Matrix
from octavo.layers.weight import Layer, allocate
from octavo.model_config import ModelConfig
from octavo.models.alone import run_alone
from octavo.models.decoder import DecoderLayer
from octavo.models.registry import MODELS

BATCH_TOKENS = 4096  # that go through a layer at a time


class WatchedScheme(PlainScheme):
    """A plain matrix in float32."""

    watch: Callable[[Tensor], None] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(x)
        return F.linear(x.float(), self.weight, self.bias).to(x.dtype)


class WatchedSchemes(Schemes):
    """Gives every matrix of a layer such a scheme."""

    def linear(self, matrix: Matrix) -> WatchedScheme:
        return WatchedScheme(matrix, torch.float32)


class Moments:
    """What is kept of the inputs of a matrix with K inputs."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.products = torch.zeros(inputs, inputs, device=device)  # X X^T
        self.magnitude = torch.zeros(inputs, device=device)  # the sum of |x|

    def add(self, x: Tensor) -> None:
        """x [num_tokens, K]."""
        x = x.float()
        self.products.addmm_(x.t(), x)
        self.magnitude.add_(x.abs().sum(0))


def make_layer(config: ModelConfig, number: int, schemes: WatchedSchemes) -> DecoderLayer:
    """Decoder layer `number`, its tensors on the `meta` device."""
    family = MODELS[config.architecture]
    return family.decoder_layer(f"model.layers.{number}", config, number, kv_group=0, schemes=schemes)


def matrices(layer: DecoderLayer) -> list[WatchedScheme]:
    """The layer's matrices, in the order in which they multiply."""
    return [part for part in layer.layers() if isinstance(part, WatchedScheme)]


def fill(
    layer: Layer, tensors: Mapping[str, Tensor], format_of: Callable[[str], Format | None], device: torch.device
) -> None:
    """Takes memory for a layer and fills it. tensors: by our names, norms as files have them; where
    a projection's weight is not among them, its tensors in the format `format_of` says.
    """
    for one in layer.layers():
        for part in allocate(one, device):
            destination = part.destination()
            if part.name in tensors:
                destination.copy_(tensors[part.name])
                if part.add_one:
                    destination.add_(1.0)
                continue
            name = part.name.removesuffix(".weight")
            form = format_of(name)
            assert form is not None, part.name
            dequantise(name, form, tensors, destination)
        one.finish()


def dequantise(name: str, form: Format, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
    """Fills weight [rows, inputs] with what a projection's tensors mean."""
    rows, inputs = weight.shape

    def shape_of(tensor: str) -> tuple[int, ...] | None:
        return tuple(tensors[tensor].shape) if tensor in tensors else None

    stored = form.stored(name, rows, inputs, torch.float32, shape_of)
    for part in allocate(stored, weight.device):
        part.destination().copy_(tensors[part.name])
    stored.finish()
    order = stored.permutation()
    row = 0
    for numbers in stored.pieces():
        values = numbers.dequantise()
        weight[row : row + len(values), slice(None) if order is None else order] = values
        row += len(values)


class _Seen(Exception):
    """What was watched has been called: the rest of the layer need not run."""


class Activations:
    """The hidden states of the calibration's sequences before a layer."""

    def __init__(self, ids: Tensor, embedding: Embedding) -> None:
        """ids [sequences, length]."""
        self.hidden = torch.stack([embedding(row) for row in ids])  # [sequences, length, hidden_size]
        sequences, length, _ = self.hidden.shape
        self.batch = min(sequences, max(1, BATCH_TOKENS // length))

    @torch.inference_mode()
    def advance(self, layer: DecoderLayer) -> None:
        """Through a layer."""
        for start in range(0, len(self.hidden), self.batch):
            hidden = self.hidden[start : start + self.batch]
            hidden.add_(run_alone(layer, hidden))

    def look(self, layer: DecoderLayer, watched: Sequence[WatchedScheme]) -> list[Moments]:
        """The inputs of some matrices of a layer, as it is; the last one is not computed."""
        moments = [Moments(scheme.matrix.in_features, self.hidden.device) for scheme in watched]
        for scheme, of_one in zip(watched, moments, strict=True):
            scheme.watch = of_one.add

        def end(x: Tensor) -> None:
            moments[-1].add(x)
            raise _Seen

        watched[-1].watch = end
        for start in range(0, len(self.hidden), self.batch):
            try:
                run_alone(layer, self.hidden[start : start + self.batch].clone())
            except _Seen:
                continue
        for scheme in watched:
            scheme.watch = None
        return moments
