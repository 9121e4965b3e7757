"""huggingface_hub's `InferenceClient`: text generation as TGI has it, and chats in three ways."""

import asyncio
import json

from huggingface_hub import AsyncInferenceClient, InferenceClient
from served import CALLED, CAPITAL, CITY_SCHEMA, MODEL, REAL, SCRIPTED, WEATHER, WEATHER_SCHEMA

QUESTION = {"role": "user", "content": CAPITAL}
PROMPT = "1, 2, 3, 4, 5,"
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": WEATHER_SCHEMA}}
client = InferenceClient(REAL)

text = client.text_generation(PROMPT, max_new_tokens=6)
assert text.startswith(" 6, 7")
details = client.text_generation(PROMPT, max_new_tokens=6, details=True, decoder_input_details=True)
assert details.generated_text == text and details.details.generated_tokens == 6
assert details.details.finish_reason == "length" and len(details.details.tokens) == 6 and details.details.prefill
assert "".join(client.text_generation(PROMPT, max_new_tokens=6, stream=True)) == text
last = list(client.text_generation(PROMPT, max_new_tokens=6, stream=True, details=True))[-1]
assert last.generated_text == text and last.details.generated_tokens == 6
grammar = {"type": "regex", "value": "[0-9]{3}"}
assert client.text_generation(PROMPT, max_new_tokens=8, grammar=grammar).isdigit()

for ask in (client.chat_completion, client.chat.completions.create, InferenceClient(base_url=REAL).chat_completion):
    answer = ask([QUESTION], max_tokens=32, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
parts = client.chat_completion([QUESTION], max_tokens=32, temperature=0, stream=True)
assert "".join(part.choices[0].delta.content or "" for part in parts) == answer.choices[0].message.content
schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True}}
formatted = client.chat_completion([QUESTION], max_tokens=64, response_format=schema)
assert json.loads(formatted.choices[0].message.content)["name"] in ("Paris", "Rome", "Berlin")
called = InferenceClient(SCRIPTED).chat_completion([{"role": "user", "content": WEATHER}], tools=[TOOL])
function = called.choices[0].message.tool_calls[0].function
assert (function.name, json.loads(function.arguments)) == ("weather", CALLED)


async def use_async() -> None:
    """The same by the other client."""
    asynchronous = AsyncInferenceClient(REAL)
    assert await asynchronous.text_generation(PROMPT, max_new_tokens=6) == text
    answer = await asynchronous.chat_completion([QUESTION], model=MODEL, max_tokens=32, temperature=0)
    assert "Paris" in answer.choices[0].message.content


asyncio.run(use_async())
