"""Keys and values in 8 and 4 bits through the whole engine on a GPU, against transformers in float32
over a cache that rounds in the same way; and that start-up has prepared every kernel of theirs.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, RequestOutput, SamplingParams
from tests.engine import gpu_models
from tests.engine.conftest import NEVER_DRAWN, make_admission_hopeful

pytestmark = pytest.mark.gpu

SAMPLE = [
    ("Llama", "fp8", "bfloat16"),
    ("Llama", "int8", "float16"),
    ("Llama", "int4", "bfloat16"),
    ("Llama", "int8", "float32"),
    ("Qwen3", "int4", "float16"),
    ("Gemma3", "fp8", "float16"),
    ("Gemma3", "int8", "bfloat16"),
]
# Numbers of 8 bits (bfloat16) fall onto another step than the oracle's now and then, and a step of 4
# bits is large. Wrong scales or another request's pages move logprobs by whole units.
TOLERANCE = {"fp8": 0.1, "int8": 0.1, "int4": 0.2}


def make(family: str, folder: Path) -> torch.nn.Module:
    model = gpu_models.make(family, 4, pad_token_id=None)
    model.save_pretrained(folder)
    return model


def check(model: torch.nn.Module, outputs: list[RequestOutput], kv_dtype: str) -> None:
    """Every drawn token is the oracle's best within the tolerance, and its logprob is the oracle's."""
    from tests.models.rounding_cache import logits_over

    for output in outputs:
        for choice in output.outputs:
            assert output.error is None and choice.logprobs is not None
            start = len(output.prompt_token_ids) - 1
            logits = logits_over(model, output.prompt_token_ids + choice.token_ids, kv_dtype)
            logprobs = logits[start:-1].log_softmax(-1)
            for position, token in enumerate(choice.token_ids):
                expected = float(logprobs[position, token])
                assert expected > float(logprobs[position].max()) - TOLERANCE[kv_dtype], (position, token)
                assert choice.logprobs[position][token].logprob == pytest.approx(expected, abs=TOLERANCE[kv_dtype])


@pytest.mark.parametrize(("family", "kv_dtype", "dtype"), SAMPLE)
def test_codes_follow_the_reference(
    family: str, kv_dtype: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    reference = make(family, tmp_path)
    llm = LLM(
        str(tmp_path),
        dtype=dtype,
        device="cuda",
        kv_cache_dtype=kv_dtype,
        max_quality_loss=math.inf,  # the oracle rounds in all layers
        max_num_seqs=32,
        max_num_batched_tokens=256,  # long prompts are cut
        max_model_len=1024,
        kv_cache_memory=256 << 20,
    )
    assert f" GiB of {kv_dtype}, " in "\n".join(llm._engine.parts.report.lines())
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **call: compiled.append(call["repr"]) or None)
    rng = random.Random(1)
    params = SamplingParams(temperature=0.0, max_tokens=70, ignore_eos=True, logprobs=2)
    prompts = [{"prompt_token_ids": [rng.randrange(2048) for _ in range(n)]} for n in (1, 5, 63, 64, 65, 130, 400, 777)]
    cold = llm.generate(prompts, params, use_tqdm=False)
    warm = llm.generate(prompts, params, use_tqdm=False)
    forked = llm.generate(
        prompts[4], SamplingParams(n=3, temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=0), use_tqdm=False
    )
    llm.core.check_integrity()
    assert compiled == []
    assert sum(output.num_cached_tokens for output in warm) > 800
    check(reference.cuda(), cold + warm + forked, kv_dtype)


def test_a_small_pool_preempts(tmp_path: Path) -> None:
    reference = make("Llama", tmp_path)
    options: dict[str, Any] = {"dtype": "bfloat16", "device": "cuda", "max_model_len": 512, "max_num_seqs": 16}
    options["max_quality_loss"] = math.inf
    block = 4 * 2 * 2 * 64 * (64 + 4)
    llm = LLM(str(tmp_path), kv_cache_dtype="fp8", kv_cache_memory=20 * block, enable_prefix_caching=False, **options)
    rng = random.Random(2)
    prompts = [{"prompt_token_ids": [rng.randrange(2048) for _ in range(100)]} for _ in range(16)]
    make_admission_hopeful(llm)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, stop_token_ids=[NEVER_DRAWN], logprobs=0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert llm.core.stats()["num_preemptions"] > 0
    check(reference.cuda(), outputs, "fp8")
