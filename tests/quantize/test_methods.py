"""The methods on single matrices, against their definitions written out plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.quantize.awq import clip, find_scales
from octavo.quantize.gptq import DAMPENING, gptq
from octavo.quantize.grid import Grid, Rounded, round_rows
from tests.models.quantised_files import grouped


def problem(rows: int, depth: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs that depend on one another, some much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, depth, generator=generator) * depth**-0.5
    mixed = torch.randn(512, depth // 4, generator=generator) @ torch.randn(depth // 4, depth, generator=generator)
    inputs = mixed + torch.randn(512, depth, generator=generator)
    inputs[:, torch.randperm(depth, generator=generator)[: depth // 16]] *= 20.0
    return weight, inputs


def lost(weight: torch.Tensor, rounded: Rounded, inputs: torch.Tensor) -> float:
    """The relative error of the product."""
    return float(((weight - rounded.dequantise()) @ inputs.t()).norm() / (weight @ inputs.t()).norm())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_to_nearest_is_that_of_the_formats(bits: int, symmetric: bool) -> None:
    weight, _ = problem(24, 128)
    rounded = Grid(bits, 32, symmetric, torch.float16).round(weight)
    numbers, scales, zeros, meant = grouped(weight, bits, np.arange(128) // 32, symmetric)
    assert np.array_equal(rounded.scales.double().numpy(), scales)
    assert rounded.zeros is not None and np.array_equal(rounded.zeros.numpy(), zeros)
    away = np.abs(rounded.numbers.long().numpy() - numbers)
    assert away.max() <= 1 and away.mean() < 1e-3  # halves, in float32 and in float64
    np.testing.assert_allclose(rounded.dequantise().numpy(), meant, atol=float(np.abs(scales).max()))


def test_rows_of_8_bits() -> None:
    weight, _ = problem(24, 128)
    weight[3] = 0.0
    for dtype, step in ((torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 2.0**-4)):
        rounded = round_rows(weight, dtype, torch.float32)
        assert rounded.numbers.dtype == dtype and rounded.scales.shape == (24, 1)
        largest = weight.abs().amax(1, keepdim=True)
        bound = step * (largest if dtype == torch.int8 else weight.abs()) * 1.01 + 1e-4 * largest
        assert bool(((rounded.dequantise() - weight).abs() <= bound).all())


def obq(weight: np.ndarray, moments: np.ndarray, grid: Grid, order: np.ndarray, in_place: bool) -> np.ndarray:
    """GPTQ by its definition: after each column the others change by what the inverse of the second
    moments of those that are left says (Frantar et al. 2022, equation 2), inverted anew each time.
    """
    fitted = [grid.fit(torch.from_numpy(part).float()) for part in np.split(weight, weight.shape[1] // grid.group, 1)]
    weight, depth = weight[:, order].copy(), weight.shape[1]
    left = moments[np.ix_(order, order)] + DAMPENING * np.diag(moments).mean() * np.eye(depth)
    result = np.empty_like(weight)
    for column in range(depth):
        if in_place:
            scale, zero = (x.double().numpy() for x in fitted[order[column] // grid.group])
        elif column % grid.group == 0:
            group = torch.from_numpy(weight[:, column : column + grid.group]).float()
            scale, zero = (x.double().numpy() for x in grid.fit(group))
        inverse = np.linalg.inv(left[column:, column:])
        number = np.clip(np.round(weight[:, column : column + 1] / scale) + zero, 0, grid.top)
        result[:, column : column + 1] = (number - zero) * scale
        error = (weight[:, column] - result[:, column]) / inverse[0, 0]
        weight[:, column:] -= np.outer(error, inverse[0])
    return result[:, np.argsort(order)]


@pytest.mark.parametrize("order_of", ["inputs", "activations", "activations-in-place"])
@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (128, False), (256, True)])
def test_gptq_is_the_papers_one_column_at_a_time(group: int, symmetric: bool, order_of: str) -> None:
    by_activation, in_place = order_of != "inputs", order_of.endswith("place")
    weight, inputs = problem(16, 256)
    moments = inputs.double().t() @ inputs.double()
    grid = Grid(4, group, symmetric, torch.float16)
    rounded = gptq(weight, moments.float(), grid, by_activation=by_activation, groups_in_place=in_place)
    order = np.arange(256)
    if by_activation:
        order = np.argsort(-moments.diagonal().float().numpy(), kind="stable")
    if by_activation and not in_place:
        assert rounded.groups is not None
        assert np.array_equal(rounded.groups.numpy()[order], np.arange(256) // group)
    expected = obq(weight.double().numpy(), moments.numpy(), grid, order, in_place)
    # A number at the border of two may fall to the other side in float32, and its row goes on from there.
    same = np.isclose(rounded.dequantise().numpy(), expected, atol=1e-5).all(1)
    assert same.mean() >= 0.7
    nearest = lost(weight, grid.round(weight), inputs)
    exact = float(((weight.double() - torch.from_numpy(expected)) @ inputs.double().t()).norm())
    exact /= float((weight @ inputs.t()).norm())
    assert lost(weight, rounded, inputs) < 0.6 * nearest
    assert lost(weight, rounded, inputs) == pytest.approx(exact, rel=0.05)


def test_gptq_of_inputs_that_are_never_there_and_of_few() -> None:
    """Columns without inputs are rounded by themselves, and a text shorter than the matrix is wide
    leaves moments that have no inverse of their own.
    """
    weight, inputs = problem(16, 256)
    inputs = inputs[:40].clone()
    inputs[:, 7:20] = 0.0
    grid = Grid(4, 64, True, torch.float16)
    rounded = gptq(weight, inputs.t() @ inputs, grid)
    assert lost(weight, rounded, inputs) < 0.5 * lost(weight, grid.round(weight), inputs)
    unused = (weight - rounded.dequantise())[:, 7:20].abs()
    assert float(unused.max()) < 2 * float(rounded.scales.max())
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, torch.full((256, 256), torch.nan), grid)


def test_awqs_scales_lose_least_of_those_that_are_tried() -> None:
    weight, inputs = problem(64, 256)
    grid = Grid(4, 64, False, torch.float16)
    moments, magnitude = inputs.t() @ inputs, inputs.abs().mean(0)
    scales = find_scales(weight, moments, magnitude, grid)

    def error(tried: torch.Tensor) -> float:
        """By the inputs themselves."""
        rounded = grid.round(weight * tried).dequantise() / tried
        return float(((rounded - weight) @ inputs.t()).square().sum())

    tried = [magnitude ** (step / 20) for step in range(21)]
    least = min(error(x / (x.max() * x.min()).sqrt()) for x in tried)
    assert error(scales) == pytest.approx(least, rel=1e-3)
    assert error(scales) < 0.5 * error(torch.ones(256))


def test_clipping_loses_least_in_each_group() -> None:
    weight, inputs = problem(8, 128)
    weight[:, ::32] *= 4.0  # few that are large, at inputs that are as others
    inputs[:, ::32] *= 0.1
    grid = Grid(4, 32, False, torch.float16)
    moments = inputs.t() @ inputs
    clipped = clip(weight, moments, grid)
    assert bool((clipped.abs() <= weight.abs() + 1e-6).all()) and not torch.equal(clipped, weight)
    for row in range(8):
        for group in range(0, 128, 32):
            part, seen = weight[row : row + 1, group : group + 32], inputs[:, group : group + 32]

            def error(cut: torch.Tensor, part: torch.Tensor = part, seen: torch.Tensor = seen) -> float:
                return float(((grid.nearest(cut) - part) @ seen.t()).square().sum())

            largest = float(part.abs().max())
            least = min(error(part.clamp(-largest * share, largest * share)) for share in np.arange(1.0, 0.5, -0.05))
            assert error(clipped[row : row + 1, group : group + 32]) <= least * 1.001
