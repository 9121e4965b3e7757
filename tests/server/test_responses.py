"""OpenAI's responses, as its own client makes and reads them."""

import json
from typing import Any

import openai
import pydantic
import pytest

from octavo.answers import ModelAnswers
from octavo.config import EngineConfig
from tests.server.conftest import Served

ROUTE = "/v1/responses"
TOOL: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def speaks(served: Served, answer: str | bytes) -> openai.AsyncOpenAI:
    """Has the model answer so, and gives a client."""
    served.engine.script.answer = answer if isinstance(answer, bytes) else answer.encode()
    config = EngineConfig(model="m", tool_call_parser="hermes", reasoning_parser="think")
    served.engine.answers = ModelAnswers(config, None, served.engine.tokenizer)
    return openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


async def shown(served: Served, **fields: Any) -> str:
    """The prompt that a request makes, as the scripted template and tokenizer have it."""
    prompts = []
    encode = served.engine.encode_chat

    async def recorded(messages_json: str, *args: Any, **kwargs: Any) -> Any:
        prompts.append(messages_json)
        return await encode(messages_json, *args, **kwargs)

    served.engine.encode_chat = recorded
    status, body = await served.post(ROUTE, {"max_output_tokens": 4, **fields})
    served.engine.encode_chat = encode
    assert status == 200, body
    return prompts[0]


async def test_an_answer(served: Served) -> None:
    async with speaks(served, "Hello") as client:
        answer = await client.responses.create(
            model="dummy",
            input="Hi",
            instructions="Be kind.",
            max_output_tokens=100,
            metadata={"a": "b"},
            temperature=0.5,
            top_p=0.9,
            store=True,
        )
    assert (answer.object, answer.status, answer.output_text, answer.error) == ("response", "completed", "Hello", None)
    assert answer.id.startswith("resp_")
    assert answer.usage is not None
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (6, answer.usage.input_tokens + 6)
    assert (answer.instructions, answer.max_output_tokens, answer.metadata) == ("Be kind.", 100, {"a": "b"})
    assert (answer.temperature, answer.top_p, answer.tool_choice, answer.tools) == (0.5, 0.9, "auto", [])
    assert answer.model_extra is None or answer.model_extra.get("store") is False  # nothing is


async def test_a_stream_in_the_clients_own_accumulator(served: Served) -> None:
    client = speaks(served, f"<think>hm</think>\n\nSo: {CALL}\n{CALL.replace('Paris', 'Rome')}")
    async with client, client.responses.stream(model="dummy", input="Hi", tools=[TOOL]) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    assert final.output[0].type == "reasoning" and final.output[0].content is not None
    assert final.output[0].content[0].text == "hm"
    assert final.output_text == "So:"
    calls = [item for item in final.output if item.type == "function_call"]
    assert [json.loads(call.arguments) for call in calls] == [{"city": "Paris"}, {"city": "Rome"}]
    assert len({call.call_id for call in calls}) == 2
    assert final.usage is not None and final.usage.output_tokens_details.reasoning_tokens == len(">hm</think>")


async def test_whole_and_streamed_answers_are_the_same(served: Served) -> None:
    async with speaks(served, f"<think>hm</think>\n\nSo: {CALL} and {CALL}") as client:
        fields: Any = {"model": "dummy", "input": "Hi", "tools": [TOOL]}
        whole = await client.responses.create(**fields)
        events = [event async for event in await client.responses.create(**fields, stream=True)]
    last = events[-1]
    assert last.type == "response.completed"

    def bare(response: Any) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in item.to_dict().items() if name not in ("id", "call_id")}
            for item in response.output
        ]

    assert bare(whole) == bare(last.response)
    assert [item["type"] for item in bare(whole)] == [
        "reasoning", "message", "function_call", "message", "function_call"
    ]  # fmt: skip


class Thing(pydantic.BaseModel):
    name: str
    size: int


async def test_parsed_answers(served: Served) -> None:
    async with speaks(served, b'{"name": "a", "size": 3}') as client:
        answer = await client.responses.parse(model="dummy", input="Hi", text_format=Thing)
        assert answer.output_parsed == Thing(name="a", size=3)
        async with client.responses.stream(model="dummy", input="Hi", text_format=Thing) as stream:
            final = await stream.get_final_response()
    assert final.output_parsed == Thing(name="a", size=3)


async def test_a_schema_bounds_the_answer(served: Served) -> None:
    """The model does not speak JSON; the format makes it."""
    speaks(served, "no JSON")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "x", "strict": True, "schema": schema}
    status, body = await served.post(ROUTE, {"input": "Hi", "text": {"format": form}})
    assert status == 200, body
    assert json.loads(body["output"][0]["content"][0]["text"])["a"] in (1, 2)
    assert body["text"] == {"format": form}
    status, body = await served.post(
        ROUTE,
        {"input": "Hi", "max_output_tokens": 300, "text": {"format": {"type": "json_object"}, "verbosity": "low"}},
    )
    assert status == 200 and body["output"][0]["content"][0]["text"].lstrip().startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
async def test_forced_calls(served: Served, choice: Any) -> None:
    tool = TOOL | {
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        }
    }
    async with speaks(served, "text") as client:
        answer = await client.responses.create(
            model="dummy", input="Hi", tools=[tool], tool_choice=choice, parallel_tool_calls=False
        )
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")


async def test_only_allowed_tools_are_called(served: Served) -> None:
    """The answer tells the choice as it was given."""
    other: Any = {"type": "function", "name": "g", "parameters": {"type": "object"}}
    choice: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    async with speaks(served, '[{"name": "g", "parameters": {}}]') as client:
        ask: Any = {"model": "dummy", "input": "Hi", "parallel_tool_calls": False}
        answer = await client.responses.create(tools=[other, TOOL], tool_choice=choice, **ask)
        alone = await client.responses.create(tools=[TOOL], tool_choice="required", **ask)
        (call,) = answer.output
        assert call.type == "function_call" and call.name == "weather"
        assert answer.usage is not None and alone.usage is not None
        assert answer.usage.input_tokens == alone.usage.input_tokens
        assert answer.to_dict()["tool_choice"] == choice
        speaks(served, "No.")
        free = await client.responses.create(tools=[other, TOOL], tool_choice=choice | {"mode": "auto"}, **ask)
        assert free.output_text == "No."


async def test_what_was_answered_is_taken_back(served: Served) -> None:
    """A client sends the output as input, with what its functions gave."""
    async with speaks(served, f"<think>hm</think>So: {CALL}") as client:
        first = await client.responses.create(model="dummy", input="Hi", tools=[TOOL])
        items = [item.to_dict() for item in first.output]
        call_id = items[-1]["call_id"]
        given = [
            {"role": "user", "content": "Hi"},
            *items,
            {"type": "function_call_output", "call_id": call_id, "output": "20 degrees"},
            {"role": "user", "content": [{"type": "input_text", "text": "And?"}]},
        ]
        told = json.loads(await shown(served, input=given, instructions="Be kind.", tools=[TOOL]))
    assert told == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "So:",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
            ],
        },
        {"role": "tool", "content": "20 degrees", "tool_call_id": call_id},
        {"role": "user", "content": "And?"},
    ]


async def test_items_of_one_turn_are_one_message(served: Served) -> None:
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    said: dict[str, Any] = {"role": "assistant", "content": "x"}
    user = {"role": "user", "content": "u"}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}
    told = json.loads(await shown(served, input=[user, call, call, user, thought, said, call, user]))
    assert [
        (len(message.get("tool_calls", ())), message["content"], message.get("reasoning_content"))
        for message in told
        if message["role"] == "assistant"
    ] == [(2, "", None), (1, "x", "s")]


async def test_reasoning_effort_reaches_the_template(served: Served) -> None:
    seen = []
    encode = served.engine.encode_chat

    async def recorded(*args: Any, kwargs_json: str | None, **kwargs: Any) -> Any:
        seen.append(json.loads(kwargs_json or "{}"))
        return await encode(*args, kwargs_json=kwargs_json, **kwargs)

    served.engine.encode_chat = recorded
    for effort in ("none", "high"):
        status, body = await served.post(ROUTE, {"input": "Hi", "reasoning": {"effort": effort, "summary": "auto"}})
        assert status == 200 and body["reasoning"] == {"effort": effort, "summary": "auto"}
    assert seen == [
        {"reasoning_effort": "none", "enable_thinking": False},
        {"reasoning_effort": "high", "enable_thinking": True},
    ]


async def test_tokens_of_the_input_are_counted(served: Served) -> None:
    async with speaks(served, "a") as client:
        fields: Any = {"model": "dummy", "input": "Hi there", "instructions": "Be kind.", "tools": [TOOL]}
        counted = await client.responses.input_tokens.count(**fields)
        answer = await client.responses.create(**fields)
    assert answer.usage is not None
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", answer.usage.input_tokens)


async def test_an_answer_that_is_cut(served: Served) -> None:
    async with speaks(served, "Hello") as client:
        answer = await client.responses.create(model="dummy", input="Hi", max_output_tokens=3)
        assert answer.status == "incomplete" and answer.output_text == "Hel"
        assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
        types = [
            event.type
            async for event in await client.responses.create(
                model="dummy", input="Hi", max_output_tokens=3, stream=True
            )
        ]
    assert types[-1] == "response.incomplete"


async def test_a_failure_is_raised(served: Served) -> None:
    served.engine.script.fail_after = 2
    async with speaks(served, "Hello") as client:
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(model="dummy", input="Hi")
        with pytest.raises(openai.APIError, match="could not be used"):
            async for _ in await client.responses.create(model="dummy", input="Hi", stream=True):
                pass


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "missing_required_parameter"),
    ({"input": []}, "input", "invalid_value"),
    ({"input": 3}, "input", "invalid_type"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input", "missing_required_parameter"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input", "missing_required_parameter"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "unsupported_content"),
    ({"input": [{"type": "web_search_call", "id": "a"}]}, "input", "unsupported_content"),
    ({"input": [{"content": "a"}]}, "input", "missing_required_parameter"),
    ({"input": [{"role": "user"}]}, "input", "missing_required_parameter"),
    ({"input": [{"role": "wizard", "content": "a"}]}, "input", "invalid_value"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "unsupported_content"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input", "missing_required_parameter"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
    ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
    ({"background": True}, "background", "unsupported_parameter"),
    ({"prompt": {"id": "a"}}, "prompt", "unsupported_parameter"),
    ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
    ({"top_logprobs": 2}, "top_logprobs", "unsupported_parameter"),
    ({"include": ["file_search_call.results"]}, "include", "unsupported_parameter"),
    ({"tools": [{"type": "web_search"}]}, "tools", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, "tools", "missing_required_parameter"),
    ({"tools": [{"type": "function", "name": 3}]}, "tools", "invalid_type"),
    ({"tools": [TOOL | {"parameters": {"type": "thing"}}]}, "tools", "invalid_schema"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "invalid_value"),
    ({"tool_choice": {"type": "mcp"}}, "tool_choice", "unsupported_parameter"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice", "missing_required_parameter"),
    ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice", "missing_required_parameter"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice", "invalid_value"),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
        "tool_choice",
        "unsupported_parameter",
    ),
    (
        {
            "tool_choice": {"type": "allowed_tools", "mode": "no", "tools": [{"type": "function", "name": "weather"}]},
            "tools": [TOOL],
        },
        "tool_choice",
        "invalid_value",
    ),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}},
        "tool_choice",
        "invalid_value",
    ),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "invalid_value"),
    ({"reasoning": {"effort": "endless"}}, "reasoning", "invalid_value"),
    ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"max_output_tokens": "9"}, "max_output_tokens", "invalid_type"),
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"metadata": {"a": 1}}, "metadata", "invalid_type"),
    ({"input": "a" * 3000}, "input", "context_length_exceeded"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD, ids=[str(fields)[:60] for fields, _, _ in BAD])
async def test_what_is_refused_names_its_field(served: Served, fields: dict[str, Any], param: str, code: str) -> None:
    for stream in (False, True):
        status, body = await served.post(ROUTE, {"input": "Hi", "stream": stream, **fields})
        assert status == 400, body
        error = body["error"]
        assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error"), error
        assert param.partition(".")[0] in error["message"] or code == "context_length_exceeded"
        assert "response_format" not in error["message"]
    status, body = await served.post(ROUTE, {"input": "Hi"})
    assert status == 200 and served.engine.num_unfinished == 0
