"""The module's surface on a tiny random model: shapes of outputs, errors that name the prompt,
streams that abort.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import LLM, AsyncEngine, EngineConfig, SamplingParams
from octavo._core import KvCapacityError, PromptTooLongError
from octavo.models.presets import PRESETS
from octavo.weights import load
from tests.text.test_special_tokens import CONFIG, write_folder

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
        ({"prompt_token_ids": [1, 1.5]}, ValueError, r"prompts\[1\]: prompt_token_ids\[1\] is 1.5 of type float"),
        ({"prompt_token_ids": [True]}, ValueError, r"prompts\[1\]: prompt_token_ids\[0\] is True of type bool"),
        ({"prompt_token_ids": ["7"]}, ValueError, r"prompts\[1\]: prompt_token_ids\[0\] is '7' of type str"),
        ({"prompt_token_ids": [1, -2]}, ValueError, r"prompts\[1\]: prompt_token_ids\[1\] is -2, .* 0 to 4294967295"),
        ({"prompt_token_ids": [2**64]}, ValueError, r"prompts\[1\]: prompt_token_ids\[0\] is 18446744073709551616"),
        ({"prompt_token_ids": [1 << 9999]}, ValueError, r"prompts\[1\]: prompt_token_ids\[0\] is .* of 10000 bits"),
        ({"prompt_token_ids": "123"}, ValueError, r"prompts\[1\]: prompt_token_ids is of type str"),
        ({"prompt_token_ids": 5}, ValueError, r"prompts\[1\]: prompt_token_ids is of type int"),
    ],
)
def test_a_bad_prompt_is_named_and_the_next_call_works(llm: LLM, prompt: object, error: type, message: str) -> None:
    good = {"prompt_token_ids": [1, 2]}
    with pytest.raises(error, match=message):
        llm.generate([good, prompt], SamplingParams(max_tokens=4), use_tqdm=False)  # type: ignore[list-item]
    assert len(llm.generate(good, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)) == 1


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("seed", 2**64, r"seed is 18446744073709551616, but must be from -2\*\*63 to"),
        ("max_tokens", 1 << 9999, "max_tokens is an integer of 10000 bits"),
        ("n", True, "n is True of type bool, but must be an integer"),
        ("top_k", 1.5, "top_k is 1.5 of type float, but must be an integer"),
        ("logprobs", "5", "logprobs is '5' of type str, but must be an integer"),
        ("min_tokens", None, "min_tokens is None of type NoneType"),
        ("temperature", "hot", "temperature is 'hot' of type str, but must be a number"),
        ("temperature", True, "temperature is True of type bool"),
        ("ignore_eos", 1, "ignore_eos is 1 of type int, but must be True or False"),
        ("stop", 5, "stop is 5 of type int, but must be a string or a list of strings"),
        ("stop", [5], r"stop is \[5\] of type list"),
        ("stop_token_ids", "12", "stop_token_ids is '12' of type str, but must be a list of token ids"),
        ("stop_token_ids", [1, 2.0], r"stop_token_ids\[1\] is 2.0 of type float"),
        ("stop_token_ids", [2**70], r"stop_token_ids\[0\] is 1180591620717411303424, but must be"),
        ("logit_bias", [(1, 2)], r"logit_bias is \[\(1, 2\)\] of type list, but must be a dict"),
        ("logit_bias", {"1": 2.0}, "logit_bias is '1' of type str, but must be an integer"),
        ("logit_bias", {1: "2"}, r"logit_bias\[1\] is '2' of type str, but must be a number"),
    ],
)
def test_a_wrong_type_or_a_huge_integer_is_named(field: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_numbers_of_other_libraries_are_numbers(llm: LLM) -> None:
    numbers = {"n": np.int64(2), "temperature": np.float32(0.5), "seed": np.int32(3)}
    params = SamplingParams(max_tokens=2, **numbers)  # type: ignore[arg-type]
    (output,) = llm.generate({"prompt_token_ids": list(np.array([1, 2]))}, params, use_tqdm=False)
    assert len(output.outputs) == 2


@pytest.mark.parametrize("stop", ["x", ["x", "y"]])
def test_stop_strings_need_text(stop: object) -> None:
    with pytest.raises(ValueError, match=r"^stop is .*x.*, but must be empty with detokenize=False"):
        SamplingParams(detokenize=False, stop=stop)  # type: ignore[arg-type]
    assert SamplingParams(detokenize=False, stop=[]).stop == []


def test_options_that_mean_nothing_here_are_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="max_waiting = 5: not an option of LLM"):
        LLM(**TINY, max_waiting=5)
    with pytest.raises(ValueError, match=r"sampling_params\[1\]: expected SamplingParams, got dict"):
        llm.generate([{"prompt_token_ids": [1]}] * 2, [SamplingParams(), {"n": 1}], use_tqdm=False)  # type: ignore[list-item]


def test_memory_that_holds_no_request_is_said_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"max_model_len = 128.*--kv-cache-memory"):
        LLM(**TINY, kv_cache_memory=40_000)
    with pytest.raises(ValueError, match=rf"kv_cache_memory = {2**50} bytes: this machine has \d+ .*--kv-cache-memory"):
        LLM(**TINY, kv_cache_memory=2**50)
    fitted = LLM(**(TINY | {"max_model_len": -1}), kv_cache_memory=400_000)
    longest = fitted._engine.parts.max_model_len
    assert 16 < longest < 4096
    with pytest.raises((PromptTooLongError, KvCapacityError)):
        fitted.generate({"prompt_token_ids": [1] * longest}, SamplingParams(max_tokens=1), use_tqdm=False)


def test_a_preset_may_be_longer_than_its_model_was_trained_for() -> None:
    """It has no weights: benchmarks ask for shapes."""
    with LLM(**(TINY | {"max_model_len": 5000}), kv_cache_memory=4_000_000) as llm:
        assert llm._engine.parts.max_model_len == 5000
        assert llm._engine.parts.runner.model.config.max_position_embeddings == 5000


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"max_model_len": 5000}, {}, "max_model_len = 5000: must be at most the model's max_position_embeddings = 64"),
        ({"kv_cache_dtype": "int4"}, {"head_dim": 6}, "kv_cache_dtype = int4: needs heads of a multiple of 4"),
    ],
    ids=["length", "pages"],
)
def test_what_the_model_cannot_do_is_said_before_its_weights_are_read(
    options: Any, shape: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PRESETS["tiny"] | {"max_position_embeddings": 64} | shape
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(load, "fill_with_random", None)
    with pytest.raises(ValueError, match=message):
        LLM(**(TINY | {"model": str(tmp_path), "max_model_len": None} | options))


def test_a_whole_prompt_is_one_step_without_chunked_prefill() -> None:
    llm = LLM(**(TINY | {"max_model_len": None}), enable_chunked_prefill=False)
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": [1] * 600}], params, use_tqdm=False)  # a CPU's step holds 512 tokens
    assert len(output.outputs[0].token_ids) == 1


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
        for _ in range(6_000):  # two minutes; a busy machine may need some of them
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
    assert "temperature 0.0" in "\n".join(llm._engine.parts.report.lines())
    greedy = SamplingParams(max_tokens=100, temperature=0.0), SamplingParams(max_tokens=8, temperature=0.0)
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy, use_tqdm=False)]
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, use_tqdm=False)] == expected


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A model whose tokenizer makes letters, with a template that shows roles and contents."""
    folder = write_folder(tmp_path_factory.mktemp("talker") / "text", {CONFIG: {"eos_token": "</s>"}})
    template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{{ m.extra }}{% endfor %}"
    with LLM(**TINY, tokenizer=str(folder), chat_template=template) as engine:
        yield engine


def said(llm: LLM, messages: Any, **options: Any) -> list[str]:
    """The prompts that conversations become."""
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    outputs = llm.chat(messages, SamplingParams(max_tokens=1), use_tqdm=False, **options)
    return [tokenizer.decode(output.prompt_token_ids, False) for output in outputs]


def test_chat_reads_messages_as_the_server_does(talker: LLM) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert said(talker, [{"role": "developer", "content": parts}]) == ["sa\nb"]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "extra": "x"}]
    assert said(talker, [turns, turns[:1]]) == ["uhiax", "uhi"]
    assert said(talker, turns, tools=[]) == ["uhiax"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "^messages: must not be empty"),
        ([[]], "^conversation 0: messages: must not be empty"),
        ([{"role": "king", "content": "x"}], r"^messages\[0\].role: must be one of"),
        ([{"role": "user"}], r"^messages\[0\].content: required"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\].content\[0\].type: only text parts"),
        ([[{"role": "user", "content": "x"}], [{"role": "user", "content": 5}]], r"^conversation 1: .*content"),
        (["x"], "^conversation 0: messages or tools: "),
    ],
)
def test_chat_makes_the_servers_checks(talker: LLM, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        talker.chat(messages, use_tqdm=False)


def test_chat_refuses_tools_that_the_template_does_not_take(talker: LLM) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(ValueError, match="tools: the model's chat template has no place for them"):
        talker.chat([{"role": "user", "content": "x"}], use_tqdm=False, tools=[tool])
