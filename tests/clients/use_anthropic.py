"""anthropic-sdk-python: messages whole and streamed, tools, counts, models, errors."""

import anthropic
from served import CALLED, CAPITAL, MODEL, REAL, SCRIPTED, SUNNY, WEATHER, WEATHER_SCHEMA

QUESTION = {"role": "user", "content": CAPITAL}
GREEDY = {"temperature": 0}  # which this version has no argument for
TOOL = {"name": "weather", "description": "d", "input_schema": WEATHER_SCHEMA}

real = anthropic.Anthropic(base_url=REAL, api_key="none", max_retries=0)
scripted = anthropic.Anthropic(base_url=SCRIPTED, api_key="none", max_retries=0)

assert [model.id for model in real.models.list()] == [MODEL]
message = real.messages.create(model=MODEL, max_tokens=32, messages=[QUESTION], extra_body=GREEDY)
text = message.content[0].text
assert "Paris" in text and message.stop_reason == "end_turn" and message.role == "assistant"
with real.messages.stream(model=MODEL, max_tokens=32, messages=[QUESTION], extra_body=GREEDY) as stream:
    assert "".join(stream.text_stream) == text
    final = stream.get_final_message()
assert (final.usage.output_tokens, final.stop_reason) == (message.usage.output_tokens, "end_turn")
system = real.messages.create(
    model=MODEL, max_tokens=2, system="You are terse.", messages=[QUESTION], stop_sequences=["xyz"]
)
assert system.stop_reason == "max_tokens"
count = real.messages.count_tokens(model=MODEL, messages=[QUESTION])
assert count.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)

conversation = [{"role": "user", "content": WEATHER}]
called = scripted.messages.create(model=MODEL, max_tokens=200, messages=conversation, tools=[TOOL])
block = next(block for block in called.content if block.type == "tool_use")
assert (block.name, block.input, called.stop_reason) == ("weather", CALLED, "tool_use")
with scripted.messages.stream(model=MODEL, max_tokens=200, messages=conversation, tools=[TOOL]) as stream:
    assert any(block.type == "tool_use" and block.input == CALLED for block in stream.get_final_message().content)
conversation += [
    {"role": "assistant", "content": called.content},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}]},
]
told = scripted.messages.create(model=MODEL, max_tokens=200, messages=conversation, tools=[TOOL])
assert told.content[0].text == SUNNY
forced = real.messages.create(
    model=MODEL, max_tokens=200, messages=conversation[:1], tools=[TOOL],
    tool_choice={"type": "tool", "name": "weather"},
)  # fmt: skip
assert forced.content[0].type == "tool_use" and forced.content[0].input["city"] in ("Paris", "Rome")

try:
    real.messages.create(model=MODEL, max_tokens=8, messages=[QUESTION], extra_body={"temperature": 9})
except anthropic.BadRequestError as error:
    assert error.body["error"]["type"] == "invalid_request_error"
else:
    raise AssertionError("a temperature of 9 was taken")
