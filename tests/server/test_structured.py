"""Answers under a schema, expression or grammar over HTTP, in all the ways in which clients ask.

The scripted engine draws evenly from the tokens that a mask allows, one a byte; `jsonschema` and
`re` judge what comes out.
"""

import asyncio
import json
import re
import threading
from typing import Any

import jsonschema
import openai
import pytest

from octavo import _core
from tests.server.conftest import Served

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA: dict[str, Any] = {
    "$defs": {"flag": {"type": "boolean"}},
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6, "pattern": "^[a-z]*$"},
        "flags": {"type": "array", "items": {"$ref": "#/$defs/flag"}, "maxItems": 2},
        "size": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 999}, {"type": "null"}]},
    },
    "required": ["name", "flags", "size"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Hi"}]
WRAPPED = {"name": "thing", "schema": SCHEMA, "strict": True}


def valid(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": WRAPPED}},
        {"response_format": {"type": "json_object", "value": SCHEMA}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": {"type": "json", "value": SCHEMA}},
        {"response_format": {"type": "json_schema", "value": {"name": "thing", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}},
        {"guided_json": SCHEMA},
    ],
    ids=["openai", "huggingface_hub", "llama.cpp", "tgi", "tgi-named", "vllm", "vllm-text", "vllm-before"],
)
async def test_every_way_to_ask_for_a_schema(served: Served, fields: dict[str, Any]) -> None:
    status, answer = await served.post(CHAT, {"messages": MESSAGES, "max_tokens": 300, **fields})
    assert status == 200, answer
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert valid(answer["choices"][0]["message"]["content"])
    status, answer = await served.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 300, **fields})
    assert status == 200 and valid(answer["choices"][0]["text"])


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": r"[A-Z]{3}-\d{2}"}}, r"[A-Z]{3}-\d{2}"),
        ({"response_format": {"type": "regex", "value": r"[A-Z]{3}-\d{2}"}}, r"[A-Z]{3}-\d{2}"),
        ({"guided_regex": "x|y"}, "x|y"),
        ({"structured_outputs": {"choice": ["Hello", "no\n"]}}, "Hello|no\n"),
        ({"guided_choice": ["a", "b"]}, "a|b"),
        ({"structured_outputs": {"grammar": 'start: "a" NUMBER\nNUMBER: /[0-9]{2}/'}}, "a[0-9]{2}"),
        ({"guided_grammar": 'root ::= "a" digit\ndigit ::= [0-9]{2}'}, "a[0-9]{2}"),
    ],
    ids=["regex", "tgi-regex", "old-regex", "choice", "old-choice", "lark", "old-gbnf"],
)
async def test_expressions_choices_and_grammars(served: Served, fields: dict[str, Any], pattern: str) -> None:
    body = {"prompt": "Hi", "max_tokens": 20, "n": 4, **fields}
    status, answer = await served.post(COMPLETIONS, body)
    assert status == 200, answer
    for choice in answer["choices"]:
        assert re.fullmatch(pattern, choice["text"]) and choice["finish_reason"] == "stop"


async def test_any_object(served: Served) -> None:
    body = {"messages": MESSAGES, "max_tokens": 400, "n": 8, "response_format": {"type": "json_object"}}
    _, answer = await served.post(CHAT, body)
    ended = [choice for choice in answer["choices"] if choice["finish_reason"] == "stop"]
    assert ended and all(isinstance(json.loads(choice["message"]["content"]), dict) for choice in ended)


async def test_the_official_client_streams_and_parses(served: Served) -> None:
    response_format: Any = {"type": "json_schema", "json_schema": WRAPPED}
    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="org/tiny",
            messages=MESSAGES,  # type: ignore[arg-type]
            max_tokens=300,
            response_format=response_format,
            stream=True,
            logprobs=True,
        )
        chunks = [chunk.choices[0] async for chunk in stream]
        assert valid("".join(chunk.delta.content or "" for chunk in chunks))
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(
                model="org/tiny",
                messages=MESSAGES,  # type: ignore[arg-type]
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"properties": {"a": {"items": {"type": "list"}}}}},
                },
            )
    assert refused.value.param == "response_format.json_schema.schema"
    assert refused.value.code == "invalid_schema"
    assert "at /properties/a/items: Invalid type: list" in str(refused.value)


async def test_stop_rules_hold_beside_a_grammar(served: Served) -> None:
    async def text_and_end(**fields: Any) -> tuple[str, str, Any]:
        status, answer = await served.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 12, **fields})
        assert status == 200, answer
        choice = answer["choices"][0]
        return choice["text"], choice["finish_reason"], choice["stop_reason"]

    letters = {"structured_outputs": {"regex": "Hello [a-z]*"}}
    assert await text_and_end(**letters, stop="lo") == ("Hel", "stop", "lo")
    assert (await text_and_end(**letters, max_tokens=3))[:2] == ("Hel", "length")
    # The script would end after "Hello world"; end tokens may not be drawn.
    text, end, _ = await text_and_end(**letters, ignore_eos=True)
    assert re.fullmatch("Hello [a-z]{6}", text) and end == "length"
    assert (await text_and_end(**letters, min_tokens=12))[1] == "length"
    # Where nothing can follow, an answer is over whatever was asked for.
    full = {"structured_outputs": {"regex": "Hello"}}
    assert await text_and_end(**full, ignore_eos=True) == ("Hello", "stop", None)
    assert await text_and_end(**full, min_tokens=10) == ("Hello", "stop", None)


async def test_a_grammar_that_fails_midway_ends_one_request(served: Served) -> None:
    """It fits the first mask, and grows over the limits when its tail is written."""
    regex = "Hello((((a{0,100}){0,100}){0,100}){0,100})"
    bad = {"prompt": "Hi", "max_tokens": 60, "ignore_eos": True, "structured_outputs": {"regex": regex}}
    good = {"prompt": "Hi", "max_tokens": 300, "structured_outputs": {"json": SCHEMA}}
    (status, failed), *others = await asyncio.gather(
        served.post(COMPLETIONS, bad), *(served.post(COMPLETIONS, good) for _ in range(4))
    )
    assert [status for status, _ in others] == [200] * 4 and all(valid(o["choices"][0]["text"]) for _, o in others)
    assert status == 400 and failed["error"]["code"] == "grammar_error", failed


async def test_compiling_holds_nobody_up_and_is_done_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one schema compiles, others are served; 20 clients who want it wait for one compilation."""
    slow = {
        "type": "object",
        "properties": {f"p{n}": {"type": "string", "pattern": f"^a{n}[b-d]+$"} for n in range(99)},
    }
    asked = asyncio.gather(
        *(served.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 2, "guided_json": slow}) for _ in range(20))
    )
    plain = [await served.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 2}) for _ in range(5)]
    assert [status for status, _ in plain] == [200] * 5
    assert [status for status, _ in await asked] == [200] * 20
    assert served.engine.grammars.stats()["compiled"] == 1
    for pattern, status in (("a", 200), ("(", 400), ("b", 200)):
        assert (await served.post(COMPLETIONS, {"prompt": "Hi", "guided_regex": pattern}))[0] == status


async def test_a_long_schema_holds_no_short_one_up(served: Served) -> None:
    long = {"enum": ["x" * 1000 + str(n) for n in range(30)]}
    held = threading.Event()
    served.engine._long_grammar_pool.submit(held.wait)  # one that takes very long
    asked = asyncio.ensure_future(served.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 2, "guided_json": long}))
    try:
        for schema in ({"type": "integer"}, {"type": "boolean"}):
            status, _ = await served.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 2, "guided_json": schema})
            assert status == 200
        assert not asked.done()
    finally:
        held.set()
    assert (await asked)[0] == 200


def test_a_model_without_a_tokenizer_says_so() -> None:
    from octavo.structured_outputs import StructuredOutputsParams, compile_grammar

    with pytest.raises(ValueError, match="structured_outputs: this model has no tokenizer"):
        compile_grammar(None, StructuredOutputsParams(regex="a"))
    with pytest.raises(ValueError, match="no kind of constraint"):
        _core.GrammarCompiler(_core.Tokenizer.bytes_only(256), 256, []).compile("xml")
