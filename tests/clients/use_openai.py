"""openai-python: whole and streamed, sync and async, log probabilities, tools, typed answers, responses,
errors.
"""

import asyncio
import json
from typing import Literal

import openai
from pydantic import BaseModel
from served import CALLED, CAPITAL, MODEL, REAL, SCRIPTED, SUNNY, WEATHER, WEATHER_SCHEMA

QUESTION = {"role": "user", "content": CAPITAL}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": WEATHER_SCHEMA}}


class City(BaseModel):
    """What `.parse` asks for."""

    is_capital: bool
    size: Literal["small", "large"]


real = openai.OpenAI(base_url=REAL + "/v1", api_key="none", max_retries=0)
scripted = openai.OpenAI(base_url=SCRIPTED + "/v1", api_key="none", max_retries=0)

# Models, a chat, the same streamed, a completion.
assert [model.id for model in real.models.list()] == [MODEL]
assert real.models.retrieve(MODEL).object == "model"
answer = real.chat.completions.create(model=MODEL, messages=[QUESTION], temperature=0, max_tokens=32)
text = answer.choices[0].message.content
assert text == "The capital of France is Paris." and answer.choices[0].finish_reason == "stop"
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
chunks = list(
    real.chat.completions.create(
        model=MODEL, messages=[QUESTION], temperature=0, max_tokens=32, stream=True,
        stream_options={"include_usage": True},
    )
)  # fmt: skip
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
completion = real.completions.create(model=MODEL, prompt="1, 2, 3, 4, 5,", max_tokens=4, temperature=0, logprobs=2)
assert completion.choices[0].text.startswith(" 6") and completion.choices[0].finish_reason == "length"
assert len(completion.choices[0].logprobs.tokens) == 4
several = real.chat.completions.create(
    model=MODEL, messages=[QUESTION], n=2, seed=1, max_tokens=4, logprobs=True, top_logprobs=3
)
assert [choice.index for choice in several.choices] == [0, 1]
assert all(len(entry.top_logprobs) == 3 for choice in several.choices for entry in choice.logprobs.content)

# Raw responses, the async client, streams as objects.
raw = real.chat.completions.with_raw_response.create(model=MODEL, messages=[QUESTION], max_tokens=1)
assert raw.http_response.headers["x-request-id"] and raw.parse().choices[0].finish_reason == "length"


async def use_async() -> None:
    """Several at once."""
    async with openai.AsyncOpenAI(base_url=REAL + "/v1", api_key="none", max_retries=0) as client:
        ask = client.chat.completions.create
        answers = await asyncio.gather(
            *(ask(model=MODEL, messages=[QUESTION], temperature=0, max_tokens=32) for _ in range(4))
        )
        assert {answer.choices[0].message.content for answer in answers} == {text}


asyncio.run(use_async())

# Tools that the model may call, streamed and whole, and what comes of them.
conversation = [{"role": "user", "content": WEATHER}]
called = scripted.chat.completions.create(model=MODEL, messages=conversation, tools=[TOOL])
message = called.choices[0].message
assert called.choices[0].finish_reason == "tool_calls" and message.content is None
assert message.tool_calls[0].function.name == "weather"
assert json.loads(message.tool_calls[0].function.arguments) == CALLED
with scripted.chat.completions.stream(model=MODEL, messages=conversation, tools=[TOOL]) as stream:
    final = stream.get_final_completion()
assert json.loads(final.choices[0].message.tool_calls[0].function.arguments) == CALLED
conversation += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
assert (
    scripted.chat.completions.create(model=MODEL, messages=conversation, tools=[TOOL]).choices[0].message.content
    == SUNNY
)

# A tool that it must call, and a typed answer.
named = {"type": "function", "function": {"name": "weather"}}
for choice in ("required", named):
    forced = real.chat.completions.create(
        model=MODEL, messages=conversation[:1], tools=[TOOL], tool_choice=choice, parallel_tool_calls=False,
        max_tokens=128,
    )  # fmt: skip
    (call,) = forced.choices[0].message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
weather_alone = {
    "type": "allowed_tools",
    "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]},
}
other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
of_those = real.chat.completions.create(
    model=MODEL, messages=conversation[:1], tools=[other, TOOL], tool_choice=weather_alone, max_tokens=128,
    parallel_tool_calls=False,
)  # fmt: skip
assert [call.function.name for call in of_those.choices[0].message.tool_calls] == ["weather"]
parsed = real.chat.completions.parse(
    model=MODEL, messages=[{"role": "user", "content": "Is Paris a city?"}], response_format=City, max_tokens=64
)
assert isinstance(parsed.choices[0].message.parsed, City)

# Responses, whole and as events.
response = real.responses.create(model=MODEL, input=CAPITAL, temperature=0, max_output_tokens=32)
assert response.output_text == text and response.status == "completed"
events = list(real.responses.create(model=MODEL, input=CAPITAL, temperature=0, max_output_tokens=32, stream=True))
assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
assert events[-1].type == "response.completed" and events[-1].response.usage.output_tokens > 3

# Embeddings, in base64 unless it is told otherwise.
texts = ["The capital of France", "La capitale de la France", "def f(x): return x"]
made = real.embeddings.create(model=MODEL, input=texts)
first, near, far = (entry.embedding for entry in made.data)
likeness = [sum(a * b for a, b in zip(first, other, strict=True)) for other in (first, near, far)]
assert abs(likeness[0] - 1) < 1e-3 and likeness[1] > likeness[2] and made.usage.prompt_tokens > 0
(plain,) = real.embeddings.create(model=MODEL, input=texts[0], encoding_format="float").data
assert max(abs(a - b) for a, b in zip(first, plain.embedding, strict=True)) < 1e-2

# Errors have their classes.
for error, fields in (
    (openai.BadRequestError, {"temperature": 9}),
    (openai.NotFoundError, {"model": "another"}),
    (openai.BadRequestError, {"max_tokens": 10**9}),
):
    try:
        real.chat.completions.create(**{"model": MODEL, "messages": [QUESTION], **fields})
    except error as caught:
        assert caught.body["message"] and caught.code in ("invalid_value", "model_not_found", "context_length_exceeded")
    else:
        raise AssertionError(fields)
