"""Anthropic's messages, as its own client reads them."""

import json
from typing import Any, Literal

import anthropic
import pydantic
import pytest

from octavo.answers import ModelAnswers
from octavo.config import EngineConfig
from octavo.server.config import ServerConfig
from tests.server.conftest import Served, serving
from tests.server.scripted_engine import ScriptedEngine

ROUTE = "/v1/messages"
USER: Any = {"role": "user", "content": "Hi"}
TOOL: Any = {"name": "weather", "description": "d", "input_schema": {"type": "object"}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "dummy", "max_tokens": 200, "messages": [USER], **fields}


def speaks(served: Served, answer: str = "Hello world") -> anthropic.AsyncAnthropic:
    """Has the model answer so, and gives a client."""
    served.engine.script.answer = answer.encode()
    config = EngineConfig(model="m", tool_call_parser="hermes", reasoning_parser="think")
    served.engine.answers = ModelAnswers(config, None, served.engine.tokenizer)
    return anthropic.AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0)


async def test_a_message(served: Served) -> None:
    async with speaks(served) as client:
        message = await client.messages.create(**asked(system="Be brief."))
        assert (message.type, message.role, message.stop_reason) == ("message", "assistant", "end_turn")
        assert [block.text for block in message.content if block.type == "text"] == ["Hello world"]
        prompt = len("<system>Be brief.<user>Hi")
        assert (message.usage.input_tokens, message.usage.output_tokens) == (prompt, 12)
        cut = await client.messages.create(**asked(max_tokens=3))
        assert cut.stop_reason == "max_tokens"
        stopped = await client.messages.create(**asked(stop_sequences=["wor"]))
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "wor")
        count = await client.messages.count_tokens(model="dummy", messages=[USER], system="Be brief.")
        assert count.input_tokens == prompt
        assert [model.id for model in (await client.models.list()).data] == ["org/tiny"]


async def test_a_stream_adds_up_in_the_client(served: Served) -> None:
    client = speaks(served, f"<think>hm</think>So {CALL}")
    async with client, client.messages.stream(**asked(tools=[TOOL])) as stream:
        message = await stream.get_final_message()
    thinking, text, call = message.content
    assert thinking.type == "thinking" and thinking.thinking == "hm"
    assert text.type == "text" and text.text == "So"
    assert call.type == "tool_use" and call.id.startswith("toolu_")
    assert (call.name, call.input) == ("weather", {"city": "Paris"})
    assert message.stop_reason == "tool_use" and message.usage.output_tokens > 60


async def test_calls_and_reasoning_in_one_piece(served: Served) -> None:
    async with speaks(served, f"<think>hm</think>{CALL}") as client:
        message = await client.messages.create(**asked(tools=[TOOL]))
    assert [block.type for block in message.content] == ["thinking", "tool_use"]
    speaks(served, CALL.replace('{"city": "Paris"}', '"Paris"'))
    _, body = await served.post(ROUTE, asked(tools=[TOOL]))
    assert body["content"][0]["input"] == {"INVALID_JSON": "Paris"}  # an input must be an object


async def test_a_conversation_with_tools_reaches_the_template(served: Served) -> None:
    speaks(served)
    turns = [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "text", "text": "Let me see.", "cache_control": {"type": "ephemeral"}},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And?"},
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Rain"}]},
            ],
        },
    ]
    _, body = await served.post(ROUTE + "/count_tokens", {"messages": [*turns, {"role": "assistant", "content": "It"}]})
    assert body == {"input_tokens": len("<user>Hi<assistant>Let me see.<tool>Rain<user>And?<assistant>It")}
    _, body = await served.post(ROUTE + "/count_tokens", {"messages": turns})
    assert body == {"input_tokens": len("<user>Hi<assistant>Let me see.<tool>Rain<user>And?")}


# (name, body, what the message names)
BAD = [
    ("no messages", {"max_tokens": 5}, "messages"),
    ("no max_tokens", {"messages": [USER]}, "max_tokens"),
    ("max_tokens 0", asked(max_tokens=0), "max_tokens"),
    ("role", asked(messages=[{"role": "system", "content": "x"}]), "role"),
    ("empty", asked(messages=[]), "messages"),
    ("image", asked(messages=[{"role": "user", "content": [{"type": "image"}]}]), "image"),
    ("no id", asked(messages=[{"role": "user", "content": [{"type": "tool_result"}]}]), "tool_use_id"),
    ("server tool", asked(tools=[{"type": "web_search_20250305", "name": "w"}]), "tools[0]"),
    ("bad tool", asked(tools=[{"name": "a b"}]), "tools[0]"),
    ("tool of none", asked(tool_choice={"type": "any"}), "tool_choice"),
    ("stop", asked(stop_sequences=[""]), "stop_sequences"),
    ("no JSON", b"{", "JSON"),
    ("unknown in thinking", asked(thinking={"type": "enabled", "budget": 1}), "thinking.budget"),
    ("unknown in tool_choice", asked(tools=[TOOL], tool_choice={"type": "any", "nme": "x"}), "tool_choice.nme"),
    ("unknown in output_config", asked(output_config={"form": {}}), "output_config.form"),
    ("unknown in format", asked(output_config={"format": {"type": "json_schema", "schema": {}, "a": 1}}), "format.a"),
    ("no schema", asked(output_config={"format": {"type": "json_schema"}}), "output_config.format.schema"),
    ("another format", asked(output_config={"format": {"type": "text"}}), "output_config.format"),
    ("bad schema", asked(output_format={"type": "json_schema", "schema": {"type": "list"}}), "schema"),
    ("effort", asked(output_config={"effort": "utmost"}), "output_config.effort"),
    ("hidden thinking", asked(thinking={"type": "adaptive", "display": "omitted"}), "thinking.display"),
    ("speed", asked(speed="fast"), "speed"),
    ("mcp", asked(mcp_servers=[{}]), "mcp_servers"),
]


@pytest.mark.parametrize(("body", "named"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
async def test_bad_requests(served: Served, body: Any, named: str) -> None:
    status, answer = await served.post(ROUTE, body)
    assert (status, answer["type"], answer["error"]["type"]) == (400, "error", "invalid_request_error")
    assert named in answer["error"]["message"]
    assert (await served.post(ROUTE, asked()))[0] == 200


class City(pydantic.BaseModel):
    """What is asked for."""

    name: Literal["Paris", "Rome"]
    is_capital: bool


async def test_answers_under_a_schema(served: Served) -> None:
    client = speaks(served)
    async with client:
        parsed = await client.messages.parse(**asked(output_format=City))
        assert isinstance(parsed.parsed_output, City)
        async with client.messages.stream(**asked(output_format=City)) as stream:
            assert City.model_validate_json((await stream.get_final_message()).content[0].text)  # type: ignore[union-attr]
    schema = {"type": "json_schema", "schema": {"enum": [7, 8]}}
    for fields in ({"output_config": {"format": schema, "effort": "low"}}, {"output_format": schema}):
        _, body = await served.post(ROUTE, asked(**fields, cache_control={"type": "ephemeral"}, speed="standard"))
        assert body["content"][0]["text"] in ("7", "8")


async def test_another_model(served: Served) -> None:
    status, answer = await served.post(ROUTE, asked(model="other"))
    assert (status, answer["error"]["type"]) == (404, "not_found_error")


async def test_failures_are_events_of_their_own(served: Served) -> None:
    served.engine.script.fail_after = 1
    async with served.http.post(served.url + ROUTE, json=asked(stream=True)) as response:
        text = (await response.read()).decode()
    last = text.split("\n\n")[-2]
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.partition("data: ")[2])["error"]["type"] == "api_error"
    assert "message_stop" not in text


async def test_keys() -> None:
    async for served in serving(ScriptedEngine(), ServerConfig(api_key=("secret",))):
        assert (await served.post(ROUTE, asked(), headers={"X-Api-Key": "secret"}))[0] == 200
        for headers in ({}, {"X-Api-Key": "other"}, {"X-Api-Key": "secret", "Authorization": "Bearer other"}):
            status, body = await served.post(ROUTE, asked(), headers=headers)
            assert (status, body["error"]["type"]) == (401, "authentication_error")
