"""What `generation_config.json` says: every key of transformers' `GenerationConfig` is known, and
what is not honoured is named.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from octavo.config import GENERATION_AUTO, GENERATION_NEUTRAL
from octavo.model_config import ModelError
from octavo.models.presets import PRESETS, preset_config
from octavo.sampling_params import SamplingParams
from octavo.weights.generation_config import HARMLESS, HONOURED, NEUTRAL, read_generation

MODEL = dataclasses.replace(preset_config(sorted(PRESETS)[0]), vocab_size=1000, eos_token_ids=(2,))


def read(folder: Path, values: dict[str, Any], wanted: str = GENERATION_AUTO) -> dict[str, Any]:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return read_generation(MODEL, wanted, folder)[1]


def test_every_key_of_transformers_is_known() -> None:
    keys = {key for key in vars(GenerationConfig()) if not key.startswith("_")}
    assert len(keys) > 50
    assert keys - HONOURED - HARMLESS - NEUTRAL.keys() == set()
    assert not HONOURED & HARMLESS and not (HONOURED | HARMLESS) & NEUTRAL.keys()


def test_the_defaults_of_transformers_warn_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    GenerationConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    neutral = GenerationConfig._get_default_generation_params()
    with caplog.at_level(logging.WARNING):
        read(tmp_path, {**neutral, **written, "max_length": 2**31})
    assert not caplog.records


@pytest.mark.parametrize(
    ("values", "defaults"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.6}),
        ({"temperature": 0.6, "top_k": None}, {"temperature": 0.6}),
        ({"min_new_tokens": 3, "max_new_tokens": 9}, {"min_tokens": 3, "max_tokens": 9}),
        ({"stop_strings": "\n\n"}, {"stop": ["\n\n"]}),
        ({"stop_strings": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop_strings": [], "suppress_tokens": []}, {}),
        ({"suppress_tokens": [5, 7, 1000]}, {"logit_bias": {5: -100.0, 7: -100.0}}),
        ({"bad_words_ids": [[5], [2], [7]]}, {"logit_bias": {5: -100.0, 7: -100.0}}),
        ({"suppress_tokens": [2], "bad_words_ids": [[5]]}, {"logit_bias": {2: -100.0, 5: -100.0}}),
    ],
)
def test_honoured(
    tmp_path: Path, values: dict[str, Any], defaults: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, values) == defaults
        assert read(tmp_path, values, GENERATION_NEUTRAL) == {}
    assert not caplog.records
    SamplingParams(**defaults)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("no_repeat_ngram_size", 3),
        ("bad_words_ids", [[5, 6]]),
        ("begin_suppress_tokens", [1]),
        ("forced_bos_token_id", 1),
        ("num_beams", 4),
        ("typical_p", 0.9),
        ("penalty_alpha", 0.6),
        ("sequence_bias", [[[1], 2.0]]),
        ("max_length", 20),
        ("min_length", 5),
        ("cache_implementation", "quantized"),
        ("guidance_scale", 1.5),
        ("brand_new_key", 1),
    ],
)
def test_what_is_not_honoured_is_named(tmp_path: Path, key: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, {key: value}) == {}
    assert [f"generation_config.json: {key} = {value!r}" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_sample": "no"}, "do_sample: 'no' is not true or false"),
        ({"min_new_tokens": -1}, "min_new_tokens = -1 cannot be a default"),
        ({"stop_strings": [1]}, "stop_strings: .* a list of strings"),
        ({"stop_strings": ["x" * 100_000]}, "stop_strings = .* cannot be a default"),
        ({"suppress_tokens": [True]}, "suppress_tokens: .* a list of token ids"),
        ({"suppress_tokens": [-1]}, "suppress_tokens: .* a list of token ids"),
        ({"bad_words_ids": [5]}, "bad_words_ids: .* a list of lists"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty = 1e-38 cannot be a default"),
    ],
)
def test_bad_values_name_file_and_key(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        read(tmp_path, values)
    assert str(tmp_path) in str(refused.value) and len(str(refused.value)) < 2048


def test_a_request_goes_before_the_defaults() -> None:
    defaults = {"stop": ["a"], "logit_bias": {5: -100.0, 7: -100.0}, "min_tokens": 10, "max_tokens": 20}

    def params(**given: Any) -> tuple[Any, ...]:
        made = SamplingParams.with_defaults(defaults, given)
        return made.stop, made.logit_bias, made.min_tokens, made.max_tokens

    assert params() == (["a"], {5: -100.0, 7: -100.0}, 10, 20)
    assert params(stop=["b"], logit_bias={7: 1.0, 8: 2.0}) == (["b"], {5: -100.0, 7: 1.0, 8: 2.0}, 10, 20)
    short = SamplingParams.with_defaults({"min_tokens": 20}, {})
    assert (short.min_tokens, short.max_tokens) == (20, 20)
    assert params(max_tokens=4)[2:] == (4, 4)
    assert params(min_tokens=30)[2:] == (30, 30)
    with pytest.raises(ValueError, match="min_tokens is 30, but must be at most max_tokens = 4"):
        params(min_tokens=30, max_tokens=4)
