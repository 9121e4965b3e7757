"""ollama-python: chats, completions, tools, formats, models, errors."""

import json

import ollama
from served import CALLED, CAPITAL, CITY_SCHEMA, MODEL, REAL, SCRIPTED, SUNNY, WEATHER

QUESTION = {"role": "user", "content": CAPITAL}
OPTIONS = {"temperature": 0, "num_predict": 32}


def weather(city: str) -> str:
    """The weather.

    Args:
        city: its name
    """
    return f"sunny in {city}"


real, scripted = ollama.Client(host=REAL), ollama.Client(host=SCRIPTED)

assert [model.model for model in real.list().models] == [MODEL]
assert "tools" in real.show(MODEL).capabilities
assert [model.model for model in real.ps().models] == [MODEL]
answer = real.chat(MODEL, [QUESTION], options=OPTIONS)
assert "Paris" in answer.message.content and answer.done and answer.done_reason == "stop"
streamed = list(real.chat(MODEL, [QUESTION], options=OPTIONS, stream=True))
assert "".join(part.message.content for part in streamed) == answer.message.content
assert streamed[-1].done and streamed[-1].eval_count == answer.eval_count > 0
assert real.generate(MODEL, "1, 2, 3, 4,", raw=True, options={"temperature": 0, "num_predict": 3}).response == " 5,"
formatted = real.chat(MODEL, [QUESTION], format=CITY_SCHEMA, options={"num_predict": 64})
assert json.loads(formatted.message.content)["name"] in ("Paris", "Rome", "Berlin")

conversation = [{"role": "user", "content": WEATHER}]
called = scripted.chat(MODEL, conversation, tools=[weather])
(call,) = called.message.tool_calls
assert (call.function.name, call.function.arguments) == ("weather", CALLED)
conversation += [
    called.message,
    {"role": "tool", "content": weather(**call.function.arguments), "tool_name": "weather"},
]
assert scripted.chat(MODEL, conversation, tools=[weather]).message.content == SUNNY

try:
    real.chat("another", [QUESTION])
except ollama.ResponseError as error:
    assert error.status_code == 404 and "another" in error.error
else:
    raise AssertionError("another model answered")
