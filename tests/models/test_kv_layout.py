"""KV pages as bytes: sizes and strides of plain pages, and models over int8 pages against
transformers with a cache that rounds in the same way.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from octavo.config import EngineConfig
from octavo.engine.kv_layout import KvLayout
from octavo.kernels import ops
from octavo.weights.load import load_model
from tests.models.harness import Runner, Sequence
from tests.models.test_architectures import PROMPT, make

CPU = torch.device("cpu")


def layout(dtype: torch.dtype) -> KvLayout:
    return KvLayout(num_groups=3, layers_per_group=5, num_kv_heads=2, block_size=16, head_dim=64, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_pages_are_contiguous_numbers(dtype: torch.dtype) -> None:
    plain = layout(dtype)
    pool = plain.allocate(7, CPU)
    assert plain.block_bytes == 5 * 2 * 2 * 16 * 64 * dtype.itemsize
    assert [blocks.nbytes for blocks in pool] == [7 * plain.block_bytes // 5] * 5
    for blocks, (numbers, scales) in zip(pool, plain.pages(pool), strict=True):
        expected = torch.zeros(7, 2, 2, 16, 64, dtype=dtype)
        assert numbers.dtype == dtype and numbers.shape == expected.shape and numbers.stride() == expected.stride()
        assert numbers.data_ptr() == blocks.data_ptr() and scales is None
        assert torch.equal(numbers, expected)


def test_codes_bring_their_scales() -> None:
    quantised = layout(torch.int8)
    assert quantised.block_bytes == 5 * 2 * 2 * 16 * (64 + 4)
    pool = quantised.allocate(7, CPU)
    for blocks, (codes, scales) in zip(pool, quantised.pages(pool), strict=True):
        assert scales is not None
        codes[3].fill_(-1)
        scales[3].view(torch.int32).fill_(-1)
        assert (blocks[3] == 255).all() and not blocks[[0, 1, 2, 4, 5, 6]].any()


class Int8Cache(transformers.DynamicCache):  # type: ignore[misc]
    """Holds what int8 codes with one scale a head hold of each key and value."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        def rounded(x: torch.Tensor) -> torch.Tensor:
            step = x.abs().amax(-1, keepdim=True) / 127
            return torch.round(x / step) * step

        return super().update(rounded(keys), rounded(values), *args, **kwargs)


@pytest.mark.parametrize("case", ["llama-gqa-tied", "qwen3", "gemma3"])
def test_a_model_over_int8_pages(case: str, tmp_path: Path) -> None:
    """A prompt in two chunks, a fork by copied blocks, and decodes of both sides."""
    reference = make(case, tmp_path)
    argument = "cache" if "cache" in inspect.signature(reference.forward).parameters else "past_key_values"
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT]), **{argument: Int8Cache()}).logits[0]
        unrounded = reference(torch.tensor([PROMPT])).logits[0]
    model = load_model(EngineConfig(model=str(tmp_path), dtype="float32"), device=CPU).model
    runner = Runner(model, torch.int8)
    first, fork = Sequence(0), Sequence(3)
    parts = [runner.step([], [(first, PROMPT[:11])])[0], runner.step([], [(first, PROMPT[11:30])])[0]]
    pairs = torch.cat([table[[first.slot, fork.slot]].T for table in runner.tables])
    ops.copy_blocks(runner.pool, pairs)
    fork.token_ids = list(first.token_ids)
    copies = list(parts)
    for token in PROMPT[30:]:
        one, two = runner.step([(first, token), (fork, token)], [])
        parts.append(one)
        copies.append(two)
    # A sum in another order may move a component to the next of 127 steps, which is rare.
    scale = (unrounded - expected).abs().mean()
    for actual in (torch.cat(parts), torch.cat(copies)):
        assert (actual - expected).abs().mean() < 0.1 * scale
