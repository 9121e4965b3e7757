"""The plain-PyTorch twin of the int4 linear layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.linear.int4_layout import Int4Weight, unpack


def dequantise(weight: Int4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [N, K], columns in the order of the activations: (number - zero) * scale, rounded
    to `dtype` (None: the scales').
    """
    numbers, scales, zeros = unpack(weight)
    scales = scales.to(dtype or scales.dtype)
    shape = (*scales.shape, weight.group)
    values = (numbers.reshape(shape) - zeros[..., None]).to(scales.dtype) * scales[..., None]
    values = values.reshape(weight.rows, weight.depth)
    if weight.permutation is None:
        return values
    out = torch.empty_like(values)
    out[:, weight.permutation] = values
    return out


def int4_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] @ weight [N, K] transposed + bias [N]; returns [M, N] of x's dtype. Any float dtype
    of x will do.
    """
    return F.linear(x, dequantise(weight, x.dtype), None if bias is None else bias.to(x.dtype))
