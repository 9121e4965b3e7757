"""The table of cosines and sines for rotary position embedding (Su et al. 2021), NeoX layout.

Scalings as in transformers' `modeling_rope_utils.py`: linear (positions divided by a factor) and
Llama 3 (low frequencies divided, high ones kept, a smooth ramp between). The rotation itself is
fused with the KV write in `kernels/`.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from octavo.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[head_dim / 2] float32."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "factors":
        return frequencies / torch.tensor(rope.factors, dtype=torch.float32)
    if rope.scaling == "llama3":
        wavelengths = 2 * math.pi / frequencies
        ramp = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        ramp = ramp.clamp(0.0, 1.0)  # 0: long waves, divided by the factor; 1: short waves, kept
        return (1 - ramp) * frequencies / rope.factor + ramp * frequencies
    return frequencies


@lru_cache(maxsize=4)  # layers with the same settings share one table
def cos_sin_table(rope: RopeConfig, head_dim: int, max_position: int, device: torch.device) -> Tensor:
    """[max_position, head_dim] float32: cosines in the first half of a row, sines in the second."""
    frequencies = inverse_frequencies(rope, head_dim).to(device)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32, device=device), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
