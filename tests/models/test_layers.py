"""What the architecture tests cannot see: the CPU's linear methods by themselves, and how layers are cut into KV
groups.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from octavo.layers.cpu_linear import HalfMethod, PackedMethod
from octavo.layers.linear import DenseMethod, linear_method
from octavo.model_config import kv_groups
from octavo.models.presets import preset_config


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_product_equals_float64(dtype: torch.dtype, biased: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator).to(dtype) for size in ((73, 64), (73,), (rows, 64)))
    given = bias if biased else None
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if biased else None)
    actual = linear_method(weight, given)(x)
    assert actual.dtype == dtype
    # float32: sums of 64 products in another order. 16 bits: one rounding of the result, to 2^-9 or 2^-12 of itself,
    # and what torch's own row loop loses where a processor takes that.
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 2**-8}
    torch.testing.assert_close(actual.double(), expected, **tolerance)


@pytest.mark.parametrize(
    ("value", "held"), [(65280.0, True), (1e5, False), (float("inf"), False), (float("nan"), False)]
)
def test_weights_beyond_float16_are_not_packed_as_such(value: float, held: bool) -> None:
    weight = torch.ones(8, 8, dtype=torch.bfloat16)
    weight[0, 0] = value
    method = linear_method(weight, None)
    assert held or isinstance(method, DenseMethod)
    out = method(torch.ones(1, 8, dtype=torch.bfloat16))
    torch.testing.assert_close(
        out, torch.nn.functional.linear(torch.ones(1, 8), weight.float()).bfloat16(), equal_nan=True
    )


def test_methods_report_their_bytes() -> None:
    weight, bias = torch.ones(16, 32), torch.ones(16)
    assert DenseMethod(weight, bias).num_bytes == PackedMethod(weight, bias).num_bytes == 4 * (16 * 32 + 16)
    assert HalfMethod(weight.bfloat16(), None).num_bytes == 2 * 16 * 32


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((0, 0, 0), [(0, [0, 1, 2])]),
        ((8, 8, 8), [(8, [0, 1, 2])]),
        ((8, 8, 0, 8, 8, 0), [(0, [2, 5]), (8, [0, 1]), (8, [3, 4])]),
        ((8, 8, 0, 8, 8, 8, 0), [(0, [2, 6]), (8, [0, 1]), (8, [3, 4]), (8, [5])]),  # the last one has a place unused
        ((8, 0) * 4 + (8,), [(0, [1, 3, 5, 7]), (8, [0, 2, 4, 6, 8])]),  # nearly as many of each: one group a kind
    ],
)
def test_kv_groups(windows: tuple[int, ...], expected: list[tuple[int, list[int]]]) -> None:
    config = dataclasses.replace(preset_config("tiny"), num_layers=len(windows), layer_windows=windows)
    assert [(group.window, group.layers) for group in kv_groups(config)] == expected
