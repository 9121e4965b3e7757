"""langchain-huggingface: `HuggingFaceEndpoint` on TGI's routes, `ChatHuggingFace` on chats."""

from langchain_core.messages import HumanMessage
from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint
from served import CALLED, CAPITAL, MODEL, REAL, SCRIPTED, WEATHER, WEATHER_SCHEMA

TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": WEATHER_SCHEMA}}
PROMPT = "1, 2, 3, 4, 5,"

endpoint = HuggingFaceEndpoint(endpoint_url=REAL, max_new_tokens=6, temperature=0.01, task="text-generation")
text = endpoint.invoke(PROMPT)
assert text.startswith(" 6, 7"), text
assert "".join(endpoint.stream(PROMPT)) == text
chat = ChatHuggingFace(llm=endpoint, model_id=MODEL, max_tokens=32)
answer = chat.invoke([HumanMessage(CAPITAL)])
assert "Paris" in answer.content, answer
assert "".join(part.content for part in chat.stream([HumanMessage(CAPITAL)])) == answer.content
scripted = HuggingFaceEndpoint(endpoint_url=SCRIPTED, task="text-generation")
called = ChatHuggingFace(llm=scripted, model_id=MODEL).bind_tools([TOOL]).invoke([HumanMessage(WEATHER)])
assert [(call["name"], call["args"]) for call in called.tool_calls] == [("weather", CALLED)]
