"""haystack-ai: `OpenAIChatGenerator` and `OpenAIGenerator`, callbacks, tools, structured answers."""

import json

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret
from served import CALLED, CAPITAL, CITY_SCHEMA, MODEL, REAL, SCRIPTED, SUNNY, WEATHER, WEATHER_SCHEMA


def generator(url: str, **fields: object) -> OpenAIChatGenerator:
    """A client."""
    return OpenAIChatGenerator(
        api_key=Secret.from_token("none"), model=MODEL, api_base_url=url + "/v1", max_retries=0, **fields
    )


OPTIONS = {"temperature": 0, "max_tokens": 64}
question = [ChatMessage.from_user(CAPITAL)]
answer = generator(REAL, generation_kwargs=OPTIONS).run(question)["replies"][0]
assert (
    "Paris" in answer.text and answer.meta["finish_reason"] == "stop" and answer.meta["usage"]["completion_tokens"] > 3
)
parts = []
streamed = generator(REAL, generation_kwargs=OPTIONS, streaming_callback=parts.append).run(question)["replies"][0]
assert streamed.text == answer.text == "".join(part.content for part in parts)
schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True}}
formatted = generator(REAL, generation_kwargs={**OPTIONS, "response_format": schema}).run(question)["replies"][0]
assert json.loads(formatted.text)["name"] in ("Paris", "Rome", "Berlin")

tool = Tool(name="weather", description="d", parameters=WEATHER_SCHEMA, function=lambda city: f"sunny in {city}")
conversation = [ChatMessage.from_user(WEATHER)]
called = generator(SCRIPTED, tools=[tool]).run(conversation)["replies"][0]
(call,) = called.tool_calls
assert (call.tool_name, call.arguments) == ("weather", CALLED)
conversation += [called, ChatMessage.from_tool(tool_result="sunny", origin=call)]
assert generator(SCRIPTED, tools=[tool]).run(conversation)["replies"][0].text == SUNNY
