"""Twins of `fused_gemv.py`, composed of the ops that it fuses."""

import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.reference.layers import rms_norm, silu_and_mul


def norm_linear(x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm(x) @ weight.T` [M, N] of x [M, K], norm [K], weight [N, K]."""
    return F.linear(rms_norm(x, norm, eps), weight)


def norm_linear_silu(x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`silu(gate) * up` [M, I] with (gate | up) = `rms_norm(x) @ weight.T`, of x [M, K], norm [K],
    weight [2 * I, K].
    """
    return silu_and_mul(F.linear(rms_norm(x, norm, eps), weight))


def linear_silu(x: Tensor, weight: Tensor) -> Tensor:
    """`silu(gate) * up` [M, I] with (gate | up) = `x @ weight.T`, of x [M, K], weight [2 * I, K]."""
    return silu_and_mul(F.linear(x, weight))


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    """`residual += x @ weight.T` in place, of x [M, K], weight [N, K], residual [M, N]."""
    residual.add_(F.linear(x, weight))
