"""GPTQ: each column's rounding error is made up for by the columns that are rounded after it.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers": the columns of a row are rounded one by one; what the row's product with the
calibration's inputs loses by it is taken out, as well as can be, by changing those that follow. How,
is in the inverse of the inputs' second moments H = X X^T, of which the upper Cholesky factor has the
row that each column needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.quantize.grid import Grid, Rounded

DAMPENING = 0.01
"""Of the mean of H's diagonal, added to it; ten times as much where that does not suffice."""

BLOCK = 128
"""Columns whose changes reach the rest of the matrix in one product."""


def gptq(
    weight: Tensor, moments: Tensor, grid: Grid, *, by_activation: bool = False, groups_in_place: bool = False
) -> Rounded:
    """weight [N, K] float32, rounded so that its product with the inputs changes little.

    moments [K, K] float32: X X^T of the inputs, in any unit. by_activation: columns with large
    inputs go first; groups are made in that order (`Rounded.groups`), or groups_in_place: of
    neighbours as ever, and fitted before any column has changed.
    Raises `ValueError` for moments that are not those of finite inputs.
    """
    depth = weight.shape[1]
    place = torch.arange(depth, device=weight.device) // grid.group  # the group of each input
    numbers = torch.empty_like(weight)
    scales, zeros = (x.squeeze(-1) for x in grid.fit(weight.view(len(weight), -1, grid.group)))
    order = torch.argsort(moments.diagonal(), descending=True, stable=True) if by_activation else None
    fits_on_the_way = order is None or not groups_in_place
    if order is not None:
        weight, moments = weight[:, order], moments[order][:, order]
    group_of = (place if order is None or not groups_in_place else place[order]).tolist()
    weight = weight.clone()
    factor = _inverse_factor(moments)
    size = grid.group if grid.group >= BLOCK else BLOCK // grid.group * grid.group
    for start in range(0, depth, size):
        stop = min(start + size, depth)
        block, errors = weight[:, start:stop].clone(), torch.empty_like(weight[:, start:stop])
        inner = factor[start:stop, start:stop]
        for i in range(stop - start):
            group = slice(group_of[start + i], group_of[start + i] + 1)
            if fits_on_the_way and (start + i) % grid.group == 0:
                scales[:, group], zeros[:, group] = grid.fit(block[:, i : i + grid.group])
            scale, zero = scales[:, group], zeros[:, group]
            column = block[:, i : i + 1]
            number = grid.number(column, scale, zero)
            numbers[:, start + i : start + i + 1] = number
            error = (column - (number - zero) * scale) / inner[i, i]
            block[:, i:].addmm_(error, inner[i : i + 1, i:], alpha=-1)
            errors[:, i : i + 1] = error
        weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    if order is None:
        return grid.rounded(numbers, scales, zeros)
    in_place = torch.empty_like(numbers)
    in_place[:, order] = numbers
    if groups_in_place:
        return grid.rounded(in_place, scales, zeros)
    groups = torch.empty_like(place)
    groups[order] = place
    return grid.rounded(in_place, scales, zeros, groups.int())


def _inverse_factor(moments: Tensor) -> Tensor:
    """[K, K] upper triangular U with U^T U = (H + dampening)^-1."""
    diagonal = moments.diagonal()
    mean = diagonal.mean()
    if not bool(mean.isfinite()):
        raise ValueError("inputs that are not finite")
    unused = diagonal == 0  # no input ever reaches these columns: they are rounded by themselves
    share = DAMPENING
    while share <= 1.0:
        damped = moments.clone()
        damped.diagonal().add_(share * mean).masked_fill_(unused, float(mean) or 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                factor: Tensor = upper
                return factor
        share *= 10
    raise ValueError("inputs whose second moments have no inverse")
