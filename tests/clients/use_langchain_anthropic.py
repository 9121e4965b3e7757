"""langchain-anthropic: `ChatAnthropic`, streams, tools, structured output."""

from typing import Literal

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
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


def chat(url: str, **fields: object) -> ChatAnthropic:
    """A client."""
    return ChatAnthropic(base_url=url, api_key="none", model=MODEL, max_tokens=128, max_retries=0, **fields)


model = chat(REAL, temperature=0)
answer = model.invoke([SystemMessage("You are a helpful AI assistant."), HumanMessage(CAPITAL)])
assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 3
text = model.invoke(CAPITAL).content
assert "".join(part.text if isinstance(part.text, str) else part.text() for part in model.stream(CAPITAL)) == text
assert isinstance(model.with_structured_output(City, method="function_calling").invoke(CAPITAL), City)
assert model.get_num_tokens_from_messages([HumanMessage(CAPITAL)]) > 5

speaker = chat(SCRIPTED).bind_tools([weather])
called = speaker.invoke(WEATHER)
assert [(call["name"], call["args"]) for call in called.tool_calls] == [("weather", CALLED)]
streamed = None
for part in speaker.stream(WEATHER):
    streamed = part if streamed is None else streamed + part
assert [(call["name"], call["args"]) for call in streamed.tool_calls] == [("weather", CALLED)]
result = ToolMessage(weather.invoke(called.tool_calls[0]["args"]), tool_call_id=called.tool_calls[0]["id"])
assert speaker.invoke([HumanMessage(WEATHER), called, result]).content == SUNNY
