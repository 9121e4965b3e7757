"""langchain-openai: `ChatOpenAI` and `OpenAI`, streams, batches, structured output three ways, tools."""

import asyncio
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field
from served import CALLED, CAPITAL, MODEL, REAL, SCRIPTED, SUNNY, WEATHER


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]
    districts: int = Field(ge=1, le=99)


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def chat(url: str, **fields: object) -> ChatOpenAI:
    """A client."""
    return ChatOpenAI(base_url=url + "/v1", api_key="none", model=MODEL, max_retries=0, **fields)


model = chat(REAL, temperature=0, max_tokens=64)
answer = model.invoke(CAPITAL)
assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 3
assert "".join(part.content for part in model.stream(CAPITAL)) == answer.content
assert [one.content for one in model.batch([CAPITAL, CAPITAL])] == [answer.content] * 2


async def use_async() -> str:
    """A stream."""
    return "".join([part.content async for part in model.astream(CAPITAL)])


assert asyncio.run(use_async()) == answer.content
text = OpenAI(base_url=REAL + "/v1", api_key="none", model=MODEL, temperature=0, max_tokens=4)
assert text.invoke("1, 2, 3, 4, 5,").startswith(" 6")
assert "".join(text.stream("1, 2, 3, 4, 5,")).startswith(" 6")
for method in ("json_schema", "function_calling"):
    city = model.with_structured_output(City, method=method).invoke(CAPITAL)
    assert isinstance(city, City), (method, city)
loose = model.bind(response_format={"type": "json_object"}).invoke("Write a JSON object with the key a and a number.")
assert loose.content.lstrip().startswith("{")

speaker = chat(SCRIPTED).bind_tools([weather])
called = speaker.invoke(WEATHER)
assert [(call["name"], call["args"]) for call in called.tool_calls] == [("weather", CALLED)]
streamed = None
for part in speaker.stream(WEATHER):
    streamed = part if streamed is None else streamed + part
assert [(call["name"], call["args"]) for call in streamed.tool_calls] == [("weather", CALLED)]
result = ToolMessage(weather.invoke(called.tool_calls[0]["args"]), tool_call_id=called.tool_calls[0]["id"])
assert speaker.invoke([HumanMessage(WEATHER), called, result]).content == SUNNY
forced = model.bind_tools([weather], tool_choice="weather").invoke(WEATHER)
assert forced.tool_calls[0]["args"]["city"] in ("Paris", "Rome")

embedder = OpenAIEmbeddings(base_url=REAL + "/v1", api_key="none", model=MODEL, check_embedding_ctx_length=False)
assert len(embedder.embed_documents(["a", "b"])) == 2 and len(embedder.embed_query("a")) == 576

try:
    model.invoke("word " * 20_000)
except Exception as error:
    assert "maximum context length" in str(error), error
    assert type(error).__name__ in ("BadRequestError", "ContextOverflowError", "OpenAIContextOverflowError"), type(
        error
    )
else:
    raise AssertionError("a prompt of 20,000 words was taken")
