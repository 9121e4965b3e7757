"""Calls of tools and reasoning in chats: streamed and whole, as OpenAI's client reads them."""

import json
from typing import Any

import openai
import pytest

from octavo.answers import ModelAnswers
from octavo.config import EngineConfig
from tests.server.conftest import Served

CHAT = "/v1/chat/completions"
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
USER: Any = {"role": "user", "content": "Weather in Paris?"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def speaks(served: Served, answer: str, **parsers: str) -> openai.AsyncOpenAI:
    """Has the model answer so, and gives a client."""
    served.engine.script.answer = answer.encode()
    config = EngineConfig(model="m", **({"tool_call_parser": "hermes", "reasoning_parser": "think"} | parsers))
    served.engine.answers = ModelAnswers(config, None, served.engine.tokenizer)
    return openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


async def test_a_call_in_one_piece(served: Served) -> None:
    async with speaks(served, f"Let me see. {CALL}") as client:
        answer = await client.chat.completions.create(model="dummy", messages=[USER], tools=[TOOL])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})


async def test_content_is_null_beside_calls_alone(served: Served) -> None:
    speaks(served, CALL)
    status, body = await served.post(CHAT, {"messages": [USER], "tools": [TOOL]})
    assert status == 200
    message = body["choices"][0]["message"]
    assert message["content"] is None and message["tool_calls"][0]["function"]["name"] == "weather"


async def test_streamed_calls_add_up_in_the_client(served: Served) -> None:
    """openai-python's own accumulator puts the deltas together."""
    second = CALL.replace("Paris", "Rome")
    client = speaks(served, f"<think>hm</think>\n\nSo: {CALL}\n{second}")
    async with client, client.chat.completions.stream(model="dummy", messages=[USER], tools=[TOOL]) as stream:
        chunks = [event.chunk async for event in stream if event.type == "chunk"]
        final = await stream.get_final_completion()
    message = final.choices[0].message
    assert message.content == "So:"
    assert message.tool_calls is not None
    read = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
    assert read == [("weather", {"city": "Paris"}), ("weather", {"city": "Rome"})]
    assert len({call.id for call in message.tool_calls}) == 2
    assert final.choices[0].finish_reason == "tool_calls"
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    first = deltas[0]
    assert first.function is not None and first.id is not None
    assert (first.index, first.type, first.function.name, first.function.arguments) == (0, "function", "weather", "")
    assert all(delta.id is None for delta in deltas[1 : [delta.index for delta in deltas].index(1)])
    assert len(deltas) > 10  # pieces of arguments, as they come


async def test_one_call_where_they_may_not_be_parallel(served: Served) -> None:
    speaks(served, CALL + CALL)
    _, body = await served.post(CHAT, {"messages": [USER], "tools": [TOOL], "parallel_tool_calls": False})
    assert len(body["choices"][0]["message"]["tool_calls"]) == 1


@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL], "tool_choice": "none"}], ids=["no tools", "none"])
async def test_without_tools_to_call_it_is_text(served: Served, fields: dict[str, Any]) -> None:
    speaks(served, CALL)
    _, body = await served.post(CHAT, {"messages": [USER], **fields})
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": CALL}
    assert choice["finish_reason"] == "stop"


async def test_a_broken_call_is_content_and_a_cut_one_keeps_its_reason(served: Served) -> None:
    speaks(served, "<tool_call>{weather(Paris)}</tool_call>")
    _, body = await served.post(CHAT, {"messages": [USER], "tools": [TOOL]})
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "<tool_call>{weather(Paris)}</tool_call>"}
    assert body["choices"][0]["finish_reason"] == "stop"
    speaks(served, CALL)
    _, body = await served.post(CHAT, {"messages": [USER], "tools": [TOOL], "max_tokens": CALL.index("Paris")})
    choice = body["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'


async def test_ids_of_mistral_have_nine_letters(served: Served) -> None:
    speaks(served, '[TOOL_CALLS][{"name": "weather", "arguments": {}}]', tool_call_parser="mistral")
    _, body = await served.post(CHAT, {"messages": [USER], "tools": [TOOL]})
    identity = body["choices"][0]["message"]["tool_calls"][0]["id"]
    assert len(identity) == 9 and identity.isalnum()


async def test_reasoning_is_split_off(served: Served) -> None:
    speaks(served, "<think>\nhm\n</think>\n\nYes")
    _, body = await served.post(CHAT, {"messages": [USER]})
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Yes",
        "reasoning_content": "hm",
        "reasoning": "hm",
    }
    _, body = await served.post(CHAT, {"messages": [USER], "include_reasoning": False})
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Yes"}
    events = await served.events(CHAT, {"messages": [USER]})
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes"


async def test_a_prompt_that_opens_the_reasoning(served: Served) -> None:
    speaks(served, "hm</think>Yes")
    opened = {"messages": [USER], "chat_template_kwargs": {"extra": "<think>\n"}}
    _, body = await served.post(CHAT, opened)
    message = body["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("hm", "Yes")
    _, body = await served.post(CHAT, opened | {"max_tokens": 2})
    message = body["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("hm", None)


async def test_log_probabilities_come_once_a_token(served: Served) -> None:
    answer = f"<think>hm</think>a{CALL}"
    speaks(served, answer)
    request = {"messages": [USER], "tools": [TOOL], "logprobs": True}
    events = await served.events(CHAT, request)
    entries = [
        entry for event in events[:-1] for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(entry["token"] for entry in entries if entry["token"]) == answer
    reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
    assert reasons[-1] == "tool_calls" and not any(reasons[:-1])


ROME = {"name": "weather", "parameters": {"city": "Rome"}}
CITY: Any = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Paris", "Rome"]}},
}
STRICT: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY}}


async def test_a_named_tool_is_called(served: Served) -> None:
    """The answer is its arguments; nothing around them says so."""
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    async with speaks(served, '{"city": "Rome"}') as client:
        answer = await client.chat.completions.create(
            model="dummy", messages=[USER], tools=[STRICT], tool_choice=choice
        )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert (call.type, answer.choices[0].finish_reason) == ("function", "tool_calls")
    assert call.type == "function" and (call.function.name, call.function.arguments) == ("weather", '{"city": "Rome"}')
    assert answer.choices[0].message.content is None


async def test_some_tool_must_be_called(served: Served) -> None:
    client = speaks(served, json.dumps([ROME, {"name": "g", "parameters": {}}]))
    tools: Any = [STRICT, {"type": "function", "function": {"name": "g"}}]
    request: Any = {"model": "dummy", "messages": [USER], "tools": tools, "tool_choice": "required"}
    async with client, client.chat.completions.stream(**request) as stream:
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls or ()
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("weather", {"city": "Rome"}),
        ("g", {}),
    ]


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ('{"city": "Oslo"}', {"type": "function", "function": {"name": "weather"}}),
        ('[{"name": "weather", "parameters": {"city": "Oslo"}}]', "required"),
        ("I would rather not.", "required"),
    ],
    ids=["named", "required", "text"],
)
async def test_a_model_that_wants_something_else_cannot(served: Served, answer: str, choice: Any) -> None:
    """The scripted engine draws what the mask allows, where its script is not allowed."""
    speaks(served, answer)
    body = {"messages": [USER], "tools": [STRICT], "tool_choice": choice, "parallel_tool_calls": False}
    status, got = await served.post(CHAT, body)
    assert status == 200
    (call,) = got["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")


OTHER: Any = {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}


def allowed(mode: str, *names: str) -> Any:
    """A `tool_choice` that leaves these tools alone."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


async def test_the_model_does_not_see_tools_that_are_not_allowed(served: Served) -> None:
    async with speaks(served, CALL) as client:
        ask: Any = {"model": "dummy", "messages": [USER], "tool_choice": allowed("auto", "weather")}
        answer = await client.chat.completions.create(tools=[OTHER, TOOL], **ask)
        alone = await client.chat.completions.create(tools=[TOOL], model="dummy", messages=[USER])
        async with client.chat.completions.stream(tools=[TOOL, OTHER], **ask) as stream:
            final = await stream.get_final_completion()
        speaks(served, "None.")
        free = await client.chat.completions.create(tools=[OTHER, TOOL], **ask)
    for message in (answer.choices[0].message, alone.choices[0].message, final.choices[0].message):
        assert [call.function.name for call in message.tool_calls or ()] == ["weather"]  # type: ignore[union-attr]
    assert (free.choices[0].message.content, free.choices[0].finish_reason) == ("None.", "stop")
    assert answer.usage is not None and alone.usage is not None
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens


@pytest.mark.parametrize("answer", ["No.", json.dumps([{"name": "g", "parameters": {}}])], ids=["text", "another"])
async def test_one_of_those_allowed_must_be_called(served: Served, answer: str) -> None:
    speaks(served, answer)
    body = {"messages": [USER], "tools": [OTHER, STRICT], "tool_choice": allowed("required", "weather")}
    status, got = await served.post(CHAT, body | {"parallel_tool_calls": False})
    assert status == 200
    (call,) = got["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")


def without(choice: dict[str, Any], field: str) -> dict[str, Any]:
    """The same, less a field of its inner object."""
    return choice | {"allowed_tools": {name: value for name, value in choice["allowed_tools"].items() if name != field}}


@pytest.mark.parametrize(
    ("choice", "code", "named"),
    [
        (allowed("auto", "h"), "invalid_value", "'h'"),
        (allowed("auto"), "invalid_value", "at least one"),
        (allowed("none", "g"), "invalid_value", "mode must be"),
        (without(allowed("auto", "g"), "mode"), "missing_required_parameter", "allowed_tools.mode"),
        (without(allowed("auto", "g"), "tools"), "missing_required_parameter", "allowed_tools.tools"),
        ({"type": "allowed_tools"}, "missing_required_parameter", "allowed_tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "unknown_parameter", "tool_choice.mode"),
        ({"type": "function"}, "missing_required_parameter", "function"),
        ({"type": "custom", "custom": {"name": "g"}}, "unknown_parameter", "tool_choice.custom"),
        ({"type": "custom"}, "invalid_value", "type"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "mcp"}]}},
            "missing_required_parameter",
            "function",
        ),
    ],
)
async def test_choices_that_are_none(served: Served, choice: Any, code: str, named: str) -> None:
    status, body = await served.post(CHAT, {"messages": [USER], "tools": [TOOL, OTHER], "tool_choice": choice})
    assert (status, body["error"]["code"]) == (400, code) and named in body["error"]["message"]
    assert body["error"]["param"].startswith("tool_choice")


def test_definitions_of_two_tools_stay_apart() -> None:
    from octavo.server.openai.forced_calls import schema_of_calls

    other = {**CITY, "$defs": {"City": {"enum": ["Oslo"]}}}
    functions = [{"name": "f", "parameters": CITY}, {"name": "g", "parameters": other}, {"name": "h"}]
    schema = schema_of_calls(functions, parallel=True)
    assert schema["$defs"]["0"]["properties"]["city"] == {"$ref": "#/$defs/0/$defs/City"}
    assert schema["$defs"]["1"]["properties"]["city"] == {"$ref": "#/$defs/1/$defs/City"}
    assert schema_of_calls(functions, parallel=False)["maxItems"] == 1
    recursive = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    moved = schema_of_calls([{"name": "f", "parameters": recursive}], parallel=True)
    assert moved["$defs"]["0"]["properties"]["next"] == {"$ref": "#/$defs/0"}
