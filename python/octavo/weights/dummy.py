"""Seeded random weights of the size a trained model has, made on the device: benchmarks and tests without files."""

import torch

from octavo.layers.weight import allocate
from octavo.models.registry import Model


def fill_with_random(model: Model, device: torch.device, seed: int) -> None:
    """Matrices get variance 1 / (input features), so that activations keep their scale; norms 1; biases 0."""
    slots = model.slots()
    allocate(slots, device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for slot in slots:
        destination = slot.destination()
        if slot.init == "normal":
            destination.normal_(0.0, slot.shape[-1] ** -0.5, generator=generator)
        else:
            destination.fill_(1.0 if slot.init == "ones" or slot.add_one else 0.0)
    for layer in model.layers():
        layer.finish()
