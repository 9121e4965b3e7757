"""Blocks as numbers, against the `gguf` package."""

import sys
from pathlib import Path

import gguf
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
    indices = torch.tensor([49, 0, 7, 7, 31], dtype=torch.int32)
    actual = torch.empty(5, values.shape[1])
    assert blocks.take(indices, out=actual) is actual
    assert torch.equal(actual, values[indices])
    blocks.take(indices, 3.0, actual)
    assert torch.equal(actual, values[indices] * 3.0)
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
def test_a_product_leaves_the_numbers_as_they_are(kind: str) -> None:
    """It may put the rows side by side, in groups that these do not fill: for all who have the blocks."""
    blocks, values = make(kind, 50, 3 * numbers_of_block(kind), seed=11)
    apart = blocks.with_heads_apart(5)
    for form, right in ((blocks, values), (apart, values.view(5, 5, 2, -1).transpose(1, 2).reshape(50, -1))):
        product = _core.BlockProduct([form])
        ones, out = torch.eye(values.shape[1])[:3].contiguous(), torch.empty(3, 50)
        product.plain(ones, out)
        torch.testing.assert_close(out, right[:, :3].T.contiguous(), rtol=1e-4, atol=1e-5)
        actual = torch.empty_like(values)
        form.read(0, actual)
        assert torch.equal(actual, right)
        indices = torch.tensor([49, 0, 17, 17], dtype=torch.int32)
        taken = torch.empty(4, values.shape[1])
        form.take(indices, out=taken)
        assert torch.equal(taken, right[indices])
        assert form.is_finite()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_there_is_one_copy_of_the_blocks_in_memory(tmp_path: Path) -> None:
    """Of those that a product has put side by side the file's pages leave the process, and no others do."""
    path, rows, columns = tmp_path / "model.gguf", 4096, 4096
    data = np.random.default_rng(12).integers(0, 256, (2, rows, columns // 32 * 34), dtype=np.uint8)
    data.reshape(2, rows, -1, 34)[..., 1] = 0x24  # scales of 0.01 to 0.02
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, raw in zip(("multiplied", "looked_up"), data, strict=True):
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = _core.GgufFile(str(path))
    multiplied, looked_up = file.matrix("multiplied"), file.matrix("looked_up")
    assert multiplied.is_finite() and looked_up.is_finite()  # all pages are read
    assert in_memory(path) > 0.9 * (multiplied.nbytes + looked_up.nbytes)
    product = _core.BlockProduct([multiplied])
    assert looked_up.nbytes * 0.9 < in_memory(path) < looked_up.nbytes * 1.1
    x, out = torch.randn(1, columns), torch.empty(1, rows)
    product.plain(x, out)
    assert in_memory(path) < looked_up.nbytes * 1.1
    right = torch.from_numpy(gguf.dequantize(data[0, :64], gguf.GGMLQuantizationType.Q8_0)).double()
    torch.testing.assert_close(out[0, :64].double(), right @ x[0].double(), rtol=1e-3, atol=1e-2)


def in_memory(path: Path) -> int:
    """Bytes of a mapped file that this process has in memory."""
    total, is_of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_of_file = line.endswith(str(path))
        elif is_of_file and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


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
        blocks.take(torch.tensor([0, 4], dtype=torch.int32), out=torch.empty(2, 32))
    with pytest.raises(TypeError, match=r"out: dtype torch.float64, must be torch.float32"):
        blocks.read(0, torch.empty(4, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="out: must be contiguous"):
        blocks.read(0, torch.empty(32, 4).T)
    with pytest.raises(ValueError, match="96 numbers from row 2 on, but there are 4 rows of 32"):
        blocks.read(2, torch.empty(3, 32))
