"""Log probabilities of prompts against transformers' `log_softmax` in float32, over chunks, the prefix
cache, preemptions, forks and windows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo import LLM, AsyncEngine, EngineConfig, SamplingParams
from octavo.outputs import RequestOutput
from tests.engine.conftest import Reference, make_admission_hopeful

TOLERANCE = 2e-4
"""Chunks and company move SmolLM2's float32 logits by under 1e-4."""


@torch.inference_mode()
def expected(reference: Reference, ids: list[int]) -> torch.Tensor:
    """# [len(ids) - 1, vocab]: log probabilities behind each token but the last."""
    return reference.model(torch.tensor([ids])).logits[0, :-1].log_softmax(dim=1)


def check(output: RequestOutput, logprobs: torch.Tensor, top: int) -> None:
    """Every position has its own token, right in value and rank, and the `top` likeliest ones."""
    ids, told = output.prompt_token_ids, output.prompt_logprobs
    assert told is not None and len(told) == len(ids) and told[0] is None
    for row, token, position in zip(logprobs, ids[1:], told[1:], strict=True):
        assert position is not None and next(iter(position)) == token
        best = row.topk(top + 1)
        assert top <= len(position) <= top + 1
        assert abs(position[token].logprob - float(row[token])) < TOLERANCE
        near = int(((row - row[token]).abs() < 2 * TOLERANCE).sum())
        assert abs(position[token].rank - int((row > row[token]).sum()) - 1) < near
        if top and float(best.values[top - 1] - best.values[top]) > 2 * TOLERANCE:
            assert set(best.indices[:top].tolist()) <= set(position)
        for other, entry in position.items():
            assert abs(entry.logprob - float(row[other])) < TOLERANCE


@pytest.mark.parametrize(("budget", "prefix_caching"), [(2048, False), (33, True)], ids=["whole", "chunks"])
def test_prompts_in_chunks_with_and_without_prefix_cache(
    reference: Reference, smollm2_path: Path, prompts: list[str], budget: int, prefix_caching: bool
) -> None:
    with LLM(
        str(smollm2_path),
        dtype="float32",
        device="cpu",
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=budget,
        enable_prefix_caching=prefix_caching,
    ) as llm:
        greedy = {"temperature": 0.0, "max_tokens": 2}
        chosen = [prompts[9], prompts[7], "The quick brown fox jumps over the lazy dog. " * 6 + prompts[0]]
        asks = SamplingParams(prompt_logprobs=3, **greedy)
        # One that asks for nothing fills the cache, and runs beside those that ask.
        llm.generate(chosen[0], SamplingParams(**greedy), use_tqdm=False)
        params = [asks, SamplingParams(prompt_logprobs=0, **greedy), asks, SamplingParams(**greedy)]
        outputs = llm.generate([*chosen, chosen[0]], params, use_tqdm=False)
        for output, wanted in zip(outputs, params, strict=True):
            if wanted.prompt_logprobs is None:
                assert output.prompt_logprobs is None
            else:
                assert output.num_cached_tokens == 0
                check(output, expected(reference, output.prompt_token_ids), wanted.prompt_logprobs)
        assert (outputs[3].num_cached_tokens > 0) == prefix_caching
        texts = [output.outputs[0].text for output in outputs]
        assert texts[0] == texts[3]


TINY = {"model": "tiny", "load_format": "dummy", "dtype": "float32", "device": "cpu", "max_model_len": 128}


def values(output: RequestOutput) -> list[dict[int, float]]:
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    told = [position for position in output.prompt_logprobs[1:] if position is not None]
    return [{token: entry.logprob for token, entry in position.items()} for position in told]


def test_preempted_and_forked_prompts_tell_the_same() -> None:
    """Many requests in a pool for few, `n` choices of one prompt, against each alone."""
    ids = [[(7 * start + step) % 900 + 1 for step in range(40 + start)] for start in range(10)]
    prompts = [{"prompt_token_ids": own} for own in ids]
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, prompt_logprobs=2, n=2)
    with LLM(**TINY, max_num_seqs=8, max_num_batched_tokens=24, kv_cache_memory=1 << 26) as llm:
        alone = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt in prompts]
        pool = llm.core.stats()["num_blocks"]
        assert llm.core.stats()["num_preemptions"] == 0
    bytes_a_block = (1 << 26) // int(pool + 1)
    with LLM(**TINY, max_num_seqs=8, max_num_batched_tokens=24, kv_cache_memory=12 * bytes_a_block) as llm:
        make_admission_hopeful(llm)
        stop = SamplingParams(**{**params.__dict__, "ignore_eos": False, "stop_token_ids": [1]})
        crowded = llm.generate(prompts, stop, use_tqdm=False)
        assert llm.core.stats()["num_preemptions"] > 0
        llm.core.check_integrity()
    for one, other, own in zip(alone, crowded, ids, strict=True):
        assert len(values(one)) == len(own) - 1
        assert values(other) == [pytest.approx(position, abs=1e-3) for position in values(one)]


def test_the_shortest_prompt_has_one_entry() -> None:
    with LLM(**TINY) as llm:
        params = SamplingParams(max_tokens=1, prompt_logprobs=1)
        (output,) = llm.generate({"prompt_token_ids": [5]}, params, use_tqdm=False)
        assert output.prompt_logprobs == [None]


async def test_streams_have_it_from_their_first_output_on() -> None:
    engine = AsyncEngine.from_config(EngineConfig(**TINY, max_num_seqs=8, max_num_batched_tokens=16))
    try:
        ids = [(3 * place) % 900 + 1 for place in range(120)]
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=20)
        outputs = [output async for output in engine.generate({"prompt_token_ids": ids}, params)]
        for output in outputs:
            assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(ids)
    finally:
        engine.shutdown()


@pytest.mark.parametrize("value", [-1, 21, 1.5])
def test_what_cannot_be_asked_for_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^prompt_logprobs"):
        SamplingParams(prompt_logprobs=value)  # type: ignore[arg-type]
