"""AWQ: inputs that are large get finer steps, by a scale that the layer before takes back.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration":
column k of a weight is multiplied by s_k before it is rounded, and input k divided by it, which
changes no product. The scales are `magnitude ** r`, with the exponent r that loses least; then the
largest weights of a group may be cut off, where finer steps for the others are worth it.

What rounding loses is `|dW X|^2`, the error of the product over the calibration's inputs, which
their second moments X X^T give without the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.quantize.grid import Grid, Rounded

STEPS = 20
"""Exponents that are tried, from 0 (no scales: every number to the nearest) up to 1."""

CLIP_STEPS, MOST_CLIPPED = 10, 0.5
"""Shares of a group's largest magnitude that are tried, and how much of it may be cut off."""

PIECE = 1 << 22
"""Weights that are clipped at a time."""


def find_scales(weight: Tensor, moments: Tensor, magnitude: Tensor, grid: Grid) -> Tensor:
    """The scales [K] of weight [N, K] float32.

    moments [K, K] float32: X X^T of the inputs; magnitude [K] float32: that of each input, equal for
    those that must have one scale.
    """
    magnitude = magnitude.clamp(min=1e-4 * float(magnitude.max()) or 1.0)
    best, least = torch.ones_like(magnitude), torch.tensor(torch.inf, device=weight.device)
    for step in range(STEPS + 1):
        scales = magnitude ** (step / STEPS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        grouped = (weight * scales).view(len(weight), -1, grid.group)
        lost = grid.nearest(grouped).view_as(weight).div_(scales).sub_(weight)
        error = _error(lost, moments)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def clip(weight: Tensor, moments: Tensor, grid: Grid) -> Tensor:
    """weight [N, K] float32 with the largest magnitudes of each group cut to what loses least in
    that group's part of the product.
    """
    rows, depth = weight.shape
    count = depth // grid.group
    blocks = moments.view(count, grid.group, count, grid.group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    clipped = torch.empty_like(weight)
    step = max(1, PIECE // depth)
    for start in range(0, rows, step):
        part = weight[start : start + step].view(-1, count, grid.group).transpose(0, 1)  # [count, rows, group]
        largest = part.abs().amax(-1, keepdim=True)
        best, least = part, torch.full_like(largest, torch.inf)
        for share in range(CLIP_STEPS):
            limit = largest * (1 - MOST_CLIPPED * share / CLIP_STEPS)
            cut = part.clamp(-limit, limit)
            lost = grid.nearest(cut) - part
            error = (torch.bmm(lost, blocks) * lost).sum(-1, keepdim=True)
            best = torch.where(error < least, cut, best)
            least = torch.minimum(error, least)
        clipped[start : start + step] = best.transpose(0, 1).reshape(-1, depth)
    return clipped


def awq(weight: Tensor, moments: Tensor, grid: Grid, *, clipped_rows: range) -> Rounded:
    """weight [N, K] float32, scaled already, as its moments are. clipped_rows: of those that may be
    clipped.
    """
    if clipped_rows:
        weight = weight.clone()
        rows = slice(clipped_rows.start, clipped_rows.stop)
        weight[rows] = clip(weight[rows], moments, grid)
    return grid.round(weight)


def _error(lost: Tensor, moments: Tensor) -> Tensor:
    return ((lost @ moments) * lost).sum()
