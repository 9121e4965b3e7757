"""Answers of real models under schemas, expressions and grammars, judged by `jsonschema` and `re`."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from octavo import LLM, AsyncEngine, SamplingParams, StructuredOutputsParams
from octavo.structured_outputs import one_of

ROUNDS = int(os.environ.get("OCTAVO_TEST_ROUNDS", "1"))
CHOICES = 50
"""Answers a round under each schema; four are 200 in all."""

SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": -9, "maximum": 99}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    },
    "referring": {
        "$defs": {"colour": {"enum": ["red", "green", "blue"]}},
        "type": "array",
        "items": {"$ref": "#/$defs/colour"},
        "minItems": 1,
        "maxItems": 3,
    },
    "union": {
        "anyOf": [
            {"type": "string", "maxLength": 12},
            {"type": "null"},
            {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": False},
        ],
    },
    "text": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}( [0-9]{1,3})?$"},
}


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(smollm2_path, max_model_len=256, max_num_seqs=64, kv_cache_memory=256 * 2**20) as engine:
        yield engine
        engine.core.check_integrity()
        assert engine.core.stats()["kv_blocks_used"] == 0


def answers(llm: LLM, wanted: StructuredOutputsParams, **params: Any) -> list[tuple[str, str | None]]:
    fields = {"temperature": 1.5, "max_tokens": 48, "seed": 5, "structured_outputs": wanted, **params}
    (output,) = llm.generate("Here is the data:", SamplingParams(**fields), use_tqdm=False)
    assert output.error is None
    return [(choice.text, choice.finish_reason) for choice in output.outputs]


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_all_that_stop_are_valid_at_a_high_temperature(llm: LLM, name: str) -> None:
    wanted = StructuredOutputsParams(json=SCHEMAS[name])
    made = [answer for seed in range(ROUNDS) for answer in answers(llm, wanted, n=CHOICES, seed=1000 * seed)]
    stopped = [text for text, reason in made if reason == "stop"]
    assert len(stopped) > 0.6 * len(made)
    for text in stopped:
        jsonschema.validate(json.loads(text), SCHEMAS[name])
    assert len(set(stopped)) > 2  # the model chooses


def test_other_kinds(llm: LLM) -> None:
    for text, reason in answers(llm, StructuredOutputsParams(regex=r"[a-z]{3}-\d{2,4}"), n=8):
        assert reason == "stop" and re.fullmatch(r"[a-z]{3}-\d{2,4}", text)
    assert {text for text, _ in answers(llm, StructuredOutputsParams(choice=["été", "no\n"]), n=16)} <= {"été", "no\n"}
    gbnf = 'root ::= "(" root ")" | [0-9]{2}'
    for text, reason in answers(llm, StructuredOutputsParams(grammar=gbnf), n=8, temperature=0.8):
        assert reason == "length" or (re.fullmatch(r"\(*\d\d\)*", text) and text.count("(") == text.count(")"))


def test_calls_of_tools_between_literal_texts(llm: LLM) -> None:
    def call(name: str, schema: dict[str, Any]) -> list[Any]:
        return [f'<tool_call>\n{{"name": "{name}", "arguments": ', schema, "}\n</tool_call>"]

    tools = {
        "flag": SCHEMAS["flat"],
        "colours": {
            "type": "object",
            "properties": {"c": SCHEMAS["referring"]["$defs"]["colour"]},
            "required": ["c"],
            "additionalProperties": False,
        },
    }
    wanted = one_of([call(name, schema) for name, schema in tools.items()])
    for text, reason in answers(llm, wanted, n=6, max_tokens=64):
        assert reason == "stop"
        called = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        jsonschema.validate(called["arguments"], tools[called["name"]])


def test_a_greedy_answer_is_the_likeliest_allowed_one(llm: LLM) -> None:
    """Against the engine itself without a grammar: where it would write what is allowed anyway, the
    grammar changes nothing, and log probabilities are the model's own.
    """
    free = SamplingParams(temperature=0.0, max_tokens=8, logprobs=1)
    bound = SamplingParams(
        temperature=0.0, max_tokens=8, logprobs=1, structured_outputs=StructuredOutputsParams(regex="(?s:.*)")
    )
    prompts = ["The capital of France is", "1, 2, 3, 4,"]
    for left, right in zip(
        llm.generate(prompts, free, use_tqdm=False), llm.generate(prompts, bound, use_tqdm=False), strict=True
    ):
        assert left.outputs[0].text == right.outputs[0].text
        assert left.outputs[0].cumulative_logprob == pytest.approx(right.outputs[0].cumulative_logprob, abs=0.1)


TINY = {"model": "tiny", "load_format": "dummy", "dtype": "float32", "device": "cpu", "max_model_len": 128}


def test_what_cannot_be_compiled_says_which_prompt_and_where(llm: LLM) -> None:
    bad = StructuredOutputsParams(json={"properties": {"a": {"anyOf": [{}, {"type": "list"}]}}})
    good = SamplingParams(max_tokens=1)
    with pytest.raises(ValueError, match=r"prompts\[1\]: structured_outputs.json at /properties/a/anyOf/1: .*list"):
        llm.generate(["a", "b"], [good, SamplingParams(structured_outputs=bad)], use_tqdm=False)
    for fields, message in (
        ({}, "has nothing"),
        ({"regex": "a", "choice": ["a"]}, "regex and choice"),
        ({"regex": 5}, "regex is a int"),
        ({"choice": "ab"}, "must be a list of texts"),
    ):
        with pytest.raises(ValueError, match=message):
            StructuredOutputsParams(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"structured_outputs\.json is not JSON"):
        answers(llm, StructuredOutputsParams(json={"a": {1, 2}}))
    with pytest.raises(ValueError, match="must be compiled"):
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")).to_core()


def test_async_engine_takes_them_too(tmp_path: Path) -> None:
    from octavo import EngineConfig
    from tests.text.test_special_tokens import CONFIG, write_folder

    folder = write_folder(tmp_path / "text", {CONFIG: {"eos_token": "</s>"}})
    engine = AsyncEngine.from_config(EngineConfig(**TINY, tokenizer=str(folder)))

    async def last() -> str:
        params = SamplingParams(max_tokens=20, structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
        async for output in engine.generate({"prompt_token_ids": [1]}, params):
            text = output.outputs[0].text
        with pytest.raises(ValueError, match=r"structured_outputs\.regex"):
            params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
            await anext(engine.generate({"prompt_token_ids": [1]}, params))
        return text

    try:
        assert asyncio.run(last()) in ("yes", "no")
    finally:
        engine.shutdown()
