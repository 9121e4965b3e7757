"""llama-index-llms-openai-like: completions and chats, streams, tools, structured answers."""

from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field
from served import CALLED, CAPITAL, MODEL, REAL, SCRIPTED, WEATHER


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]
    districts: int = Field(ge=1, le=99)


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def model(url: str, **fields: object) -> OpenAILike:
    """A client."""
    return OpenAILike(
        model=MODEL, api_base=url + "/v1", api_key="none", is_chat_model=True, max_retries=0, temperature=0,
        context_window=4096, max_tokens=64, **fields,
    )  # fmt: skip


llm = model(REAL, is_function_calling_model=True)
answer = llm.chat([ChatMessage(role="user", content=CAPITAL)])
assert "Paris" in answer.message.content
deltas = [part.delta or "" for part in llm.stream_chat([ChatMessage(role="user", content=CAPITAL)])]
assert "".join(deltas) == answer.message.content
text = OpenAILike(model=MODEL, api_base=REAL + "/v1", api_key="none", is_chat_model=False, temperature=0, max_tokens=4)
assert text.complete("1, 2, 3, 4, 5,").text.startswith(" 6")
assert "".join(part.delta or "" for part in text.stream_complete("1, 2, 3, 4, 5,")).startswith(" 6")
city = llm.structured_predict(City, PromptTemplate(CAPITAL))
assert isinstance(city, City)
tools = [FunctionTool.from_defaults(fn=weather)]
speaker = model(SCRIPTED, is_function_calling_model=True)
called = speaker.chat_with_tools(tools, user_msg=WEATHER)
(call,) = speaker.get_tool_calls_from_response(called)
assert (call.tool_name, call.tool_kwargs) == ("weather", CALLED)
