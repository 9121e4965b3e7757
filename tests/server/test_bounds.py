"""Bounds on an answer's tokens over HTTP: the only tokens, words that are not written, budgets of
reasoning.

The scripted engine writes its text where the masks let it, and else draws evenly from what they
allow; its tokens are bytes.
"""

import json
from typing import Any

import openai
import pytest

from octavo.answers import ModelAnswers
from octavo.config import EngineConfig
from tests.server.conftest import Served
from tests.server.scripted_engine import END

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
USER: Any = {"role": "user", "content": "Hi"}


def speaks(served: Served, answer: str, reasoning_parser: str = "think") -> None:
    served.engine.script.answer = answer.encode()
    config = EngineConfig(model="m", reasoning_parser=reasoning_parser)
    served.engine.answers = ModelAnswers(config, None, served.engine.tokenizer)


async def text_of(served: Served, path: str, fields: dict[str, Any]) -> str:
    """All that was written, however the route tells it."""
    prompt: dict[str, Any] = {
        CHAT: {"messages": [USER], "include_reasoning": True},
        COMPLETIONS: {"prompt": "Hi"},
        RESPONSES: {"input": "Hi"},
    }[path]
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    status, body = await served.post(path, prompt | {limit: 40} | fields)
    assert status == 200, body
    if path == RESPONSES:
        return str(body["output"][-1]["content"][0]["text"])
    choice = body["choices"][0]
    return str(choice["text"] if path == COMPLETIONS else choice["message"]["content"])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
async def test_only_the_allowed_tokens_are_drawn(served: Served, path: str) -> None:
    speaks(served, "Hello world", "none")
    text = await text_of(served, path, {"allowed_token_ids": [*b"loe"]})
    assert len(text) == 40 and set(text) == set("loe")
    assert text[1:4] == "ell"  # what was wanted, where it was allowed
    assert await text_of(served, path, {"allowed_token_ids": [*b"Helo wrd", END]}) == "Hello world"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
async def test_bad_words_are_not_written(served: Served, path: str) -> None:
    speaks(served, "Hello world, Hello all", "none")
    assert await text_of(served, path, {}) == "Hello world, Hello all"
    for _ in range(3):
        text = await text_of(served, path, {"bad_words": ["world", " Hello"]})
        assert text.startswith("Hell") and not text.startswith("Hello")
        assert "world" not in text and "Hello" not in text
        assert text[5:11] == " worl" + text[10] and text[10] != "d"
    assert await text_of(served, path, {"bad_words": []}) == "Hello world, Hello all"


async def test_bounds_and_a_schema_hold_together(served: Served) -> None:
    speaks(served, '"b"', "none")
    status, body = await served.post(
        CHAT,
        {"messages": [USER], "bad_words": ["b"], "structured_outputs": {"choice": ["ab", "b", "cd"]}, "max_tokens": 9},
    )
    assert status == 200 and body["choices"][0]["message"]["content"] == "cd"
    # Where nothing is left, the request ends by an error and the server does not.
    status, body = await served.post(
        CHAT, {"messages": [USER], "allowed_token_ids": [1], "structured_outputs": {"choice": ["ab"]}}
    )
    assert status == 400 and body["error"]["code"] == "grammar_error"
    assert (await served.get("/health"))[0] == 200


async def test_reasoning_is_closed_at_its_budget(served: Served) -> None:
    speaks(served, "<think>abcdefghij</think>Yes")
    for stream in (False, True):
        fields = {"messages": [USER], "thinking_token_budget": 4, "max_tokens": 60}
        if stream:
            events = await served.events(CHAT, fields)
            deltas = [event["choices"][0]["delta"] for event in events[:-1]]
            reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
            content = "".join(delta.get("content") or "" for delta in deltas)
        else:
            _, body = await served.post(CHAT, fields)
            message = body["choices"][0]["message"]
            reasoning, content = message["reasoning_content"], message["content"]
        assert reasoning == "abcd"
        # The script goes on where the forced tag of eight tokens has ended.
        assert content == "think>Yes"


async def test_a_budget_that_is_not_reached_changes_nothing(served: Served) -> None:
    speaks(served, "<think>ab</think>Yes")
    _, body = await served.post(CHAT, {"messages": [USER], "thinking_token_budget": 14})
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("ab", "Yes")


async def test_a_budget_of_a_prompt_that_opens_the_reasoning(served: Served) -> None:
    speaks(served, "abcdefghijYes")
    opened = {"messages": [USER], "chat_template_kwargs": {"extra": "<think>\n"}, "n": 2}
    for budget in (0, 2):
        _, body = await served.post(CHAT, opened | {"thinking_token_budget": budget})
        for choice in body["choices"]:
            assert choice["message"].get("reasoning_content") == ("ab" if budget else None)
            assert choice["message"]["content"] == "abcdefghijYes"[budget + len("</think>") :]
    # What the answer must look like, it must behind the reasoning.
    _, body = await served.post(
        CHAT, opened | {"thinking_token_budget": 2, "structured_outputs": {"choice": ["maybe"]}}
    )
    assert {choice["message"]["content"] for choice in body["choices"]} == {"maybe"}
    assert {choice["message"]["reasoning_content"] for choice in body["choices"]} == {"ab"}


OPENS: dict[str, Any] = {"chat_template_kwargs": {"extra": "<think>\n"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["a"]}
AS_JSON = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}


@pytest.mark.parametrize("n", [1, 2])
async def test_json_comes_behind_the_reasoning_that_the_prompt_opens(served: Served, n: int) -> None:
    speaks(served, 'abc</think>{"a": 7}')
    fields = {"messages": [USER], **OPENS, "response_format": AS_JSON, "n": n, "max_tokens": 60}
    _, body = await served.post(CHAT, fields)
    for choice in body["choices"]:
        assert choice["message"]["reasoning_content"] == "abc"
        assert choice["message"]["content"] == '{"a": 7}'
    parts: dict[tuple[int, str], str] = {}
    for event in (await served.events(CHAT, fields))[:-1]:
        for choice in event["choices"]:
            for name in ("reasoning_content", "content"):
                place = (choice["index"], name)
                parts[place] = parts.get(place, "") + (choice["delta"].get(name) or "")
    for index in range(n):
        assert (parts[index, "reasoning_content"], parts[index, "content"]) == ("abc", '{"a": 7}')


async def test_what_follows_the_reasoning_is_held_to_the_schema(served: Served) -> None:
    speaks(served, "abc</think>No, I will not")
    _, body = await served.post(CHAT, {"messages": [USER], **OPENS, "response_format": AS_JSON, "max_tokens": 60})
    message = body["choices"][0]["message"]
    assert message["reasoning_content"] == "abc" and 0 <= json.loads(message["content"])["a"] <= 9


async def test_other_routes_have_json_behind_the_reasoning_too(served: Served) -> None:
    speaks(served, 'abc</think>{"a": 7}')
    text = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}
    _, body = await served.post(RESPONSES, {"input": "Hi", **OPENS, "text": text})
    assert [item["type"] for item in body["output"]] == ["reasoning", "message"]
    assert body["output"][1]["content"][0]["text"] == '{"a": 7}'


async def test_forced_calls_have_no_reasoning_before_them(served: Served) -> None:
    speaks(served, 'abc</think>[{"name": "f", "parameters": {}}]')
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    fields = {"messages": [USER], **OPENS, "tools": [tool], "tool_choice": "required", "max_tokens": 200}
    _, body = await served.post(CHAT, fields)
    message = body["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "f" and not message.get("reasoning_content")


async def test_budgets_of_anthropics_clients(served: Served) -> None:
    fields = {
        "model": "dummy",
        "messages": [USER],
        "max_tokens": 60,
        "thinking": {"type": "enabled", "budget_tokens": 3},
    }
    speaks(served, "<think>abcdefghij</think>Yes")
    _, body = await served.post(MESSAGES, fields)
    assert [block.get("thinking") or block.get("text") for block in body["content"]] == ["abc", "/think>Yes"]
    _, body = await served.post(MESSAGES, fields | {"thinking": {"type": "disabled", "budget_tokens": 3}})
    assert body["content"][0]["thinking"] == "abcdefghij"
    speaks(served, "Yes", "none")  # a model that does not reason keeps every budget
    _, body = await served.post(MESSAGES, fields)
    assert body["content"] == [{"type": "text", "text": "Yes"}]
    speaks(served, "Yes")
    status, body = await served.post(MESSAGES, fields | {"thinking": {"type": "enabled", "budget_tokens": -1}})
    assert status == 400 and "thinking.budget_tokens" in body["error"]["message"]


async def test_openais_client_sends_them_in_its_extra_body(served: Served) -> None:
    speaks(served, "<think>abcdefghij</think>Yes")
    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model="dummy", messages=[USER], max_tokens=20, extra_body={"thinking_token_budget": 1, "bad_words": ["Y"]}
        )
    assert answer.choices[0].message.model_extra is not None
    assert answer.choices[0].message.model_extra["reasoning_content"] == "a"


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"allowed_token_ids": []}, "allowed_token_ids", "invalid_value"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids", "invalid_value"),
    ({"allowed_token_ids": [10**6]}, "allowed_token_ids", "token_id_out_of_range"),
    ({"allowed_token_ids": ["a"]}, "allowed_token_ids", "invalid_type"),
    ({"allowed_token_ids": [2**70]}, "allowed_token_ids", "invalid_value"),
    ({"bad_words": [""]}, "bad_words", "invalid_value"),
    ({"bad_words": [" "]}, "bad_words", "invalid_value"),
    ({"bad_words": ["a"] * 257}, "bad_words", "invalid_value"),
    ({"bad_words": ["a" * 257]}, "bad_words", "invalid_value"),
    ({"bad_words": "word"}, "bad_words", "invalid_type"),
    ({"bad_words": [1]}, "bad_words", "invalid_type"),
    ({"thinking_token_budget": -1}, "thinking_token_budget", "invalid_value"),
    ({"thinking_token_budget": 2**32}, "thinking_token_budget", "invalid_value"),
    ({"thinking_token_budget": "9"}, "thinking_token_budget", "invalid_type"),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD, ids=[str(fields)[:60] for fields, _, _ in BAD])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
async def test_what_is_refused_names_its_field(
    served: Served, path: str, fields: dict[str, Any], param: str, code: str
) -> None:
    speaks(served, "a")
    prompt: dict[str, Any] = {CHAT: {"messages": [USER]}, COMPLETIONS: {"prompt": "a"}, RESPONSES: {"input": "a"}}[path]
    status, body = await served.post(path, prompt | fields)
    assert status == 400, body
    assert (body["error"]["param"], body["error"]["code"]) == (param, code), body
    assert param in body["error"]["message"]
    assert served.engine.num_unfinished == 0


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_model_that_does_not_reason_has_no_budget(served: Served, path: str) -> None:
    speaks(served, "a", "none")
    prompt: dict[str, Any] = {"messages": [USER]} if path == CHAT else {"prompt": "a"}
    status, body = await served.post(path, prompt | {"thinking_token_budget": 5})
    assert status == 400
    assert (body["error"]["param"], body["error"]["code"]) == ("thinking_token_budget", "unsupported_parameter")


async def test_prompts_of_one_call_begin_alike(served: Served) -> None:
    speaks(served, "abcdefghijYes")
    fields = {"thinking_token_budget": 1, "max_tokens": 12}
    status, body = await served.post(COMPLETIONS, fields | {"prompt": ["a<think>", "b<think>\n"]})
    assert status == 200
    assert {choice["text"] for choice in body["choices"]} == {"a</think>jYe"}
    status, body = await served.post(COMPLETIONS, fields | {"prompt": ["a<think>", "b"]})
    assert status == 400 and body["error"]["param"] == "thinking_token_budget"
