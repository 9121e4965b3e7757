"""Norms and gates where their tensors are: the kernels on a GPU, the extension's own ops on a CPU, each
one crossing without the GIL where its twin is two to seven small torch ops. What they compute stands in
`kernels/reference/layers.py`.
"""

import torch
from torch import Tensor

from octavo import _core
from octavo.kernels import ops


def _is_rusts(x: Tensor) -> bool:
    """A CPU's hidden states are float32 whatever its weights are."""
    return x.is_cpu and x.dtype == torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [num_tokens, size] -> its norm."""
    if not _is_rusts(x):
        return ops.rms_norm(x, weight, eps)
    out = torch.empty_like(x)
    _core.rms_norm(x, weight, eps, out)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, in place -> its norm."""
    if not _is_rusts(x):
        return ops.add_rms_norm(x, residual, weight, eps)
    out = torch.empty_like(x)
    _core.add_rms_norm(x, residual, weight, eps, out)
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    """x [num_tokens, 2 * size] = (gate | up) -> [num_tokens, size]."""
    if not _is_rusts(x):
        return ops.silu_and_mul(x)
    out = torch.empty(x.shape[0], x.shape[1] // 2)
    _core.silu_and_mul(x, out)
    return out


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """The same with GELU by tanh."""
    if not _is_rusts(x):
        return ops.gelu_tanh_and_mul(x)
    out = torch.empty(x.shape[0], x.shape[1] // 2)
    _core.gelu_tanh_and_mul(x, out)
    return out
