"""KV pages as bytes: sizes and strides, which dtypes are refused, and models over codes against
transformers with a cache that rounds in the same way.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo.config import EngineConfig
from octavo.engine.kv_layout import DTYPES, KvLayout, pick_kv_dtype, refuse_kv_dtype_of_device
from octavo.kernels import ops
from octavo.weights.load import load_model
from tests.models.harness import Runner, Sequence
from tests.models.rounding_cache import logits_over
from tests.models.test_architectures import PROMPT, make

CPU = torch.device("cpu")


def layout(dtype: torch.dtype) -> KvLayout:
    return KvLayout(num_groups=3, num_kv_heads=2, block_size=16, head_dim=64, dtypes=(dtype,) * 5)


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


# How far such pages may move the logits of these models, in their standard deviations: the formats'
# own errors (half a step of 127, of 8, or 1/32 of a number), grown over the layers. A real model's
# weights are ten times smaller than these, which are made large to tell mistakes from noise.
MOVED = {"int8": 0.03, "fp8": 0.15, "int4": 0.5}


@pytest.mark.parametrize("kv_dtype", MOVED)
@pytest.mark.parametrize("case", ["llama-gqa-tied", "qwen3", "gemma3"])
def test_a_model_over_codes(case: str, kv_dtype: str, tmp_path: Path) -> None:
    """A prompt in two chunks, a fork by copied blocks, and decodes of both sides."""
    reference = make(case, tmp_path)
    expected = logits_over(reference, PROMPT, kv_dtype)
    unrounded = logits_over(reference, PROMPT, "float32")
    model = load_model(EngineConfig(model=str(tmp_path), dtype="float32"), device=CPU).model
    runner = Runner(model, DTYPES[kv_dtype])
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
    # A sum in another order may move a component to the next step, which is rare.
    scale = (unrounded - expected).abs().mean()
    for actual in (torch.cat(parts), torch.cat(copies)):
        assert (actual - expected).abs().mean() < 0.1 * scale
        assert (actual - unrounded).abs().mean() < MOVED[kv_dtype] * unrounded.std()


def test_a_dtype_of_pages_that_does_not_go_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message names the value, the limit and what to do."""
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    for wanted in ("fp8", "fp8_e4m3"):
        said = f"kv_cache_dtype = {wanted}: .* 8.9 or later, and NVIDIA A100 has 8.0: use --kv-cache-dtype int8"
        with pytest.raises(ValueError, match=said):
            refuse_kv_dtype_of_device(wanted, cuda)
        refuse_kv_dtype_of_device(wanted, CPU)
    for wanted in ("auto", "int8", "int4", "bfloat16"):
        refuse_kv_dtype_of_device(wanted, cuda)

    class OldTorch:
        def to(self, _: torch.dtype) -> None:
            raise RuntimeError('"copy_" not implemented')

    monkeypatch.setattr(torch, "ones", lambda *_, **__: OldTorch())
    with pytest.raises(ValueError, match=r"kv_cache_dtype = fp8: .*cannot convert to fp8 on a CPU.*dtype int8"):
        refuse_kv_dtype_of_device("fp8", CPU)

    def pick(wanted: str, head_dim: int, device: torch.device) -> torch.dtype:
        return pick_kv_dtype(wanted, model_dtype=torch.bfloat16, head_dim=head_dim, device=device)

    with pytest.raises(ValueError, match=r"kv_cache_dtype = int4: .* multiple of 4 .* head_dim is 66: .*dtype int8"):
        pick("int4", 66, CPU)
    with pytest.raises(ValueError, match=r"kv_cache_dtype = float16: .* bfloat16: use .* auto, or --dtype float16"):
        pick("float16", 64, cuda)
    assert pick("float16", 64, CPU) == torch.float16 and pick("bfloat16", 64, cuda) == torch.bfloat16
    assert pick("auto", 66, cuda) == torch.bfloat16 and pick("int8", 66, cuda) == torch.int8
