"""The module's surface on a tiny random model: shapes of outputs, errors that name the prompt, streams that abort."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo import LLM, AsyncEngine, EngineConfig, SamplingParams
from octavo._core import KvCapacityError, PromptTooLongError

TINY = {"model": "tiny", "load_format": "dummy", "dtype": "float32", "device": "cpu", "max_model_len": 128}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    engine = LLM(**TINY, max_num_seqs=8, max_num_batched_tokens=64)
    yield engine
    engine.core.check_integrity()
    assert engine.core.stats()["kv_blocks_used"] == 0


def test_outputs_have_vllms_shape(llm: LLM) -> None:
    params = SamplingParams(n=2, temperature=0.7, seed=3, max_tokens=6, ignore_eos=True, logprobs=2)
    (output,) = llm.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)
    assert output.prompt is None and output.prompt_token_ids == [5, 6, 7] and output.finished
    assert [choice.index for choice in output.outputs] == [0, 1]
    for choice in output.outputs:
        assert len(choice.token_ids) == 6 and choice.finish_reason == "length" and choice.logprobs is not None
        for token, position in zip(choice.token_ids, choice.logprobs, strict=True):
            assert token in position and 2 <= len(position) <= 3
            assert sorted(entry.rank for entry in position.values())[:2] == [1, 2]
        total = sum(position[token].logprob for token, position in zip(choice.token_ids, choice.logprobs, strict=True))
        assert choice.cumulative_logprob == pytest.approx(total)
    assert output.metrics is not None and output.metrics.first_token_time >= output.metrics.arrival_time


def test_one_params_for_each_prompt(llm: LLM) -> None:
    prompts = [{"prompt_token_ids": [n + 1]} for n in range(12)]
    params = [SamplingParams(temperature=0.0, max_tokens=n + 1, ignore_eos=True) for n in range(12)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 13))
    with pytest.raises(ValueError, match="sampling_params: 2 given for 12 prompts"):
        llm.generate(prompts, params[:2], use_tqdm=False)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ({"prompt_token_ids": []}, ValueError, r"prompts\[1\]: prompt has 0 tokens"),
        ({"prompt_token_ids": [10**6]}, ValueError, r"prompts\[1\]: .*1000000"),
        ({"prompt_token_ids": list(range(1, 128))}, PromptTooLongError, r"prompts\[1\]: .*max_model_len = 128"),
        ("text", ValueError, r"prompts\[1\]: .*no tokenizer"),
        (5, ValueError, r"prompts\[1\]: prompt: expected text"),
    ],
)
def test_a_bad_prompt_is_named_and_the_next_call_works(llm: LLM, prompt: object, error: type, message: str) -> None:
    good = {"prompt_token_ids": [1, 2]}
    with pytest.raises(error, match=message):
        llm.generate([good, prompt], SamplingParams(max_tokens=4), use_tqdm=False)  # type: ignore[list-item]
    assert len(llm.generate(good, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)) == 1


def test_memory_that_holds_no_request_is_said_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"max_model_len = 128.*--kv-cache-memory"):
        LLM(**TINY, kv_cache_memory=40_000)
    fitted = LLM(**(TINY | {"max_model_len": -1}), kv_cache_memory=400_000)
    longest = fitted._engine.max_model_len
    assert 16 < longest < 4096
    with pytest.raises((PromptTooLongError, KvCapacityError)):
        fitted.generate({"prompt_token_ids": [1] * longest}, SamplingParams(max_tokens=1), use_tqdm=False)


async def test_a_dropped_iterator_frees_its_blocks() -> None:
    engine = AsyncEngine.from_config(EngineConfig(**TINY, enable_prefix_caching=False))
    try:
        seen = 0
        stream = engine.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=120, ignore_eos=True))
        async for output in stream:
            seen = len(output.outputs[0].token_ids)
            if seen >= 3:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        assert seen >= 3
        for _ in range(100):
            stats = engine.stats()
            if not stats["num_requests_running"] and not stats["kv_blocks_used"] and not stats["kv_blocks_held"]:
                break
            await asyncio.sleep(0.02)
        assert stats["finished_abort"] == 1 and stats["kv_blocks_used"] == 0
        whole = [output async for output in engine.generate({"prompt_token_ids": [4]}, SamplingParams(max_tokens=5))]
        assert whole[-1].finished
    finally:
        engine.shutdown()


def test_the_models_defaults_are_used_without_params(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 100, "temperature": 0.0, "eos_token_id": 1}')
    llm = LLM(**TINY, generation_config=str(tmp_path))
    assert llm.get_default_sampling_params() == SamplingParams(max_tokens=100, temperature=0.0)
    prompts = [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [7] * 120}]
    assert "temperature 0.0" in "\n".join(llm._engine.report.lines())
    greedy = SamplingParams(max_tokens=100, temperature=0.0), SamplingParams(max_tokens=8, temperature=0.0)
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy, use_tqdm=False)]
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, use_tqdm=False)] == expected
