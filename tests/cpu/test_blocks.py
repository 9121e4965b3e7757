"""Blocks as numbers, against the `gguf` package."""

import numpy as np
import pytest
import torch

from octavo import _core
from tests.cpu.blocks import FORMATS, SCALES, make, numbers_of_block


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_has_the_numbers_of_the_gguf_package(kind: str) -> None:
    blocks, values = make(kind, 7, 3 * numbers_of_block(kind), seed=1)
    assert blocks.format == kind and blocks.shape == tuple(values.shape)
    actual = torch.empty_like(values)
    blocks.read(0, actual)
    assert torch.equal(actual, values)


@pytest.mark.parametrize("kind", ["F16", "Q4_1", "Q6_K"])
def test_rows_are_taken_by_their_number(kind: str) -> None:
    blocks, values = make(kind, 50, numbers_of_block(kind), seed=2)
    indices = torch.tensor([49, 0, 7, 7, 31])
    actual = torch.empty(5, values.shape[1])
    blocks.take(indices, actual)
    assert torch.equal(actual, values[indices])
    rest = torch.empty(3, values.shape[1])
    blocks.read(47, rest)
    assert torch.equal(rest, values[47:])


def test_heads_whose_halves_alternate_come_apart() -> None:
    blocks, values = make("Q8_0", 48, 32, seed=3)
    apart = values.view(3, 8, 2, 32).transpose(1, 2).reshape(48, 32)
    actual = torch.empty_like(values)
    blocks.with_heads_apart(3).read(0, actual)
    assert torch.equal(actual, apart)
    with pytest.raises(ValueError, match="48 rows are not two halves of 5 heads"):
        blocks.with_heads_apart(5)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_scale_that_is_not_finite_is_found(kind: str) -> None:
    size = numbers_of_block(kind)
    good, _ = make(kind, 300, 4 * size, seed=4)
    assert good.is_finite()
    num_bytes = good.nbytes // (300 * 4)
    for place in SCALES.get(kind, [0]):
        for value in (float("inf"), float("nan")):
            data = np.zeros((300 * 4, num_bytes), np.uint8)
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16}.get(kind, torch.float16)
            raw = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy()
            data[1111, place : place + len(raw)] = raw
            assert not _core.BlockMatrix.from_bytes(kind, 300, 4 * size, data.tobytes()).is_finite()


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="rows of 100 numbers are not whole blocks of 256, which Q4_K has"):
        _core.BlockMatrix.from_bytes("Q4_K", 1, 100, b"")
    with pytest.raises(ValueError, match="2 rows of 32 numbers in Q8_0 end after byte 67"):
        _core.BlockMatrix.from_bytes("Q8_0", 2, 32, bytes(67))
    with pytest.raises(ValueError, match=r"IQ1_S.*: not a format"):
        _core.BlockMatrix.from_bytes("IQ1_S", 1, 256, bytes(50))
    blocks, _ = make("Q8_0", 4, 32)
    with pytest.raises(IndexError, match="indices: 4 is no row of 4"):
        blocks.take(torch.tensor([0, 4]), torch.empty(2, 32))
    with pytest.raises(TypeError, match=r"out: dtype torch.float64, must be torch.float32"):
        blocks.read(0, torch.empty(4, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="out: must be contiguous"):
        blocks.read(0, torch.empty(32, 4).T)
    with pytest.raises(ValueError, match="96 numbers from row 2 on, but there are 4 rows of 32"):
        blocks.read(2, torch.empty(3, 32))
