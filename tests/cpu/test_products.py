"""Products by blocks, at every level of instructions that this processor has, against products of
the blocks' numbers in float64.

Stated tolerance: inputs are rounded to 16 bits with a scale for 32 numbers, so the error is below
3e-4 of the answers' size where each row has an outlier of 50 times its size (2e-5 at the median; with
8 bits it is 5e-3 without any outlier). By weights that are not quantised it is float32's.
"""

import random
import threading

import pytest
import torch
from torch import Tensor

from octavo import _core
from octavo.kernels.reference import layers as twins
from tests.cpu.blocks import FORMATS, PLAIN, make, numbers_of_block

TOLERANCE = 3e-4


def inputs(rows: int, columns: int, seed: int) -> Tensor:
    """Rows of different sizes with one outlier each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[torch.arange(rows), torch.randint(columns, (rows,), generator=generator)] *= 50.0
    return x * torch.logspace(-2, 2, rows).unsqueeze(1)


def assert_close(actual: Tensor, expected: Tensor, kind: str = "Q8_0") -> None:
    error = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < (1e-5 if kind in PLAIN else TOLERANCE), error


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_and_number_of_rows(kind: str, level: str) -> None:
    size = numbers_of_block(kind)
    columns = size * 3 if size > 1 else 77
    blocks, values = make(kind, 53, columns, seed=5)
    product = _core.BlockProduct([blocks], level=level)
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 70):
        x = inputs(rows, columns, seed=rows)
        out = torch.full((rows, 53), float("nan"))
        product.plain(x, out)
        assert_close(out, x.double() @ values.double().T, kind)


def test_shapes_at_random(level: str) -> None:
    """Several matrices of different formats and rows, with and without a bias."""
    choose = random.Random(6)
    for round_ in range(60):
        count = choose.randint(1, 3)
        kinds = [choose.choice(FORMATS) for _ in range(count)]
        unit = max(numbers_of_block(kind) for kind in kinds)
        columns = unit * choose.randint(1, 2 if unit == 256 else 9) if unit > 1 else choose.randint(1, 99)
        made = [make(kind, choose.randint(1, 40), columns, seed=round_) for kind in kinds]
        values = torch.cat([numbers for _, numbers in made]).double()
        bias = torch.randn(values.shape[0]) if choose.random() < 0.5 else None
        product = _core.BlockProduct([blocks for blocks, _ in made], bias, level)
        rows = choose.choice([1, 2, 3, 4, 5, 6, 11, 20])
        x = inputs(rows, columns, seed=round_)
        out = torch.full((rows, values.shape[0]), float("nan"))
        product.plain(x, out)
        expected = x.double() @ values.T
        assert_close(out, expected if bias is None else expected + bias)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_input_may_be_computed_first(rows: int, level: str) -> None:
    blocks, values = make("Q4_1", 24, 160, seed=7)
    product, matrix = _core.BlockProduct([blocks], level=level), values.double().T
    x, residual, weight = inputs(rows, 160, 8), inputs(rows, 160, 9), torch.rand(160) + 0.5
    out = torch.empty(rows, 24)
    product.rms_norm(x, weight, 1e-5, out)
    assert_close(out, twins.rms_norm(x.double(), weight.double(), 1e-5).double() @ matrix)
    total = residual + x
    product.add_rms_norm(x, residual, weight, 1e-5, out)
    assert torch.equal(residual, total)
    assert_close(out, twins.rms_norm(total.double(), weight.double(), 1e-5).double() @ matrix)
    gated = torch.randn(rows, 320) * 4
    product.silu_and_mul(gated, out)
    assert_close(out, twins.silu_and_mul(gated.double()) @ matrix)
    product.gelu_tanh_and_mul(gated, out)
    assert_close(out, twins.gelu_tanh_and_mul(gated.double()) @ matrix)


def test_a_row_is_the_same_in_any_company() -> None:
    """Nearly: sums are taken in another order for up to four rows, and nothing else differs."""
    blocks, _ = make("Q4_0", 64, 256, seed=10)
    product = _core.BlockProduct([blocks])
    x = inputs(40, 256, seed=11)
    together, alone = torch.empty(40, 64), torch.empty(40, 64)
    product.plain(x, together)
    for row in range(40):
        product.plain(x[row : row + 1], alone[row : row + 1])
    assert_close(together, alone.double(), "F32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [2, 9])
def test_a_number_that_is_not_finite_spoils_its_row_alone(value: float, rows: int, level: str) -> None:
    blocks, _ = make("Q4_1", 20, 96, seed=12)
    x = inputs(rows, 96, seed=13)
    x[1, 50] = value
    out = torch.empty(rows, 20)
    _core.BlockProduct([blocks], level=level).plain(x, out)
    assert not out[1].isfinite().any()
    assert out[0].isfinite().all() and out[2:].isfinite().all()


def test_zeros_give_zeros(level: str) -> None:
    blocks, _ = make("Q8_0", 20, 96, seed=14)
    out = torch.empty(3, 20)
    _core.BlockProduct([blocks], level=level).plain(torch.zeros(3, 96), out)
    assert not out.any()


def test_threads_may_call_at_once() -> None:
    blocks, values = make("Q4_0", 300, 512, seed=15)
    product = _core.BlockProduct([blocks])
    wrong = []

    def work(seed: int) -> None:
        for rows in (1, 6):
            x = inputs(rows, 512, seed)
            expected = x.double() @ values.double().T
            for _ in range(50):
                out = torch.empty(rows, 300)
                product.plain(x, out)
                if ((out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max() > TOLERANCE:
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_does_not_fit_is_refused() -> None:
    blocks, _ = make("Q8_0", 6, 64)
    other, _ = make("Q8_0", 6, 32)
    product = _core.BlockProduct([blocks])
    with pytest.raises(ValueError, match="matrices of 64 and 32 columns share no input"):
        _core.BlockProduct([blocks, other])
    with pytest.raises(ValueError, match="a product without a matrix"):
        _core.BlockProduct([])
    with pytest.raises(ValueError, match="a bias of 5 numbers for 6 outputs"):
        _core.BlockProduct([blocks], torch.zeros(5))
    with pytest.raises(ValueError, match=r"level \"sse9\": this processor has portable"):
        _core.BlockProduct([blocks], level="sse9")
    with pytest.raises(ValueError, match="x makes 65 numbers, of which 64 are a row, and out has 6: 6 for each row"):
        product.plain(torch.zeros(65), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="x makes 64 numbers, of which 64 are a row, and out has 12"):
        product.plain(torch.zeros(1, 64), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="weight: 63 numbers, must be 64"):
        product.rms_norm(torch.zeros(1, 64), torch.zeros(63), 1e-5, torch.zeros(1, 6))
    with pytest.raises(ValueError, match="residual: 128 numbers, but x has 64"):
        product.add_rms_norm(torch.zeros(1, 64), torch.zeros(2, 64), torch.zeros(64), 1e-5, torch.zeros(1, 6))


def test_threads_are_counted() -> None:
    before = _core.cpu_threads()
    blocks, values = make("Q4_0", 300, 512, seed=16)
    x = inputs(2, 512, seed=17)
    try:
        for threads in (1, 3, 5):
            _core.set_cpu_threads(threads)
            assert _core.cpu_threads() == threads
            out = torch.empty(2, 300)
            _core.BlockProduct([blocks]).plain(x, out)
            assert_close(out, x.double() @ values.double().T)
        with pytest.raises(ValueError, match="cpu_threads = 0: must be from 1 to 1024"):
            _core.set_cpu_threads(0)
    finally:
        _core.set_cpu_threads(before)
