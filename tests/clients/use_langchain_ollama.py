"""langchain-ollama: `ChatOllama` and `OllamaLLM`, streams, tools, structured output."""

from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaLLM
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


model = ChatOllama(base_url=REAL, model=MODEL, temperature=0, num_predict=64, validate_model_on_init=True)
answer = model.invoke(CAPITAL)
assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 3
assert "".join(part.content for part in model.stream(CAPITAL)) == answer.content
assert isinstance(model.with_structured_output(City).invoke(CAPITAL), City)
text = OllamaLLM(base_url=REAL, model=MODEL, temperature=0, num_predict=32)
assert "Paris" in text.invoke(CAPITAL)
assert "".join(text.stream(CAPITAL)) == text.invoke(CAPITAL)

speaker = ChatOllama(base_url=SCRIPTED, model=MODEL).bind_tools([weather])
called = speaker.invoke(WEATHER)
assert [(call["name"], call["args"]) for call in called.tool_calls] == [("weather", CALLED)]
result = ToolMessage(weather.invoke(called.tool_calls[0]["args"]), tool_call_id=called.tool_calls[0]["id"])
assert speaker.invoke([HumanMessage(WEATHER), called, result]).content == SUNNY
