"""The table of cosines and sines for rotary position embedding (Su et al. 2021), NeoX layout.

Scalings as in transformers' `modeling_rope_utils.py`: linear (positions divided by a factor), Llama
3 (low frequencies divided, high ones kept, a smooth ramp between), YaRN (Peng et al. 2023: a ramp
over dimensions, and longer queries and keys), LongRoPE (Ding et al. 2024: each frequency divided by
its own number) and proportional (only the first dimensions rotate). The rotation itself is fused
with the KV write in `kernels/`.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from octavo.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_position: int) -> Tensor:
    """[head_dim / 2] float32, for sequences of up to `max_position` tokens.

    A sequence's frequencies may not change while it grows, as its keys are cached; so those of
    LongRoPE go by the longest sequence that is served.
    """
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    factors = rope.long_factors if uses_long_factors(rope, max_position) else rope.factors
    if factors:
        frequencies = frequencies / torch.tensor(factors, dtype=torch.float32)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        wavelengths = 2 * math.pi / frequencies
        ramp = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        ramp = ramp.clamp(0.0, 1.0)  # 0: long waves, divided by the factor; 1: short waves, kept
        return (1 - ramp) * frequencies / rope.factor + ramp * frequencies
    if rope.scaling == "yarn":
        ramp = _yarn_ramp(rope, head_dim)  # 0: kept; 1: divided by the factor
        return frequencies / rope.factor * ramp + frequencies * (1 - ramp)
    if rope.scaling == "proportional":
        rotated = int(rope.rotated_part * head_dim // 2)
        frequencies[rotated:] = 0.0
        return frequencies / rope.factor
    return frequencies


def uses_long_factors(rope: RopeConfig, max_position: int) -> bool:
    """Whether LongRoPE takes the factors of long sequences."""
    return bool(rope.long_factors) and max_position > rope.original_max_position


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> Tensor:
    """[head_dim / 2] float32, from 0 to 1."""

    def dimension(rotations: float) -> float:
        """The dimension that turns so often within the original length."""
        wavelength = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)


@lru_cache(maxsize=4)  # layers with the same settings share one table
def cos_sin_table(rope: RopeConfig, head_dim: int, max_position: int, device: torch.device) -> Tensor:
    """[max_position, head_dim] float32: cosines in the first half of a row, sines in the second."""
    frequencies = inverse_frequencies(rope, head_dim, max_position).to(device)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32, device=device), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(rope.attention_factor)
