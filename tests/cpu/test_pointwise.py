"""Norms and gates that no product reads, against their twins; and `Floats`, which hidden states are
between the ops of a model in blocks, against tensors.
"""

import pytest
import torch
from torch import Tensor

from octavo import _core
from octavo.kernels.reference import layers as twins
from octavo.layers import pointwise
from tests.cpu.blocks import make

SIZES = [(1, 1), (1, 576), (3, 63), (9, 130), (40, 2048)]


def tensor(floats: _core.Floats) -> Tensor:
    """What it holds: a norm of nothing added, by weights of one, would change it; a sum with zeros does
    not.
    """
    out = torch.zeros(floats.shape)
    _core.add_rms_norm(floats, out, torch.ones(floats.shape[1]), 1e-5, torch.empty(floats.shape))
    return out


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norms_are_the_twins(size: tuple[int, int]) -> None:
    x, residual, weight = torch.randn(size), torch.randn(size), torch.randn(size[1])
    torch.testing.assert_close(pointwise.rms_norm(x, weight, 1e-3), twins.rms_norm(x, weight, 1e-3))
    expected = residual + x
    actual = pointwise.add_rms_norm(x, residual, weight, 1e-3)
    torch.testing.assert_close(actual, twins.rms_norm(expected, weight, 1e-3))
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("gate", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_gates_are_the_twins(gate: str, size: tuple[int, int]) -> None:
    x = torch.randn(size[0], 2 * size[1]) * 4
    x[0, 0] = -200.0
    torch.testing.assert_close(getattr(pointwise, gate)(x), getattr(twins, gate)(x), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7])
def test_a_layers_chain_is_the_same_in_tensors_and_in_floats(rows: int) -> None:
    """Each op reads what the one before has written, also where memory is used again."""
    blocks, _ = make("Q4_1", 128, 64)
    product, weight, gate = _core.BlockProduct([blocks]), torch.rand(64), _core.BlockProduct([make("Q8_0", 64, 64)[0]])
    table, ids = make("F16", 50, 64)[0], torch.arange(rows, dtype=torch.int32) * 5
    states, residual = torch.empty(rows, 64), table.take(ids, 2.0)
    expected = table.take(ids, 2.0, states)
    held = _core.Floats.of(weight)
    floats, plain = _core.rms_norm(residual, held, 1e-5), pointwise.rms_norm(expected, weight, 1e-5)
    for _ in range(5):
        wide = torch.empty(rows, 128)
        product.add_rms_norm(plain, expected, weight, 1e-5, wide)
        plain = gate.silu_and_mul(wide, torch.empty(rows, 64))
        plain = pointwise.add_rms_norm(plain, expected, weight, 1e-5)
        plain = pointwise.gelu_tanh_and_mul(torch.cat((plain, plain), dim=1))
        wide_floats = product.add_rms_norm(floats, residual, held, 1e-5)
        assert wide_floats.shape == (rows, 128)
        floats = gate.silu_and_mul(wide_floats)
        floats = _core.add_rms_norm(floats, residual, held, 1e-5)
        both = tensor(floats)
        floats = _core.gelu_tanh_and_mul(torch.cat((both, both), dim=1))
        assert torch.equal(tensor(floats), plain)
        assert torch.equal(tensor(residual), expected)


def test_two_that_live_share_no_memory() -> None:
    table, weight = make("F32", 40, 32)[0], torch.ones(32)
    held = []
    for number in range(40):
        ids = torch.full((1 + number % 3,), number, dtype=torch.int32)
        held.append((table.take(ids), table.take(ids, out=torch.empty(len(ids), 32))))
        if number % 4 == 3:
            del held[number // 8]
        _core.rms_norm(held[-1][0], weight, 1e-5)  # is dropped at once
    for floats, expected in held:
        assert torch.equal(tensor(floats), expected)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="x makes 16 numbers, of which 7 are a row"):
        _core.rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match="out has 8"):
        _core.rms_norm(x, torch.ones(8), 1e-5, torch.zeros(1, 8))
    with pytest.raises(ValueError, match="residual: 8 numbers, but x has 16"):
        _core.add_rms_norm(x, torch.zeros(1, 8), torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="7 numbers are not rows of gate and up"):
        _core.silu_and_mul(torch.zeros(2, 7))
    with pytest.raises(TypeError, match=r"indices: Floats, must be a tensor of torch\.int32"):
        make("F32", 4, 32)[0].take(_core.rms_norm(x, torch.ones(8), 1e-5))
