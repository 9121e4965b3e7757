"""What the architecture tests cannot see: the CPU's linear methods by themselves, and how layers are cut into KV
groups.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from octavo.layers.cpu_linear import PackedMethod, UpcastMethod
from octavo.layers.linear import DenseMethod
from octavo.model_config import kv_groups
from octavo.models.presets import preset_config


@pytest.mark.parametrize("rows", [1, 7, 8, 33])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("method", "dtype"), [(PackedMethod, torch.float32), (UpcastMethod, torch.bfloat16)])
def test_cpu_methods_equal_float64(method: type, dtype: torch.dtype, biased: bool, rows: int, monkeypatch) -> None:
    monkeypatch.setattr("octavo.layers.cpu_linear.CHUNK_ELEMENTS", 64 * 10)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator).to(dtype) for size in ((73, 64), (73,), (rows, 64)))
    bias = bias if biased else None
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    actual = method(weight, bias)(x)
    assert actual.dtype == dtype
    # float32: sums of 64 products in another order. bfloat16: one rounding of the result (2^-9), and a margin for the
    # row loop's own accumulation.
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 2**-7}
    torch.testing.assert_close(actual.double(), expected, **tolerance)


def test_dense_method_holds_weight_and_bias() -> None:
    weight, bias = torch.ones(2, 3), torch.ones(2)
    assert len(list(DenseMethod(weight, bias).tensors())) == 2


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
