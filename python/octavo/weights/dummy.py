"""Seeded random weights of the size a trained model has, made on the device: benchmarks and tests
without files.
"""

import torch

from octavo.layers.weight import allocate
from octavo.models.registry import Model


def fill_with_random(model: Model, device: torch.device, seed: int) -> None:
    """Matrices get variance 1 / (input features), so that activations keep their scale; norms 1;
    biases 0.

    Layer by layer, as from files.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    for layer in model.layers():
        for part in allocate(layer, device):
            part.init(part.destination(), generator)
        layer.finish()
