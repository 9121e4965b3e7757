"""Quantised checkpoints through the whole engine on a GPU, against transformers in float32 with the
weights that they mean; and that start-up has prepared every kernel of theirs.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.weights.load import load_model
from tests.engine import gpu_models
from tests.engine.test_gpu import check
from tests.models.quantised_files import quantise
from tests.models.test_quantised import CASES

pytestmark = pytest.mark.gpu

SAMPLE = [
    ("Llama", "gptq-4-32-act-order-v2", "bfloat16"),
    ("Llama", "gptq-8-64-act-order", "bfloat16"),
    ("Llama", "awq-128", "float16"),
    ("Llama", "packed-4-128", "bfloat16"),
    ("Llama", "packed-8-rows", "bfloat16"),
    ("Llama", "int8-dynamic", "bfloat16"),
    ("Llama", "int8-static", "float16"),
    ("Llama", "fp8-static", "bfloat16"),
    ("Llama", "fp8-hugging-face", "float16"),
    ("Llama", "several-groups", "bfloat16"),
    ("Qwen2", "packed-4-32-asymmetric", "bfloat16"),
    ("Gemma3", "fp8-dynamic", "bfloat16"),
]


def make(family: str, folder: Path) -> torch.nn.Module:
    model = gpu_models.make(family, 2, **({} if family == "Gemma3" else {"tie_word_embeddings": False}))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("family", "name", "dtype"), SAMPLE)
def test_quantised_checkpoints_follow_the_reference(
    family: str, name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    reference = make(family, tmp_path)
    quantise(tmp_path, reference, CASES[name]())
    llm = LLM(
        str(tmp_path),
        dtype=dtype,
        device="cuda",
        max_num_seqs=32,
        max_num_batched_tokens=1024,
        max_model_len=1024,
        kv_cache_memory=256 << 20,
    )
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **call: compiled.append(call["repr"]) or None)
    rng = random.Random(1)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=2)
    outputs = []
    for lengths in ((1,), (5, 63, 65), (130, 400, 777), (7,) * 31):
        prompts = [{"prompt_token_ids": [rng.randrange(2048) for _ in range(length)]} for length in lengths]
        outputs += llm.generate(prompts, params, use_tqdm=False)
    llm.core.check_integrity()
    assert compiled == []
    check(reference.cuda(), outputs)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_quantised_while_loading(kind: str, tmp_path: Path) -> None:
    """Follows the plain model as far as 4 or 8 bits let it, and takes less memory."""
    reference = make("Llama", tmp_path)
    options: dict[str, Any] = {"dtype": "bfloat16", "device": "cuda", "max_model_len": 1024, "max_num_seqs": 8}
    options["max_quality_loss"] = math.inf  # no layer is kept
    llm = LLM(str(tmp_path), quantization=kind, kv_cache_memory=256 << 20, **options)
    prompts = [{"prompt_token_ids": [random.Random(n).randrange(2048) for _ in range(n)]} for n in (3, 70, 300)]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=2)
    check(reference.cuda(), llm.generate(prompts, params, use_tqdm=False), 0.6 if kind == "int4" else 0.2)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_loading_takes_no_more_than_two_layers_beside_the_quantised_model(kind: str) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    config = EngineConfig(model="llama2-7b", load_format="dummy", dtype="bfloat16", quantization=kind)
    held = load_model(config, device=torch.device("cuda", 0)).model.weight_bytes()
    layer = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert held < (0.3 if kind == "int4" else 0.53) * 2 * 6.74e9
    assert torch.cuda.max_memory_allocated() - before < held + 2 * layer
