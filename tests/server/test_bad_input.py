"""One row is one bad (or odd but good) request, with the status, code and param that it must get.

After each row a plain request works.

The letters are groups: B JSON, C types and nulls, D sampling, E prompts, F messages and tools, H
streaming.
"""

import asyncio
import gc
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from octavo.server.config import ServerConfig
from tests.server.conftest import Served, serving
from tests.server.scripted_engine import ScriptedEngine
from tests.server.test_errors import documented

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
DEEP = b"[" * 200_000
DOCUMENTED = documented()
ANY = object()  # the row does not say which


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Hi", **fields}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages) or [USER], **fields}


def raw(fields: bytes, prompt: bytes = b'"Hi"') -> bytes:
    """A completion body written by hand."""
    return b'{"prompt": ' + prompt + b", " + fields + b"}"


def tool(name: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


# (name, route, body or what makes it, status, code, param)
Row = tuple[str, str, Any, int, Any, Any]

JSON_ROWS: list[Row] = [
    ("B1 empty", COMPLETIONS, b"", 400, "json_invalid", None),
    ("B1 spaces", COMPLETIONS, b"   ", 400, "json_invalid", None),
    *(
        (f"B2 {body!r}", COMPLETIONS, body, 400, "json_invalid", None)
        for body in (
            b"{",
            b'{"prompt": "Hi",}',
            b'{"prompt": "Hi"} x',
            b'{"prompt": "Hi"}{}',
            b"{'prompt': 'Hi'}",
            b"{}//",
        )
    ),
    *((f"B3 {body!r}", COMPLETIONS, body, 400, "invalid_type", None) for body in (b"[]", b'"x"', b"null", b"1")),
    ("B4 invalid utf-8", COMPLETIONS, b'{"prompt": "\xff"}', 400, "json_invalid", None),
    ("B4 overlong utf-8", COMPLETIONS, b'{"prompt": "\xc0\xaf"}', 400, "json_invalid", None),
    ("B4 invalid utf-8 in an ignored field", COMPLETIONS, raw(b'"metadata": "\xff"'), 400, "json_invalid", None),
    ("B4 overlong utf-8 in a key", COMPLETIONS, raw(b'"\xc0\xaf": 1'), 400, "json_invalid", None),
    ("B5 utf-16", COMPLETIONS, '{"prompt": "Hi"}'.encode("utf-16"), 400, "json_invalid", None),
    ("B5 byte order mark", COMPLETIONS, b"\xef\xbb\xbf" + b'{"prompt": "Hi"}', 400, "json_invalid", None),
    ("B6 surrogate in prompt", COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "json_invalid", None),
    ("B6 surrogate in key", COMPLETIONS, raw(b'"\\ud800": 1'), 400, "json_invalid", None),
    (
        "B6 surrogate in tool name",
        CHAT,
        json.dumps(chat(tools=[tool("NAME")])).replace("NAME", "\\ud800").encode(),
        400,
        "json_invalid",
        None,
    ),
    *(
        (f"B7 {word!r}", COMPLETIONS, raw(b'"temperature": ' + word), 400, ANY, ANY)
        for word in (b"NaN", b"Infinity", b"-Infinity", b"1e400")
    ),
    ("B8 control character", COMPLETIONS, b'{"prompt": "a\x01b"}', 400, "json_invalid", None),
    ("B9 escaped NUL", COMPLETIONS, b'{"prompt": "a\\u0000b"}', 200, None, None),
    ("B10 deep", COMPLETIONS, DEEP, 400, "json_too_deep", None),
    ("B10 deep unknown field", COMPLETIONS, raw(b'"foo": ' + DEEP), 400, "json_too_deep", None),
    ("B10 deep metadata", CHAT, b'{"messages": [], "metadata": ' + DEEP, 400, "json_too_deep", None),
    (
        "B10 deep tool schema",
        CHAT,
        json.dumps(chat(tools=[tool("f", parameters="SCHEMA")]))
        .replace('"SCHEMA"', '{"a":' * 100 + "1" + "}" * 100)
        .encode(),
        400,
        "json_too_deep",
        None,
    ),
    ("B10 brackets inside strings", COMPLETIONS, completion(prompt='\\"' + "[" * 200), 200, None, None),
    ("B10 depth 64", COMPLETIONS, raw(b'"metadata": ' + b"[" * 63 + b"]" * 63), 200, None, None),
    ("B10 depth 65", COMPLETIONS, raw(b'"foo": ' + b"[" * 64 + b"]" * 64), 400, "json_too_deep", None),
    (
        "B11 many keys",
        COMPLETIONS,
        lambda: raw(b", ".join(b'"k%d": 1' % i for i in range(1_000_000))),
        400,
        "too_many_values",
        None,
    ),
    (
        "B11 many keys in a tool",
        CHAT,
        chat(tools=[tool("f", parameters=dict.fromkeys(map(str, range(70_000)), 1))]),
        400,
        "too_many_values",
        "tools",
    ),
    ("B11 many messages", CHAT, {"messages": [USER] * 20_000}, 400, "too_many_values", "messages"),
    (
        "B11 many values in an ignored field",
        COMPLETIONS,
        raw(b'"foo": [' + b"0," * 70_000 + b"0]"),
        400,
        "too_many_values",
        "foo",
    ),
    ("B12 duplicate key: the last one counts", COMPLETIONS, raw(b'"n": 1, "n": 1000000'), 400, "invalid_value", "n"),
    ("B12 two prompts: the last one counts", COMPLETIONS, raw(b'"prompt": [299], "prompt": "Hi"'), 200, None, None),
    (
        "B12 two prompts: both are checked",
        COMPLETIONS,
        raw(b'"prompt": [299 1], "prompt": "Hi"'),
        400,
        "json_invalid",
        None,
    ),
    ("B13 5000 digits", COMPLETIONS, raw(b'"max_tokens": ' + b"9" * 5000), 400, ANY, ANY),
]

TYPE_ROWS: list[Row] = [
    *(
        (f"C2 max_tokens {value!r}", COMPLETIONS, completion(max_tokens=value), 400, "invalid_type", "max_tokens")
        for value in ("5", 5.0, True, [5])
    ),
    *(
        (f"C3 stream {value!r}", COMPLETIONS, completion(stream=value), 400, "invalid_type", "stream")
        for value in ("yes", 1)
    ),
    ("C4 unknown field", COMPLETIONS, completion(foo=1), 400, "unknown_parameter", "foo"),
    ("C4 unknown field of a chat", CHAT, chat(foo=1), 400, "unknown_parameter", "foo"),
    ("C4 unknown field that is null", COMPLETIONS, completion(foo=None), 400, "unknown_parameter", "foo"),
    *(
        (f"C4 unknown field of {name}", path, {**body, name: {"foo": 1}}, 400, "unknown_parameter", f"{name}.foo")
        for path, body, names in (
            (COMPLETIONS, completion(stream=True), ("stream_options",)),
            (CHAT, chat(stream=True), ("stream_options",)),
            ("/v1/responses", {"input": "Hi", "stream": True}, ("stream_options", "text", "reasoning")),
        )
        for name in names
    ),
    ("C6 no prompt", COMPLETIONS, {"max_tokens": 1}, 400, "missing_required_parameter", "prompt"),
    ("C6 no messages", CHAT, {"max_tokens": 1}, 400, "missing_required_parameter", "messages"),
    ("C7 both", COMPLETIONS, completion(messages=[USER]), 400, "unknown_parameter", "messages"),
    ("C7 both on chat", CHAT, chat(prompt="Hi"), 400, "unknown_parameter", "prompt"),
    ("C9 large user", COMPLETIONS, completion(user="x" * 10_000_000), 400, "invalid_value", "user"),
    ("C9 large suffix", COMPLETIONS, completion(suffix="x" * 10_000_000), 400, ANY, "suffix"),
    ("C9 large metadata", COMPLETIONS, completion(metadata={"a": "x" * 10_000_000}), 400, "invalid_value", "metadata"),
    ("C10 no model", COMPLETIONS, completion(), 200, None, None),
    ("C11 model is a number", COMPLETIONS, completion(model=5), 400, "invalid_type", "model"),
    ("C11 long model", COMPLETIONS, completion(model="m" * 1_000_000), 400, "invalid_value", "model"),
    ("C12 other model", COMPLETIONS, completion(model="other"), 404, "model_not_found", "model"),
    ("C12 other model on chat", CHAT, chat(model="m" * 5000), 404, "model_not_found", "model"),
    ("C12 dummy", CHAT, chat(model="dummy"), 200, None, None),
    ("C12 tgi", CHAT, chat(model="tgi"), 200, None, None),
]


def sampling(name: str, value: Any, status: int = 400, code: Any = "invalid_value", **others: Any) -> Row:
    shown = repr(value) if len(repr(value)) < 40 else repr(value)[:40]
    return (
        f"D {name} {shown}",
        COMPLETIONS,
        completion(**{name: value}, **others),
        status,
        code,
        name if code else None,
    )


SAMPLING_ROWS: list[Row] = [
    *(sampling("temperature", value) for value in (-0.1, 2.1)),
    *(sampling("temperature", value, 200, None) for value in (1e-45, 1e-9, 0, 2)),
    *(sampling("top_p", value) for value in (0, -1, 1.1)),
    *(sampling("top_k", value) for value in (-2, 2**31)),
    *(sampling("top_k", value, 200, None) for value in (-1, 0, 10**9)),
    *(sampling("min_p", value) for value in (-0.1, 1.1)),
    *(sampling("n", value) for value in (0, -1, 129, 10**6)),
    sampling("n", 2**63, code=ANY),
    sampling("best_of", 2, 200, None),
    sampling("best_of", 2, 200, None, n=2),
    *(sampling("best_of", value) for value in (0, -1, 129, 10**9)),
    sampling("best_of", 1, n=2),
    sampling("best_of", 2, stream=True),
    sampling("best_of", 2**63, code=ANY),
    ("D7 on chat", CHAT, chat(best_of=2), 400, "unsupported_parameter", "best_of"),
    ("D7 times prompts", COMPLETIONS, completion(prompt=["a"] * 1024, best_of=2), 400, "invalid_value", "best_of"),
    ("D8 n times prompts", COMPLETIONS, completion(prompt=["a"] * 1024, n=128), 400, "invalid_value", "n"),
    *(sampling("max_tokens", value) for value in (-1, 0)),
    ("D11 max_tokens", COMPLETIONS, completion(max_tokens=10**9), 400, "context_length_exceeded", ANY),
    sampling("max_tokens", 2**63, code=ANY),
    ("D12 over the KV pool", COMPLETIONS, completion(max_tokens=500), 400, "kv_capacity_exceeded", ANY),
    sampling("min_tokens", 20),
    sampling("min_tokens", -1),
    *(sampling("presence_penalty", value) for value in (-2.1, 2.1)),
    *(sampling("frequency_penalty", value) for value in (-2.1, 2.1)),
    *(sampling("repetition_penalty", value) for value in (0, -1, 10**9, 1e-38, 0.009)),
    sampling("repetition_penalty", 0.01, 200, None),
    sampling("logit_bias", {str(i): -100 for i in range(1, 300)}, 200, None),
    sampling("logit_bias", {"x": 1}, code="invalid_type"),
    sampling("logit_bias", {"1": 101}),
    sampling("logit_bias", {"-1": 1}),
    sampling("logit_bias", {"300": 1}, code="token_id_out_of_range"),
    sampling("logit_bias", {str(i): 1 for i in range(1025)}),
    *(sampling("stop", value) for value in ("", ["a", ""], ["x"] * 33, "x" * 1_000_000)),
    *(sampling("stop", value, code="invalid_type") for value in ([1], [["a"]], 1)),
    *(sampling("stop", value, 200, None) for value in ([], None, ["a" * 1022 + f"{i:02}" for i in range(32)])),
    sampling("stop_token_ids", [-1]),
    sampling("stop_token_ids", [300], code="token_id_out_of_range"),
    *(sampling("stop_token_ids", value, code=ANY) for value in ([2**32], [2**64], list(range(100_000)))),
    sampling("bad_words", [""]),
    sampling("bad_words", ["x"] * 100_000, code=ANY),
    sampling("priority", 2**63, code=ANY),
    sampling("priority", "high", code="invalid_type"),
    sampling("seed", 2**64, code=ANY),
    sampling("seed", -5, 200, None),
    sampling("logprobs", 21),
    sampling("logprobs", -1),
    sampling("logprobs", True, code="invalid_type"),
    *(
        (f"D top_logprobs {value}", CHAT, chat(logprobs=True, top_logprobs=value), 400, "invalid_value", "top_logprobs")
        for value in (21, -1)
    ),
    ("D top_logprobs alone", CHAT, chat(top_logprobs=3), 400, "invalid_value", "top_logprobs"),
    ("D max_completion_tokens", CHAT, chat(max_completion_tokens=0), 400, "invalid_value", "max_completion_tokens"),
    (
        "D max_completion_tokens before max_tokens",
        CHAT,
        chat(max_completion_tokens=-1, max_tokens=5),
        400,
        "invalid_value",
        "max_completion_tokens",
    ),
    ("D response_format text", CHAT, chat(response_format={"type": "text"}), 200, None, None),
]


def in_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}})


def structured(**fields: Any) -> dict[str, Any]:
    return completion(structured_outputs=fields)


AT_ONCE: list[Any] = [{"type": "string", "pattern": f"[a-z]{{{i % 7 + 1}}}x{i}[0-9]+"} for i in range(40)]
"""Of an `allOf`."""
SCHEMA_FIELD = "response_format.json_schema.schema"

STRUCTURE_ROWS: list[Row] = [
    ("G1 empty", CHAT, chat(response_format={}), 400, "invalid_value", "response_format.type"),
    ("G1 unknown", CHAT, chat(response_format={"type": "xml"}), 400, "invalid_value", "response_format.type"),
    ("G1 no object", CHAT, chat(response_format="json"), 400, "invalid_type", "response_format"),
    (
        "G2 one level too high",
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": {"type": "object", "properties": {}}}),
        400,
        "invalid_value",
        "response_format.json_schema",
    ),
    ("G2 no schema", CHAT, in_format(None), 400, "invalid_value", SCHEMA_FIELD),
    ("G2 no name", CHAT, in_format({}, name=None), 400, "invalid_value", "response_format.json_schema.name"),
    ("G2 bad name", CHAT, in_format({}, name="a b"), 400, "invalid_value", "response_format.json_schema.name"),
    ("G2 bad strict", CHAT, in_format({}, strict="yes"), 400, "invalid_value", "response_format.json_schema.strict"),
    *((f"G4 {schema!r}", CHAT, in_format(schema), 400, "invalid_schema", SCHEMA_FIELD) for schema in (False, [], "x")),
    (
        "G4 unsatisfiable",
        CHAT,
        in_format({"type": "integer", "minimum": 5, "maximum": 1}),
        400,
        "invalid_schema",
        SCHEMA_FIELD,
    ),
    *(
        (f"G5 {target}", CHAT, in_format({"$ref": target}), 400, "invalid_schema", SCHEMA_FIELD)
        for target in ("#/$defs/none", "#", "http://127.0.0.1:1/x", "file:///etc/passwd")
    ),
    ("G6 deep", CHAT, in_format(json.loads('{"properties":{"a":' * 28 + "{}" + "}}" * 28)), 200, None, None),
    ("G6 400 levels", CHAT, in_format(json.loads('{"items":' * 400 + "{}" + "}" * 400)), 400, "json_too_deep", ANY),
    ("G6 400 levels as text", COMPLETIONS, structured(json='{"items":' * 400 + "{}" + "}" * 400), 400,
     "grammar_too_complex", "structured_outputs.json"),
    ("G6 oneOf of 500", CHAT, in_format({"oneOf": [{"const": str(i)} for i in range(500)]}), 200, None, None),
    ("G7 20,000 properties", COMPLETIONS, structured(json={"properties": {str(i): {} for i in range(20_000)}}), 400,
     "grammar_too_complex", "structured_outputs.json"),
    ("G7 over 256 KiB", COMPLETIONS, structured(json='{"const":"' + "x" * 262_144 + '"}'), 400, ANY, ANY),
    (
        "G7 3,000 patterns",
        COMPLETIONS,
        structured(json={"properties": {f"p{i}": {"pattern": f"^[a-z]{{{i % 7 + 1}}}x{i}$"} for i in range(3000)}}),
        400,
        "grammar_too_complex",
        "structured_outputs.json",
    ),
    # Each of these would keep a thread for ever.
    ("G10 patterns at once", CHAT, in_format({"allOf": AT_ONCE}), 400, "grammar_too_complex", SCHEMA_FIELD),
    ("G10 patterns of a property", CHAT, in_format({"allOf": [{"properties": {"a": part}} for part in AT_ONCE]}), 400,
     "grammar_too_complex", SCHEMA_FIELD),
    ("G10 patterns of a tool", CHAT, chat(tools=[tool("f", parameters={"properties": {"a": {"allOf": AT_ONCE}}})],
     tool_choice="required"), 400, "grammar_too_complex", "tools"),
    ("G10 multipleOf", CHAT, in_format({"type": "integer", "multipleOf": 10_000_007}), 400, "grammar_too_complex",
     SCHEMA_FIELD),
    ("G10 terminals at once", COMPLETIONS, structured(grammar="start: T\nT: " + " & ".join(["/.*[a-z]x.*/"] * 24)), 400,
     "grammar_too_complex", "structured_outputs.grammar"),
    ("G10 a schema in a grammar", COMPLETIONS, structured(grammar="start: %json " + json.dumps({"allOf": AT_ONCE})),
     400, "grammar_too_complex", "structured_outputs.grammar"),
    ("G12 left recursion", COMPLETIONS, {**structured(grammar='start: start "a" | "b"'), "max_tokens": 4}, 200, None,
     None),
    ("G7 long", COMPLETIONS, structured(json='{"const":"' + "x" * 262_000 + '"}'), 400, "grammar_too_complex",
     "structured_outputs.json"),
    ("G7 long, and taken", COMPLETIONS, structured(json='{"const":"' + "x" * 16_000 + '"}'), 200, None, None),
    ("G7 many", CHAT, in_format({"enum": list(range(20_000))}), 400, "grammar_too_complex", SCHEMA_FIELD),
    *(
        (f"G8 {schema}", CHAT, {**in_format(schema), "max_tokens": 8}, 200, None, None)
        for schema in (
            {"type": "string", "minLength": 10**6},
            {"type": "string", "maxLength": 10**9},
            {"type": "array", "items": {"type": "null"}, "minItems": 10**9},
        )
    ),
    ("G10 regex", COMPLETIONS, structured(regex="(.{0,500}){0,20}"), 200, None, None),
    ("G10 deep regex", COMPLETIONS, structured(regex="((((a{0,100}){0,100}){0,100}){0,100})"), 200, None, None),
    *(
        (f"G11 {kind}", COMPLETIONS, structured(**{kind: text}), 400, "grammar_too_complex",
         f"structured_outputs.{kind}")
        for kind, text in (("regex", "(" * 20_000), ("grammar", "start: " + "(" * 20_000))
    ),
    ("G12 empty", COMPLETIONS, structured(grammar=""), 400, "invalid_grammar", "structured_outputs.grammar"),
    ("G12 no rule", COMPLETIONS, structured(grammar="start: x"), 400, "invalid_grammar", "structured_outputs.grammar"),
    ("G16 a byte that ends nothing", COMPLETIONS, {**structured(regex="a{100,}"), "max_tokens": 4}, 200, None, None),
    ("G17 two at once", COMPLETIONS, structured(regex="a", choice=["a"]), 400, "invalid_value", ANY),
    (
        "G17 two fields",
        COMPLETIONS,
        {**structured(regex="a"), "response_format": {"type": "json_object"}},
        400,
        "invalid_value",
        "structured_outputs",
    ),
    ("G17 old and new", COMPLETIONS, {**structured(regex="a"), "guided_regex": "a"}, 400, "invalid_value", ANY),
    ("G nothing", COMPLETIONS, structured(), 200, None, None),
    ("G nulls", COMPLETIONS, structured(json=None, regex="a|b"), 200, None, None),
    ("G type", COMPLETIONS, structured(regex=5), 400, "invalid_value", "structured_outputs.regex"),
    ("G choice type", COMPLETIONS, structured(choice="ab"), 400, "invalid_value", "structured_outputs.choice"),
    ("G unknown", COMPLETIONS, structured(regx="a"), 400, "unknown_parameter", "structured_outputs.regx"),
    ("G pattern", COMPLETIONS, structured(json={}, whitespace_pattern="("), 400, "invalid_schema", ANY),
    ("G guided", COMPLETIONS, completion(guided_regex="("), 400, "invalid_grammar", "guided_regex"),
    ("G guided alone", COMPLETIONS, completion(guided_whitespace_pattern=" "), 400, "invalid_value", ANY),
    ("G hub", CHAT, chat(response_format={"type": "json_object", "value": {"type": "x"}}), 400, "invalid_schema",
     "response_format.value"),
    ("G regex", CHAT, chat(response_format={"type": "regex", "value": "("}), 400, "invalid_grammar",
     "response_format.value"),
    ("G text", CHAT, chat(response_format={"type": "text", "value": 1}), 400, "unknown_parameter", ANY),
]  # fmt: skip

PROMPT_ROWS: list[Row] = [
    *(
        (f"E1 {value!r}", COMPLETIONS, completion(prompt=value), 400, "invalid_value", "prompt")
        for value in ("", [], [""], [[]])
    ),
    *(
        (f"E2 {value!r}", COMPLETIONS, completion(prompt=value), 400, "invalid_type", "prompt")
        for value in (["a", [1]], [1, "a"], [1.5], [True], [None], {}, None, 5, [["a"]])
    ),
    *(
        (f"E3 {value}", COMPLETIONS, completion(prompt=[value]), 400, "token_id_out_of_range", "prompt")
        for value in (-1, 300, 2**31, 2**32, 2**64)
    ),
    ("E5 just fits", COMPLETIONS, completion(prompt=[1] * 470, max_tokens=1), 200, None, None),
    ("E6 context", COMPLETIONS, completion(prompt=[1] * 512), 400, "context_length_exceeded", "prompt"),
    ("E6 context + 1", COMPLETIONS, completion(prompt=[1] * 513), 400, "context_length_exceeded", "prompt"),
    ("E6 text", COMPLETIONS, completion(prompt="x" * 600), 400, "context_length_exceeded", "prompt"),
    ("E6 chat", CHAT, chat({"role": "user", "content": "x" * 600}), 400, "context_length_exceeded", "messages"),
    *(
        (
            f"E7 {letter!r}",
            COMPLETIONS,
            completion(prompt=letter * (15_000_000 // len(letter.encode()))),
            400,
            ANY,
            "prompt",
        )
        for letter in ("a", " ", "7")
    ),
    ("E7 marks", COMPLETIONS, b'{"prompt": "' + "\u0301".encode() * 7_500_000 + b'"}', 400, ANY, "prompt"),
    (
        "E7 on chat",
        CHAT,
        chat({"role": "user", "content": "a" * 15_000_000}),
        400,
        "context_length_exceeded",
        "messages",
    ),
    ("E9 1025 prompts", COMPLETIONS, completion(prompt=["a"] * 1025), 400, "invalid_value", "prompt"),
    (
        "E10 one of many is too long",
        COMPLETIONS,
        completion(prompt=[[1]] * 9 + [[1] * 600]),
        400,
        "context_length_exceeded",
        "prompt",
    ),
    ("E10 1,000 of maximum length", COMPLETIONS, completion(prompt=[[1] * 496] * 1000), 400, "invalid_value", "prompt"),
    (
        "E10 1,000 texts of maximum length",
        COMPLETIONS,
        completion(prompt=["x" * 496] * 1000),
        400,
        "invalid_value",
        "prompt",
    ),
    ("E11 special tokens as text", COMPLETIONS, completion(prompt="<|im_start|><|endoftext|>"), 200, None, None),
    ("E13 half a character", COMPLETIONS, completion(prompt=[72, 0xC3]), 200, None, None),
    ("E14 suffix", COMPLETIONS, completion(suffix="x"), 400, "unsupported_parameter", "suffix"),
    ("E17 prompt_embeds", COMPLETIONS, completion(prompt_embeds="AAAA"), 400, "unsupported_parameter", "prompt_embeds"),
    ("E echo", COMPLETIONS, completion(echo=True), 200, None, None),
    ("E echo type", COMPLETIONS, completion(echo="yes"), 400, "invalid_type", "echo"),
    ("E prompt_logprobs", COMPLETIONS, completion(prompt_logprobs=21), 400, "invalid_value", "prompt_logprobs"),
    ("E prompt_logprobs all", COMPLETIONS, completion(prompt_logprobs=-1), 400, "invalid_value", "prompt_logprobs"),
    (
        "E prompt_logprobs in a stream",
        COMPLETIONS,
        completion(prompt_logprobs=1, stream=True),
        400,
        "invalid_value",
        "prompt_logprobs",
    ),
    (
        "E prompt_logprobs of too many tokens",
        COMPLETIONS,
        completion(prompt=[[1] * 400] * 5, n=128, prompt_logprobs=20),
        400,
        "invalid_value",
        "prompt_logprobs",
    ),
    ("E max_tokens 0 without echo", COMPLETIONS, completion(max_tokens=0), 400, "invalid_value", "max_tokens"),
]


def message(name: str, *messages: Any, status: int = 400, code: Any = ANY) -> Row:
    return (f"F {name}", CHAT, chat(*messages), status, code, "messages" if status == 400 else None)


def tools(name: str, value: Any, status: int = 400) -> Row:
    return (
        f"F tools {name}",
        CHAT,
        chat(tools=value),
        status,
        ANY if status == 400 else None,
        "tools" if status == 400 else None,
    )


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
BAD_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "not json"}}

REFUSAL = {"type": "refusal", "refusal": "No."}


def called(value: str) -> dict[str, Any]:
    """An earlier turn with a call whose arguments are an object that holds the JSON `value`."""
    function = {"name": "f", "arguments": '{"a": ' + value + "}"}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]}


MESSAGE_ROWS: list[Row] = [
    ("F1 none", CHAT, {"messages": []}, 400, "invalid_value", "messages"),
    ("F2 a string", CHAT, {"messages": "Hi"}, 400, "invalid_type", "messages"),
    message("2 holds a string", "Hi"),
    message("2 holds null", None),
    message("3 no role", {"content": "Hi"}),
    message("3 unknown role", {"role": "king", "content": "Hi"}),
    message("3 role is a number", {"role": 5, "content": "Hi"}),
    message("3 long role", {"role": "r" * 1_000_000, "content": "Hi"}),
    message("4 no content", {"role": "user"}),
    message("4 null content", {"role": "user", "content": None}),
    message(
        "5 null content with calls",
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        USER,
        status=200,
        code=None,
    ),
    message(
        "6 text parts",
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        status=200,
        code=None,
    ),
    message("7 unknown part", {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}),
    *(
        message(f"7 {kind}", {"role": "user", "content": [{"type": kind, kind: {"data": "A" * 1000}}]})
        for kind in ("input_audio", "file", "video_url")
    ),
    message("J2 link in a text", {"role": "user", "content": "![x](http://127.0.0.1:1/x.png)"}, status=200, code=None),
    message("J3 large image", {"role": "user", "content": [{"type": "image_url", "image_url": "A" * 15_000_000}]}),
    message("7 part without text", {"role": "user", "content": [{"type": "text"}]}),
    message("8 2049 messages", *[USER] * 2049),
    message("8 257 parts", {"role": "user", "content": [{"type": "text", "text": "a"}] * 257}),
    message("9 template refuses", {"role": "assistant", "content": "Hi"}, code="template_error"),
    ("F10 template", CHAT, chat(chat_template="{{ 1 }}"), 400, "unsupported_parameter", "chat_template"),
    *(
        (f"F11 {name}", CHAT, chat(chat_template_kwargs={name: 1}), 400, "invalid_value", "chat_template_kwargs")
        for name in ("tokenize", "add_generation_prompt", "messages", "__class__", "a b")
    ),
    ("F11 allowed", CHAT, chat(chat_template_kwargs={"enable_thinking": False}), 200, None, None),
    tools("14 empty", [], 200),
    tools("14 not a list", {"a": 1}),
    tools("14 257", [tool(f"f{i}") for i in range(257)]),
    tools("15 no name", [{"type": "function", "function": {}}]),
    *(tools(f"15 {name[:10]!r}", [tool(name)]) for name in ("a b", 'a"', "a\n", "a" * 1000, "")),
    tools("15 twice", [tool("f"), tool("f")]),
    tools("good", [tool("f", description="d", parameters={"type": "object"})], 200),
    *(
        (f"F16 {schema}", CHAT, chat(tools=[tool("f", parameters=schema)]), 400, "invalid_schema", "tools")
        for schema in (
            {"type": "nonsense"},
            {"type": 5},
            {"type": []},
            {"type": None},
            {"properties": {"a": {"type": "strin"}}},
            {"properties": {"a": {"pattern": "("}}},
            {"properties": {"a": {"pattern": 5}}},
            {"items": {"pattern": "[a"}},
            {"anyOf": [{"type": "object"}, {"$defs": {"b": {"type": "x"}}}]},
            {"patternProperties": {"*": {}}},
            {"properties": {"a": 5}},
        )
    ),
    *(
        tools(f"16 good {schema}", [tool("f", parameters=schema)], 200)
        for schema in (
            {"type": ["object", "null"]},
            {"properties": {"type": {"enum": ["x"]}, "pattern": {"type": "string"}}},
            {"properties": {"a": {"pattern": "^\\\\p{L}+$"}}, "additionalProperties": False},
        )
    ),
    message("18 no tool_call_id", {"role": "tool", "content": "x"}),
    tools("15 parameters", [tool("f", parameters=[1])]),
    message(
        "19 arguments", USER, {"role": "assistant", "content": "", "tool_calls": [BAD_CALL]}, status=200, code=None
    ),
    message("19 arguments", USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}),
    message("refusal", USER, {"role": "assistant", "content": [REFUSAL]}, status=200, code=None),
    message("19 text in arguments", USER, called('"' + "x" * 70_000 + '"'), code="context_length_exceeded"),
    message("19 text in a name", {**USER, "name": "x" * 70_000}, code="context_length_exceeded"),
    message(
        "19 text in tool_call_id",
        {"role": "tool", "content": "", "tool_call_id": "x" * 70_000},
        code="context_length_exceeded",
    ),
    (
        "F text in a tool",
        CHAT,
        chat(tools=[tool("f", description="x" * 70_000)]),
        400,
        "context_length_exceeded",
        "messages",
    ),
    (
        "F text in a tool's keys",
        CHAT,
        chat(tools=[tool("f", parameters={"properties": {"x" * 70_000: {}}})]),
        400,
        "context_length_exceeded",
        "messages",
    ),
    (
        "F text in variables",
        CHAT,
        chat(chat_template_kwargs={"extra": "x" * 70_000}),
        400,
        "context_length_exceeded",
        "messages",
    ),
    (
        "F text that the template repeats",
        CHAT,
        chat(chat_template_kwargs={"extra": "x" * 1000, "times": 66}),
        400,
        "context_length_exceeded",
        "messages",
    ),
    (
        "F21 continue",
        CHAT,
        chat(continue_final_message=True, add_generation_prompt=True),
        400,
        "invalid_value",
        "continue_final_message",
    ),
    ("E truncate 0", COMPLETIONS, completion(truncate_prompt_tokens=0), 400, "invalid_value", "truncate_prompt_tokens"),
    ("E truncate 513", CHAT, chat(truncate_prompt_tokens=513), 400, "invalid_value", "truncate_prompt_tokens"),
    ("F tool_choice without tools", CHAT, chat(tool_choice="required"), 400, "invalid_value", "tool_choice"),
    ("F tool_choice auto without tools", CHAT, chat(tool_choice="auto"), 200, None, None),
    (
        "F tool_choice with a schema that cannot be held",
        CHAT,
        chat(tools=[tool("f", parameters={"$ref": "#/nowhere"})], tool_choice="required"),
        400,
        ANY,
        ANY,
    ),
    ("F tool_choice word", CHAT, chat(tools=[tool("f")], tool_choice="maybe"), 400, "invalid_value", "tool_choice"),
    ("F tool_choice type", CHAT, chat(tools=[tool("f")], tool_choice=5), 400, "invalid_type", "tool_choice"),
    (
        "F tool_choice unknown",
        CHAT,
        chat(tools=[tool("f")], tool_choice={"type": "function", "function": {"name": "g"}}),
        400,
        "invalid_value",
        "tool_choice",
    ),
    ("F parallel_tool_calls", CHAT, chat(parallel_tool_calls="no"), 400, "invalid_type", "parallel_tool_calls"),
    ("F include_reasoning", CHAT, chat(include_reasoning=1), 400, "invalid_type", "include_reasoning"),
]

STREAM_ROWS: list[Row] = [
    ("H1", COMPLETIONS, completion(stream_options={"include_usage": True}), 400, "invalid_value", "stream_options"),
    ("H1 null", COMPLETIONS, completion(stream_options=None), 200, None, None),
    (
        "H stream_options type",
        COMPLETIONS,
        completion(stream=True, stream_options=5),
        400,
        "invalid_type",
        "stream_options",
    ),
    ("H4 continuous usage alone", COMPLETIONS, completion(stream_options={"continuous_usage_stats": True}), 400,
     "invalid_value", "stream_options"),
    ("H bad in a stream", COMPLETIONS, completion(stream=True, temperature=9), 400, "invalid_value", "temperature"),
]  # fmt: skip

ROWS = [*JSON_ROWS, *TYPE_ROWS, *SAMPLING_ROWS, *STRUCTURE_ROWS, *PROMPT_ROWS, *MESSAGE_ROWS, *STREAM_ROWS]


@pytest.mark.parametrize("row", ROWS, ids=[row[0].replace(" ", "-") for row in ROWS])
async def test_row(served: Served, row: Row, caplog: pytest.LogCaptureFixture) -> None:
    _, path, body, status, code, param = row
    caplog.set_level("INFO", "octavo")
    made = body() if callable(body) else body
    data = made if isinstance(made, bytes) else json.dumps(made).encode()
    before = resident()
    neighbour = asyncio.ensure_future(served.events(COMPLETIONS, {"prompt": "Hi", "max_tokens": 12}))
    got, answer = await served.post(path, data, headers={"Content-Type": "application/json"})
    assert got == status, answer
    if status != 200:
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]
        assert code is ANY or error["code"] == code, error
        assert param is ANY or error["param"] == param, error
        assert len(error["message"]) < 600
        assert DOCUMENTED[error["code"]] == str(status)
    *events, done = await neighbour
    assert done == "[DONE]" and "".join(event["choices"][0]["text"] for event in events) == "Hello world"
    said = [record.getMessage() for record in caplog.records if record.name == "octavo.server.log"]
    assert [line.split(": ")[1].split(" ")[0] for line in said] == ([] if status == 200 else [str(status)]), said
    await assert_unharmed(served, caplog)
    # The client's copies of a large body are this process's as well: see test_large_bodies_leave_no_memory. A
    # grammar of 256 KiB is kept for the next request.
    assert len(data) > 200_000 or resident() - before < 20


def resident() -> float:
    """MiB of this process that are its own."""
    gc.collect()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon:"))


async def assert_unharmed(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """The next request works, nothing is left running or in use, and the log holds no traceback and no
    long line.
    """
    got, answer = await served.post(COMPLETIONS, {"prompt": "Hi", "max_tokens": 2})
    assert (got, answer["choices"][0]["text"]) == (200, "He")
    assert await served.metrics("vllm:num_requests_running", "vllm:num_requests_waiting") == [0, 0]
    stats = served.engine.stats()
    assert stats["kv_blocks_used"] == stats["kv_blocks_held"] == 0  # what is cached can be taken at any time
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert all(len(record.getMessage()) <= 2048 for record in caplog.records)


async def test_large_bodies_leave_no_memory(served: Served) -> None:
    """Row after row that is refused, of 15 MB each, and what is resident stays."""
    bodies = [
        b'{"prompt": "' + b"a" * 15_000_000 + b'"}',
        b'{"prompt": [' + b"1," * 7_000_000 + b"1]}",
        b'{"prompt": "Hi", "user": "' + b"x" * 15_000_000 + b'"}',
    ]

    async def refused() -> float:
        for body in bodies:
            assert (await served.post(COMPLETIONS, body))[0] == 400
        return resident()

    first = [await refused() for _ in range(2)][1]
    assert [await refused() for _ in range(4)][3] - first < 20


async def test_a_thousand_schemas_fill_no_cache_and_no_disk(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G14: what is compiled is kept within bounds, and in memory alone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    grown = []
    for start in range(0, 1000, 100):
        bodies = [completion(structured_outputs={"json": {"const": f"{number:04}"}}, max_tokens=8)
                  for number in range(start, start + 100)]  # fmt: skip
        answers = await asyncio.gather(*(served.post(COMPLETIONS, body) for body in bodies))
        assert {status for status, _ in answers} == {200}
        grown.append(resident())
        kept = served.engine.grammars.stats()
        assert kept["kept"] <= 256 and kept["kept_bytes"] <= 64 * 2**20
    assert kept["compiled"] == 1000
    assert grown[-1] - grown[4] < 20
    assert not list(tmp_path.iterdir())


async def test_one_schema_from_many_clients_is_compiled_once(served: Served) -> None:
    """G15."""
    schema = {"properties": {f"p{number}": {"type": "string", "maxLength": 9} for number in range(200)}}
    body = completion(structured_outputs={"json": schema}, max_tokens=4)
    answers = await asyncio.gather(*(served.post(COMPLETIONS, body) for _ in range(50)))
    assert {status for status, _ in answers} == {200}
    assert served.engine.grammars.stats()["compiled"] == 1


async def test_a_long_word_is_tokenised_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """E8: 100 KB without a space, inside the limits."""
    engine = ScriptedEngine(max_model_len=110_000, num_blocks=7_000)
    beside: list[Any] = []
    submit = engine._long_text_pool.submit
    async for served in serving(engine, ServerConfig()):
        monkeypatch.setattr(engine._long_text_pool, "submit", lambda work: beside.append(work) or submit(work))
        status, answer = await served.post(COMPLETIONS, completion(prompt="a" * 100_000, max_tokens=2))
        assert (status, answer["usage"]["prompt_tokens"]) == (200, 100_000)
        assert len(beside) == 1


async def test_a_broken_grammar_between_good_ones(served: Served) -> None:
    statuses = [
        (await served.post(COMPLETIONS, completion(structured_outputs={"regex": regex})))[0]
        for regex in ("[a-z]{3}", "(", "[a-z]{3}")
    ]
    assert statuses == [200, 400, 200]


async def test_a_stream_is_one_whatever_the_client_accepts(served: Served) -> None:
    headers = {"Accept": "application/json"}
    async with served.http.post(served.url + COMPLETIONS, json=completion(stream=True), headers=headers) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "path",
    ["/v1/files", "/v1/batches", "/sleep", "/wake_up", "/reset_prefix_cache", "/start_profile", "/collective_rpc",
     "/v1/load_lora_adapter", "/update_weights", "/pause", "/server_info", "/abort_request"],
)  # fmt: skip
async def test_what_administers_is_not_there(served: Served, path: str) -> None:
    for method in ("GET", "POST"):
        async with served.http.request(method, served.url + path, json={"filename": "../x"}) as response:
            assert response.status == 404 and (await response.json())["error"]["code"] == "route_not_found"


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_routes_of_the_tokenizer_have_the_same_limits(
    served: Served, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[tuple[Any, Any]] = [
        ({"prompt": "a" * 15_000_000}, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "a" * 15_000_000}]}, "context_length_exceeded"),
        ({"prompt": 5}, "invalid_type"),
        ({"prompt": ""}, "invalid_value"),
        ({}, "missing_required_parameter"),
    ]
    if path == "/detokenize":
        rows = [({"tokens": [number]}, ANY) for number in (-1, 300, 2**40, 2**64)]
        rows += [({"tokens": "a"}, "invalid_type"), ({"tokens": [1.5]}, "invalid_type"), ({}, ANY)]
    for body, code in rows:
        status, answer = await served.post(path, body)
        assert status == 400 and (code is ANY or answer["error"]["code"] == code), (body, answer)
    await assert_unharmed(served, caplog)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_all_optional_fields_may_be_null(served: Served, path: str) -> None:
    from octavo.server.openai import schemas

    struct = schemas.CompletionRequest if path == COMPLETIONS else schemas.ChatCompletionRequest
    unsupported = schemas.UNSUPPORTED_COMPLETION if path == COMPLETIONS else schemas.UNSUPPORTED_CHAT
    nulls = dict.fromkeys([*struct.__struct_fields__, *unsupported, "user", "metadata"])
    good = completion() if path == COMPLETIONS else chat()
    assert (await served.post(path, nulls | good))[0] == 200


SWITCHES: dict[str, Any] = {
    "n": 2,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "seed": 7,
    "stop": ["zz"],
    "stop_token_ids": [5],
    "ignore_eos": True,
    "min_tokens": 2,
    "logprobs": 3,
    "logit_bias": {"5": -1.0},
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "structured_outputs": {"regex": "[a-z]*"},
    "stream": True,
}


async def test_every_pair_of_sampling_features(served: Served) -> None:
    names = sorted(SWITCHES)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            body = completion(max_tokens=3, **{first: SWITCHES[first], second: SWITCHES[second]})
            async with served.http.post(served.url + COMPLETIONS, json=body) as response:
                assert response.status == 200, (first, second)
                await response.read()


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        ({"Content-Type": "application/json; charset=bogus"}, b'{"prompt": "Hi"}', 415, "unsupported_charset"),
        ({"Content-Type": "text/plain"}, b'{"prompt": "Hi"}', 200, None),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b'{"prompt": "Hi"}', 200, None),
        ({"Content-Encoding": "gzip"}, b"not gzip", 400, "invalid_encoding"),
        ({"Content-Encoding": "gzip"}, gzip.compress(b'{"prompt": "Hi"}', mtime=0)[:-1], 400, "invalid_encoding"),
        ({"Content-Encoding": "deflate"}, b"not deflate", 400, "invalid_encoding"),
        ({"Content-Encoding": "gzip"}, gzip.compress(b'{"prompt": "Hi"}', mtime=0), 200, None),
        ({"Content-Encoding": "foo"}, b'{"prompt": "Hi"}', 415, "unsupported_encoding"),
        ({"Content-Encoding": "br"}, b'{"prompt": "Hi"}', 415, "unsupported_encoding"),
        ({"Content-Encoding": "gzip, gzip"}, b'{"prompt": "Hi"}', 415, "unsupported_encoding"),
        ({"Expect": "bananas"}, b'{"prompt": "Hi"}', 417, "unknown_expectation"),
        ({"Expect": "100-continue"}, b'{"prompt": "Hi"}', 200, None),
        ({}, b'{"prompt": "' + b"x" * (16 * 2**20) + b'"}', 413, "body_too_large"),
    ],
)
async def test_headers_and_sizes(
    served: Served,
    headers: dict[str, str],
    body: bytes,
    status: int,
    code: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    got, answer = await served.post(COMPLETIONS, body, headers={"Content-Type": "application/json", **headers})
    assert got == status
    if code is not None:
        assert answer["error"]["code"] == code
        assert DOCUMENTED[code] == str(status)
    await assert_unharmed(served, caplog)


async def test_gzip_bomb(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    body = gzip.compress(b" " * 50_000_000)
    got, answer = await served.post(COMPLETIONS, body, headers={"Content-Encoding": "gzip"})
    assert (got, answer["error"]["code"]) == (413, "body_too_large")
    await assert_unharmed(served, caplog)


async def test_announced_size_is_refused_at_once(served: Served) -> None:
    host, _, port = served.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000000\r\n\r\nabc")
    assert b" 413 " in await asyncio.wait_for(reader.readline(), 120)
    writer.close()


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nope", 404, "route_not_found"),
        ("GET", "/swagger", 404, "route_not_found"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("PUT", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
async def test_routes_answer_in_json(served: Served, method: str, path: str, status: int, code: str) -> None:
    async with served.http.request(method, served.url + path) as response:
        assert response.status == status
        assert (await response.json(content_type="application/json"))["error"]["code"] == code
        assert ("Allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("path", ["/score", "/v1/score", "/v1/rerank", "/rerank", "/v2/rerank"])
async def test_routes_that_score_say_what_to_take(served: Served, path: str) -> None:
    status, answer = await served.post(path, {"model": "dummy", "text_1": "a", "text_2": "b"})
    assert (status, answer["error"]["code"]) == (404, "route_not_found")
    assert "/v1/embeddings" in answer["error"]["message"] and "cosine" in answer["error"]["message"]


async def test_head_is_refused_with_the_allowed_methods(served: Served) -> None:
    async with served.http.head(served.url + COMPLETIONS) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "Is /v1/chat/completions meant?"),
        ("/v1/v1/completions", "Is /v1/completions meant?"),
        ("/models/", "Is /v1/models meant?"),
        ("/swagger", "The routes are /v1/completions, /v1/chat/completions, /v1/models, /v1/embeddings"),
    ],
)
async def test_a_wrong_route_is_told_the_right_one(served: Served, path: str, hint: str) -> None:
    assert hint in (await served.post(path, completion()))[1]["error"]["message"]


async def test_a_wrong_model_is_told_the_right_one(served: Served) -> None:
    assert "served here, but org/tiny" in (await served.post(CHAT, chat(model="gpt-4")))[1]["error"]["message"]


async def test_clients_recognise_a_prompt_that_is_too_long(served: Served) -> None:
    """By its words: the beginning of the message is what they look for."""
    long = [
        (COMPLETIONS, completion(prompt="x" * 513)),
        (COMPLETIONS, completion(prompt=[1] * 513)),
        (COMPLETIONS, completion(prompt=["x", "x" * 600])),
        (COMPLETIONS, completion(prompt="x" * 70_000)),
        (COMPLETIONS, completion(max_tokens=512)),
        (CHAT, chat({"role": "user", "content": "x" * 513})),
        (CHAT, chat({"role": "user", "content": "x" * 70_000})),
        (CHAT, chat(chat_template_kwargs={"extra": "x" * 1000, "times": 66})),
    ]
    for path, body in long:
        status, answer = await served.post(path, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        beginning = "prompt is too long: this model's maximum context length is 512 tokens; "
        assert answer["error"]["message"].startswith(beginning), answer
    assert "the chat template makes more than 65536 characters" in answer["error"]["message"]
