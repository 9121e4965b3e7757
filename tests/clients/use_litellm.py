"""litellm: its providers `openai`, `hosted_vllm`, `text-completion-openai`, `huggingface`, `ollama_chat`,
`anthropic`; streams, tools, errors.
"""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network when it is imported

import litellm
from served import CALLED, CAPITAL, CITY_SCHEMA, MODEL, REAL, SCRIPTED, WEATHER, WEATHER_SCHEMA

MESSAGES = [{"role": "user", "content": CAPITAL}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": WEATHER_SCHEMA}}
OPTIONS = {"api_key": "none", "max_tokens": 64, "temperature": 0, "num_retries": 0}

for provider, url in (
    ("openai", REAL + "/v1"),
    ("hosted_vllm", REAL + "/v1"),
    ("ollama_chat", REAL),
    ("anthropic", REAL),
):
    name = f"{provider}/{MODEL}"
    answer = litellm.completion(model=name, messages=MESSAGES, api_base=url, **OPTIONS)
    text = answer.choices[0].message.content
    assert "Paris" in text and answer.choices[0].finish_reason == "stop", (provider, text)
    assert answer.usage.completion_tokens > 3, provider
    parts = list(litellm.completion(model=name, messages=MESSAGES, api_base=url, stream=True, **OPTIONS))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text, provider

    speaker = url.replace(REAL, SCRIPTED)
    question = [{"role": "user", "content": WEATHER}]
    called = litellm.completion(
        model=name, messages=question, api_base=speaker, tools=[TOOL], **OPTIONS | {"max_tokens": 200}
    )
    (call,) = called.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", CALLED), provider

text = litellm.text_completion(
    model=f"text-completion-openai/{MODEL}", prompt="1, 2, 3, 4, 5,", api_base=REAL + "/v1",
    **OPTIONS | {"max_tokens": 4},
)  # fmt: skip
assert text.choices[0].text.startswith(" 6")
schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True}}
for provider in ("openai", "hosted_vllm"):
    formatted = litellm.completion(
        model=f"{provider}/{MODEL}", messages=MESSAGES, api_base=REAL + "/v1", response_format=schema, **OPTIONS
    )
    assert json.loads(formatted.choices[0].message.content)["name"] in ("Paris", "Rome", "Berlin")
try:
    litellm.completion(
        model=f"hosted_vllm/{MODEL}", messages=[{"role": "user", "content": "word " * 20_000}],
        api_base=REAL + "/v1", **OPTIONS,
    )  # fmt: skip
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("a prompt of 20,000 words was taken")
