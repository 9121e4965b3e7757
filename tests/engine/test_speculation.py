"""Speculative decoding through the engine: the answers are those without it, token for token.

The tiny model has random weights, so its text soon repeats itself and drafts are accepted; where
they are not, the core's simulation has every rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.outputs import RequestOutput

OPTIONS: dict[str, Any] = {"model": "tiny", "load_format": "dummy", "dtype": "float32", "device": "cpu"}
OPTIONS |= {"max_model_len": 160, "max_num_seqs": 6, "kv_cache_memory": 16 << 20}
PROMPTS = [{"prompt_token_ids": ids} for ids in ([5, 6, 7], [9, 9, 9, 9, 9], list(range(30, 60)) * 2)]

CASES = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.3, "seed": 3},
    "filters": {"temperature": 0.8, "top_k": 3, "top_p": 0.9, "min_p": 0.05, "seed": 5},
    "penalties": {"temperature": 0.0, "presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    "bias": {"temperature": 0.2, "seed": 1, "logit_bias": {7: 5.0, 8: 5.0}},
    "logprobs": {"temperature": 0.0, "logprobs": 3},
    "choices": {"temperature": 0.5, "seed": 2, "n": 2},
    "early": {"temperature": 0.0, "max_tokens": 5},
    "stopped": {"temperature": 0.0, "logit_bias": {7: 30.0, 8: 29.9}, "stop_token_ids": [8], "min_tokens": 9},
}


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    with LLM(**OPTIONS) as llm:
        yield llm


METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"prompt_lookup_min": 1, "prompt_lookup_max": 4},
    "suffix": {"prompt_lookup_min": 1, "prompt_lookup_max": 4},
    "draft_model": {"model": "tiny", "quantization": "int4"},
    "self": {},
}


@pytest.fixture(scope="module", params=METHODS)
def drafting(request: pytest.FixtureRequest) -> Iterator[LLM]:
    speculation = {"method": request.param, "num_speculative_tokens": 5, "adaptive": False}
    with LLM(**OPTIONS, speculative_config=speculation | METHODS[request.param]) as llm:
        yield llm


def answers(llm: LLM, case: dict[str, Any]) -> list[RequestOutput]:
    params = SamplingParams(**{"max_tokens": 60, "ignore_eos": True, "detokenize": False} | case)
    return llm.generate(PROMPTS, params, use_tqdm=False)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_answers_are_those_without_drafts(plain: LLM, drafting: LLM, case: dict[str, Any]) -> None:
    before = drafting._engine.core.stats()
    for expected, answer in zip(answers(plain, case), answers(drafting, case), strict=True):
        for wanted, got in zip(expected.outputs, answer.outputs, strict=True):
            assert got.token_ids == wanted.token_ids
            assert (got.finish_reason, got.stop_reason) == (wanted.finish_reason, wanted.stop_reason)
            for here, there in zip(got.logprobs or [], wanted.logprobs or [], strict=True):
                assert list(here) == list(there)
                assert [entry.logprob for entry in here.values()] == pytest.approx(
                    [entry.logprob for entry in there.values()], abs=1e-4
                )
    after = drafting._engine.core.stats()
    assert after["spec_decode_num_draft_tokens"] > before["spec_decode_num_draft_tokens"]


def test_drafts_save_steps_and_are_counted(plain: LLM, drafting: LLM) -> None:
    steps = {}
    for llm in (plain, drafting):
        before = llm._engine.core.stats()
        answers(llm, CASES["greedy"])
        after = llm._engine.core.stats()
        steps[llm] = after["steps"] - before["steps"]
    gained = after["spec_decode_num_accepted_tokens"] - before["spec_decode_num_accepted_tokens"]
    assert steps[drafting] < 0.9 * steps[plain]
    assert gained >= 3 * (steps[plain] - steps[drafting]) * 0.5
    by_position = drafting._engine.core.accepted_per_position()
    assert len(by_position) == 5 and by_position == sorted(by_position, reverse=True)
    assert sum(by_position) == after["spec_decode_num_accepted_tokens"]
    assert plain._engine.core.accepted_per_position() == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens = 0"),
        ({"method": "ngram", "num_speculative_tokens": 100}, "num_speculative_tokens = 100: must be an integer from 1"),
        ({"method": "ngarm"}, "method = 'ngarm': must be one of ngram, suffix, draft_model, self"),
        ({"num_speculative_tokens": 3}, "method is missing"),
        ({"method": "eagle3", "model": "x"}, "method = 'eagle3'"),
        ({"method": "draft_model"}, "model = None"),
        ({"method": "draft_model", "model": 7}, "model = 7"),
        ({"method": "draft_model", "model": "x", "num_speculative_tokens": 0}, "num_speculative_tokens = 0"),
        ({"method": "draft_model", "model": "x", "num_speculative_tokens": 100}, "num_speculative_tokens = 100"),
        ({"method": "draft_model", "model": "x", "quantization": "int3"}, "quantization = 'int3'"),
        ({"method": "self", "model": "x"}, "model = 'x': method = 'self' needs no model"),
        ({"method": "self", "quantization": "gptq"}, "quantization = 'gptq': must be one of fp8, int8, int4"),
        ({"method": "ngram", "quantization": "int4"}, "quantization = 'int4'"),
        ({"method": "ngram", "model": "some/draft"}, "model = 'some/draft'"),
        ({"method": "ngram", "prompt_lookup_mx": 3}, "did you mean prompt_lookup_max"),
        ({"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 4}, "prompt_lookup_max = 4"),
        ({"method": "suffix", "suffix_decoding_min_token_prob": 2}, "suffix_decoding_min_token_prob = 2"),
        ({"method": "ngram", "adaptive": "yes"}, "adaptive = 'yes'"),
        ("{'method': 'ngram'}", "is not JSON"),
        ("[]", "must be an object"),
    ],
)
def test_a_bad_configuration_names_its_key(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match="speculative_config") as error:
        EngineConfig(speculative_config=given)
    assert words in str(error.value)


def test_short_forms_and_one_of_two_lengths() -> None:
    assert EngineConfig(spec_method="suffix", spec_tokens=4).num_draft_tokens == 4
    config = EngineConfig(speculative_config='{"method": "ngram", "prompt_lookup_max": 4}').speculation
    assert config is not None and (config.prompt_lookup_min, config.prompt_lookup_max) == (4, 4)
    with pytest.raises(ValueError, match="spec_tokens = 3: needs spec_method"):
        EngineConfig(spec_tokens=3)
    config = EngineConfig(spec_model="some/draft", spec_tokens=2).speculation
    assert config is not None and (config.method, config.model, config.num_speculative_tokens) == (
        "draft_model",
        "some/draft",
        2,
    )
    with pytest.raises(ValueError, match="spec_method = 'ngram': speculative_config says it already"):
        EngineConfig(spec_method="ngram", speculative_config={"method": "suffix"})
