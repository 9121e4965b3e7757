"""What the architecture tests cannot see: the plain schemes by themselves, which of them is chosen,
and how layers are cut into KV groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import pytest
import torch

from octavo.layers.schemes import choice
from octavo.layers.schemes.choice import Schemes
from octavo.layers.schemes.cpu import HalfScheme, PackedScheme
from octavo.layers.schemes.dense import DenseScheme, PlainScheme
from octavo.layers.schemes.scheme import Matrix
from octavo.layers.weight import allocate
from octavo.model_config import kv_groups
from octavo.models.llama import LlamaForCausalLM
from octavo.models.presets import preset_config
from octavo.weights.dummy import fill_with_random

CPU = torch.device("cpu")


def filled(scheme: PlainScheme, weight: torch.Tensor, bias: torch.Tensor | None) -> PlainScheme:
    """A scheme of one projection as the loader leaves it."""
    allocate(scheme, CPU)
    scheme.weight.copy_(weight)
    if scheme.bias is not None and bias is not None:
        scheme.bias.copy_(bias)
    scheme.finish()
    return scheme


def chosen(dtype: torch.dtype) -> type[PlainScheme]:
    return type(Schemes(dtype, CPU).plain(Matrix({"w": 8}, 8)))


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (PackedScheme, torch.float32),
        *((kind, dtype) for kind in (HalfScheme, DenseScheme) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_cpu_product_equals_float64(kind: type[PlainScheme], dtype: torch.dtype, biased: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator).to(dtype) for size in ((73, 64), (73,), (rows, 64)))
    scheme = filled(kind(Matrix({"w": 73}, 64, biased), dtype), weight, bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if biased else None)
    actual = scheme(x)
    assert actual.dtype == dtype
    # float32: sums of 64 products in another order. 16 bits: one rounding of the result, to 2^-9 or
    # 2^-12 of itself, and what torch's own row loop loses where a processor takes that.
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 2**-8}
    torch.testing.assert_close(actual.double(), expected, **tolerance)


def test_a_cpu_takes_the_fastest_plain_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(torch.float32) is PackedScheme
    for widens, kind in ((True, HalfScheme), (False, DenseScheme)):
        monkeypatch.setattr(choice, "widens_half", lambda dtype, widens=widens: widens and dtype != torch.float32)
        assert chosen(torch.bfloat16) is kind
        for dtype in (torch.float32, torch.bfloat16):
            assert Schemes(dtype, CPU).activation_dtype == torch.float32
        assert Schemes(torch.bfloat16, torch.device("cuda")).activation_dtype == torch.bfloat16
    assert type(Schemes(torch.float32, torch.device("cuda")).plain(Matrix({"w": 8}, 8))) is DenseScheme


@pytest.mark.parametrize("widens", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_not_rounded(widens: bool, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the processor multiplies bfloat16 by itself."""
    monkeypatch.setattr(choice, "widens_half", lambda dtype: widens and dtype != torch.float32)
    config = dataclasses.replace(preset_config("tiny"), num_layers=1, layer_windows=(0,), tie_word_embeddings=tied)
    model = LlamaForCausalLM(config, Schemes(torch.bfloat16, CPU))
    fill_with_random(model, CPU, seed=0)
    table = model.embedding.weight if tied else unpacked(model.head.scheme)
    hidden = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(0)) * 16
    expected = hidden.double() @ table.double().T
    # Weights under 6e-5 move in float16; bfloat16 would be off by up to 2^-9 of a logit.
    torch.testing.assert_close(model.compute_logits(hidden).double(), expected, atol=1e-3, rtol=1e-4)


def unpacked(scheme: Any) -> torch.Tensor:
    """The matrix of a scheme, by what it makes of unit vectors."""
    return scheme(torch.eye(scheme.matrix.in_features)).T


@pytest.mark.parametrize(
    ("value", "packed"), [(65280.0, True), (1e5, False), (float("inf"), False), (float("nan"), False)]
)
def test_weights_beyond_float16_are_not_packed_as_such(value: float, packed: bool) -> None:
    weight = torch.ones(8, 8, dtype=torch.bfloat16)
    weight[0, 0] = value
    scheme = filled(HalfScheme(Matrix({"w": 8}, 8), torch.bfloat16), weight, None)
    assert hasattr(scheme, "weight") is not packed
    out = scheme(torch.ones(1, 8, dtype=torch.bfloat16))
    torch.testing.assert_close(
        out, torch.nn.functional.linear(torch.ones(1, 8), weight.float()).bfloat16(), equal_nan=True
    )


def test_schemes_report_their_bytes() -> None:
    matrix, weight, bias = Matrix({"w": 16}, 32, bias=True), torch.ones(16, 32), torch.ones(16)
    for kind in (DenseScheme, PackedScheme):
        assert filled(kind(matrix, torch.float32), weight, bias).own_bytes() == 4 * (16 * 32 + 16)
    large = weight.bfloat16().fill_(1e5)
    assert filled(HalfScheme(matrix, torch.bfloat16), weight, bias).own_bytes() == 2 * 16 * 32 + 4 * 16
    assert filled(HalfScheme(matrix, torch.bfloat16), large, bias).own_bytes() == 2 * (16 * 32 + 16)


def test_each_kind_of_matrix_is_rehearsed_once() -> None:
    config = dataclasses.replace(preset_config("tiny"), num_layers=3, layer_windows=(0,) * 3)
    model = LlamaForCausalLM(config, DenseOnly(torch.float32, CPU))
    fill_with_random(model, CPU, seed=0)
    norms = (2 * config.num_layers + 1) * config.hidden_size
    assert model.weight_bytes() == 4 * (config.num_parameters() + norms)  # the tied table once
    done: set[Hashable] = set()
    ran = []
    for layer in model.layers():
        before = len(done)
        layer.rehearse(done)
        ran += [layer] * (len(done) - before)
    first = model.decoder_layers[0]
    assert ran == [first.attention.qkv, first.attention.out, first.mlp.gate_up, first.mlp.down, model.head]


class DenseOnly(Schemes):
    """As on a GPU, where the warm-up rehearses."""

    def plain(self, matrix: Matrix) -> PlainScheme:
        return DenseScheme(matrix, self.dtype)


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
