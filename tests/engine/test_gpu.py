"""The whole engine on a GPU, in bfloat16, against transformers in float32 over the same weights:
overlap, graphs, kernels, sampling.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, SamplingParams
from tests.engine import gpu_models

pytestmark = pytest.mark.gpu

# bfloat16 keeps 8 bits: logits of a 4-layer model of this width move by a few hundredths against
# float32. A wrong page, position or mask moves them by whole units.
TOLERANCE = 0.15


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    gpu_models.make(request.param, 4).to(torch.bfloat16).save_pretrained(path)
    return path


@torch.inference_mode()
def check(model: torch.nn.Module, outputs: list[Any], tolerance: float = TOLERANCE) -> None:
    """Every drawn token is the reference's best within the tolerance, and its logprob is the
    reference's.
    """
    for output in outputs:
        for choice in output.outputs:
            ids = torch.tensor([output.prompt_token_ids + choice.token_ids], device="cuda")
            start = len(output.prompt_token_ids) - 1
            logprobs = model(ids).logits[0, start:-1].float().log_softmax(-1)
            for position, token in enumerate(choice.token_ids):
                expected = float(logprobs[position, token])
                assert expected > float(logprobs[position].max()) - tolerance, (position, token)
                assert choice.logprobs[position][token].logprob == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_greedy_and_logprobs_follow_the_reference(folder: Path, enforce_eager: bool) -> None:
    transformers = pytest.importorskip("transformers")
    rng = random.Random(1)
    prompts = [{"prompt_token_ids": [rng.randrange(2048) for _ in range(n)]} for n in (1, 5, 63, 64, 65, 130, 400, 777)]
    params = SamplingParams(temperature=0.0, max_tokens=70, ignore_eos=True, logprobs=2)
    llm = LLM(
        str(folder),
        dtype="bfloat16",
        device="cuda",
        max_num_seqs=8,
        max_num_batched_tokens=256,
        max_model_len=1024,
        kv_cache_memory=256 << 20,
        enforce_eager=enforce_eager,
    )
    cold = llm.generate(prompts, params, use_tqdm=False)
    warm = llm.generate(prompts, params, use_tqdm=False)
    forked = llm.generate(
        prompts[4], SamplingParams(n=3, temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=0), use_tqdm=False
    )
    llm.core.check_integrity()
    assert sum(output.num_cached_tokens for output in warm) > 800
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    check(model, cold + warm + forked)


def test_log_probabilities_of_prompts_follow_the_reference(folder: Path) -> None:
    """In chunks, beside decodes in graphs, with a cache that holds the prompts already."""
    transformers = pytest.importorskip("transformers")
    rng = random.Random(4)
    prompts = [{"prompt_token_ids": [rng.randrange(2048) for _ in range(n)]} for n in (1, 2, 130, 700)]
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 1024, "kv_cache_memory": 256 << 20}
    plain = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=0)
    asks = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=0, prompt_logprobs=3)
    with LLM(str(folder), dtype="bfloat16", device="cuda", **options) as llm:
        llm.generate(prompts, plain, use_tqdm=False)
        outputs = llm.generate(prompts + prompts, [plain] * 4 + [asks] * 4, use_tqdm=False)
        llm.core.check_integrity()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    check(model, outputs)
    for output in outputs[4:]:
        ids, told = output.prompt_token_ids, output.prompt_logprobs
        assert told[0] is None and len(told) == len(ids) and output.num_cached_tokens == 0
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids], device="cuda")).logits[0].float().log_softmax(-1).cpu()
        for row, token, position in zip(logprobs, ids[1:], told[1:], strict=False):
            assert next(iter(position)) == token and 3 <= len(position) <= 4
            for other, entry in position.items():
                assert entry.logprob == pytest.approx(float(row[other]), abs=TOLERANCE)


@pytest.mark.parametrize("pooling", ["LAST", "MEAN"])
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "launched"])
def test_embeddings_follow_the_reference(folder: Path, enforce_eager: bool, pooling: str) -> None:
    """In chunks; last tokens by captured steps, means by launched ones, over a cache that holds the prompts."""
    transformers = pytest.importorskip("transformers")
    rng = random.Random(5)
    prompts = [{"prompt_token_ids": [rng.randrange(2048) for _ in range(n)]} for n in (1, 2, 130, 700, 64)]
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 1024, "kv_cache_memory": 256 << 20}
    with LLM(
        str(folder),
        dtype="float32",
        device="cuda",
        enforce_eager=enforce_eager,
        pooler_config={"pooling_type": pooling},
        **options,
    ) as llm:
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True), use_tqdm=False)
        outputs = llm.embed(prompts, use_tqdm=False)
        llm.core.check_integrity()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    for output in outputs:
        with torch.inference_mode():
            states = model.model(torch.tensor([output.prompt_token_ids], device="cuda")).last_hidden_state[0]
        right = states[-1] if pooling == "LAST" else states.mean(0)
        found = torch.tensor(output.outputs.embedding)
        assert torch.cosine_similarity(found, right.cpu(), dim=0) > 0.9999
        assert float(found.norm()) == pytest.approx(1.0, abs=1e-5)


def test_seeded_draws_do_not_depend_on_company(folder: Path) -> None:
    rng = random.Random(2)
    prompts = [{"prompt_token_ids": [rng.randrange(2048) for _ in range(rng.randrange(1, 200))]} for _ in range(16)]
    params = [SamplingParams(temperature=1.0, top_p=0.95, seed=seed, max_tokens=1) for seed in range(16)]
    llm = LLM(str(folder), dtype="float32", device="cuda", max_num_seqs=16, max_model_len=1024, kv_cache_memory=1 << 28)
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    alone = [
        llm.generate(prompt, one, use_tqdm=False)[0].outputs[0].token_ids
        for prompt, one in zip(prompts, params, strict=True)
    ]
    # A draw may sit on a border that rounding moves between batch shapes: nearly all must agree.
    assert sum(a == b for a, b in zip(together, alone, strict=True)) >= 15


def test_nothing_is_compiled_while_requests_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel variant that start-up did not prepare would stop every stream for a second or two."""
    triton = pytest.importorskip("triton")
    llm = LLM(
        str(folder), dtype="bfloat16", device="cuda", max_num_seqs=64, max_model_len=1024, kv_cache_memory=1 << 28
    )
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **call: compiled.append(call["repr"]) or None)
    rng = random.Random(3)
    for count in (1, 3, 16, 17, 40):
        prompts = [
            {"prompt_token_ids": [rng.randrange(2048) for _ in range(rng.randrange(1, 300))]} for _ in range(count)
        ]
        params = [gpu_models.various(rng, 20) for _ in range(count)]
        llm.generate(prompts, params, use_tqdm=False)
        llm.embed(prompts, use_tqdm=False)
    assert compiled == []


def test_memory_stays_within_its_share(folder: Path) -> None:
    """KV blocks are what the share leaves after a rehearsed worst step: a full load then needs no
    more.
    """
    share, total = 0.15, torch.cuda.get_device_properties(0).total_memory
    llm = LLM(str(folder), dtype="bfloat16", device="cuda", max_num_seqs=64, gpu_memory_utilization=share)
    torch.cuda.reset_peak_memory_stats()
    rng = random.Random(4)
    prompts = [{"prompt_token_ids": [rng.randrange(2048) for _ in range(700)]} for _ in range(100)]
    params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=3, max_tokens=20)
    llm.generate(prompts, params, use_tqdm=False)
    used = torch.cuda.max_memory_allocated()
    assert used < share * total
