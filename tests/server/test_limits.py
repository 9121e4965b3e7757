"""Every limit of a server: its flag, its default, and a request over it, which is refused by name before
the engine has anything to do with it.
"""

import asyncio
import dataclasses
import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from octavo.server.config import ServerConfig
from octavo.server.limits import Limits
from tests.server.conftest import serving
from tests.server.scripted_engine import ScriptedEngine
from tests.server.test_connections import exchange

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "a"}
PART = {"type": "text", "text": "a"}
OLLAMA = {"model": "dummy", "messages": [USER], "stream": False}
TOOL = {"type": "function", "function": {"name": "f"}}

# limit, its default, a lower one, a body that fits it, one that is over it, and the field that is named
ROWS: tuple[tuple[str, float, float, str, dict[str, Any], dict[str, Any], str], ...] = (
    ("max_json_depth", 64, 8, CHAT, {"messages": [USER]},
     {"messages": [USER], "metadata": json.loads("[" * 8 + "]" * 8)}, ""),
    ("max_prompts", 1024, 2, COMPLETIONS, {"prompt": ["a"] * 2}, {"prompt": ["a"] * 3}, "prompt"),
    ("max_prompts", 1024, 2, "/v1/embeddings", {"input": ["a"] * 2}, {"input": ["a"] * 3}, "input"),
    ("max_messages", 2048, 2, CHAT, {"messages": [USER] * 2}, {"messages": [USER] * 3}, "messages"),
    ("max_messages", 2048, 2, "/v1/messages", {"max_tokens": 1, "messages": [USER] * 2},
     {"max_tokens": 1, "messages": [USER] * 3}, "messages"),
    ("max_message_parts", 256, 2, CHAT, {"messages": [{"role": "user", "content": [PART] * 2}]},
     {"messages": [{"role": "user", "content": [PART] * 3}]}, "messages"),
    ("max_tools", 256, 1, CHAT, {"messages": [USER], "tools": [TOOL]},
     {"messages": [USER], "tools": [TOOL, {"type": "function", "function": {"name": "g"}}]}, "tools"),
    ("max_n", 128, 2, COMPLETIONS, {"prompt": "a", "n": 2}, {"prompt": "a", "n": 3}, "n"),
    ("max_n", 128, 2, CHAT, {"messages": [USER], "n": 2}, {"messages": [USER], "n": 3}, "n"),
    ("max_choices", 1024, 4, COMPLETIONS, {"prompt": ["a"] * 2, "n": 2}, {"prompt": ["a"] * 2, "n": 3}, "n"),
    ("max_n", 128, 2, COMPLETIONS, {"prompt": "a", "best_of": 2}, {"prompt": "a", "best_of": 3}, "best_of"),
    ("max_choices", 1024, 4, COMPLETIONS, {"prompt": ["a"] * 2, "best_of": 2}, {"prompt": ["a"] * 2, "best_of": 3},
     "best_of"),
    ("max_stop", 32, 1, "/api/chat", {**OLLAMA, "options": {"stop": ["x"]}},
     {**OLLAMA, "options": {"stop": ["x", "y"]}}, "stop"),
    ("max_stop", 32, 2, COMPLETIONS, {"prompt": "a", "stop": ["x", "y"]},
     {"prompt": "a", "stop": ["x", "y", "z"]}, "stop"),
    ("max_stop", 32, 1, "/v1/responses", {"input": "a", "stop": ["x"]}, {"input": "a", "stop": ["x", "y"]}, "stop"),
    ("max_stop", 32, 1, "/v1/messages", {"max_tokens": 1, "messages": [USER], "stop_sequences": ["x"]},
     {"max_tokens": 1, "messages": [USER], "stop_sequences": ["x", "y"]}, ""),
    ("max_stop_length", 1024, 4, COMPLETIONS, {"prompt": "a", "stop": "éé"}, {"prompt": "a", "stop": "ééé"}, "stop"),
    ("max_stop_token_ids", 128, 2, COMPLETIONS, {"prompt": "a", "stop_token_ids": [1, 2]},
     {"prompt": "a", "stop_token_ids": [1, 2, 3]}, "stop_token_ids"),
    ("max_logprobs", 20, 2, COMPLETIONS, {"prompt": "a", "logprobs": 2}, {"prompt": "a", "logprobs": 3}, "logprobs"),
    ("max_logprobs", 20, 2, CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 2},
     {"messages": [USER], "logprobs": True, "top_logprobs": 3}, "top_logprobs"),
    ("max_logprobs", 20, 2, COMPLETIONS, {"prompt": "a", "prompt_logprobs": 2}, {"prompt": "a", "prompt_logprobs": 3},
     "prompt_logprobs"),
    ("max_logit_bias", 1024, 2, COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 1, "2": 1}},
     {"prompt": "a", "logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias"),
    ("max_bad_words", 256, 2, COMPLETIONS, {"prompt": "a", "bad_words": ["x", "y"]},
     {"prompt": "a", "bad_words": ["x", "y", "z"]}, "bad_words"),
    ("max_schema_size", 262144, 1024, COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "a" * 900}},
     {"prompt": "a", "structured_outputs": {"regex": "a" * 1100}}, "structured_outputs"),
    ("max_body_size", 16777216, 2048, COMPLETIONS, {"prompt": "a", "user": "u" * 1900},
     {"prompt": "a", "user": "u" * 2100}, ""),
)  # fmt: skip
ELSEWHERE = {
    "max_header_size": "test_headers_over_their_limits", "max_headers": "test_headers_over_their_limits",
    "header_timeout": "test_connections.py", "body_timeout": "test_connections.py",
    "keep_alive_timeout": "test_an_idle_connection_is_closed", "write_timeout": "test_lifecycle.py",
}  # fmt: skip


def test_every_limit_has_a_row_and_this_default() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Limits)}
    assert {row[0] for row in ROWS} | set(ELSEWHERE) == set(fields)
    assert all(fields[row[0]] == row[1] for row in ROWS)
    for name in fields:
        with pytest.raises(ValueError, match=f"^{name} = -1: must be from"):
            ServerConfig(**{name: -1})


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]} {row[3]}" for row in ROWS])
async def test_over_the_limit_is_refused_before_any_work(row: tuple[Any, ...]) -> None:
    name, _, lower, path, inside, over, field = row
    engine = ScriptedEngine(num_blocks=200)
    async for served in serving(engine, ServerConfig(**{name: lower})):
        status, answer = await served.post(path, inside)
        assert status == 200, answer
        before = engine.stats()["requests"]
        status, answer = await served.post(path, over)
        assert status == (413 if name == "max_body_size" else 400)
        assert engine.stats()["requests"] == before and engine.num_unfinished == 0
        error = answer["error"]
        if field and path not in ("/v1/messages", "/api/chat"):
            assert error["param"] == field
        message = error if isinstance(error, str) else error["message"]
        assert field in message and str(int(lower)) in message
    async for served in serving(ScriptedEngine(num_blocks=200), ServerConfig()):
        status, answer = await served.post(path, over)
        assert status == 200, answer  # it is this limit, and none of the others, that refused


HEADERS = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.mark.parametrize(
    ("limits", "request_bytes"),
    [
        ({"max_header_size": 256}, HEADERS + b"A: " + b"x" * 300 + b"\r\n\r\n"),
        ({"max_header_size": 256}, b"GET /" + b"x" * 300 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
        ({"max_headers": 8}, HEADERS + b"".join(b"A%d: x\r\n" % number for number in range(10)) + b"\r\n"),
        ({}, HEADERS + b"".join(b"A%d: x\r\n" % number for number in range(110)) + b"\r\n"),
        ({}, HEADERS + b"A: " + b"x" * 9000 + b"\r\n\r\n"),
    ],
)
async def test_headers_over_their_limits(limits: dict[str, Any], request_bytes: bytes) -> None:
    async for served in serving(ScriptedEngine(), ServerConfig(**limits)):
        status, error = await exchange(served, request_bytes)
        assert status in (400, 431) and error["code"] in ("bad_http", "headers_too_large")


async def test_an_idle_connection_is_closed() -> None:
    async for served in serving(ScriptedEngine(), ServerConfig(keep_alive_timeout=0.2)):
        url = urlsplit(served.url)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(HEADERS + b"\r\n")
        assert b"200 OK" in await asyncio.wait_for(reader.read(), 60)  # ends when the server closes
        writer.close()
