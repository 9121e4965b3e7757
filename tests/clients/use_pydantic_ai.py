"""pydantic-ai: text, streams, tools, outputs by tools and by schema."""

import asyncio
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from served import CAPITAL, MODEL, REAL, SCRIPTED, SUNNY, WEATHER


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]
    districts: int = Field(ge=1, le=99)


def model(url: str) -> OpenAIChatModel:
    """A client."""
    return OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url + "/v1", api_key="none"))


SETTINGS = {"temperature": 0.0, "max_tokens": 128}
agent = Agent(model(REAL), model_settings=SETTINGS)
answer = agent.run_sync(CAPITAL)
assert "Paris" in answer.output


async def streamed() -> str:
    """The same in parts."""
    async with agent.run_stream(CAPITAL) as result:
        return "".join([part async for part in result.stream_text(delta=True)])


assert asyncio.run(streamed()) == answer.output
for form in (ToolOutput(City), NativeOutput(City)):
    typed = Agent(model(REAL), output_type=form, model_settings=SETTINGS)
    assert isinstance(typed.run_sync(CAPITAL).output, City), form

speaker = Agent(model(SCRIPTED))
cities = []


@speaker.tool_plain
def weather(city: str) -> str:
    """The weather in a city."""
    cities.append(city)
    return "sunny"


assert speaker.run_sync(WEATHER).output == SUNNY and cities == ["Paris"]
