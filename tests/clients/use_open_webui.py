"""Open WebUI's chat path: what its backend sends for a connection of either kind, field by field.

Its package brings gigabytes of dependencies, and its chats go through its own database, so that these
are its requests alone, as its routers for OpenAI and Ollama make them: a connection is verified, models
are listed, an answer is streamed with its usage and all parameters of the chat's controls, a title is
made in one piece, tools are offered, and the stop button leaves.
"""

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

from served import CALLED, CAPITAL, MODEL, REAL, SCRIPTED, SUNNY, WEATHER, WEATHER_SCHEMA

HEADERS = {
    "Content-Type": "application/json",
    "Authorization": "Bearer none",
    "X-OpenWebUI-User-Name": "A%20User",
    "X-OpenWebUI-User-Id": "1",
    "X-OpenWebUI-User-Email": "a@example.org",
    "X-OpenWebUI-User-Role": "user",
    "X-OpenWebUI-Chat-Id": "2",
}
SYSTEM = {"role": "system", "content": "You are terse."}
QUESTION = {"role": "user", "content": CAPITAL}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER_SCHEMA},
}


def ask(base: str, path: str, body: Any = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(urlparse(base).netloc, timeout=120)
    content = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, content, HEADERS)
    return connection.getresponse()


def told(base: str, path: str, body: Any = None) -> Any:
    """An answer in one piece."""
    response = ask(base, path, body)
    text = response.read()
    assert response.status == 200 and response.getheader("Content-Type", "").startswith("application/json"), text
    return json.loads(text)


def events(base: str, path: str, body: Any) -> Iterator[Any]:
    """A stream of OpenAI's, which it passes on line by line while the type is right."""
    response = ask(base, path, body)
    assert response.status == 200 and "text/event-stream" in response.getheader("Content-Type", ""), response.read()
    lines = [line for line in response.read().decode().split("\n") if line]
    assert lines.pop() == "data: [DONE]"
    for line in lines:
        assert line.startswith("data: "), line
        yield json.loads(line.removeprefix("data: "))


def lines(base: str, path: str, body: Any) -> list[Any]:
    """A stream of Ollama's."""
    response = ask(base, path, body)
    assert response.status == 200 and "application/x-ndjson" in response.getheader("Content-Type", ""), response.read()
    return [json.loads(line) for line in response.read().splitlines()]


# ---- a connection of OpenAI's -----------------------------------------------------------------------

assert [model["id"] for model in told(REAL, "/v1/models")["data"]] == [MODEL]
chat = {"model": MODEL, "messages": [SYSTEM, QUESTION], "stream": True, "stream_options": {"include_usage": True}}
controls = {
    "temperature": 0.0, "top_p": 0.9, "min_p": 0.0, "max_tokens": 32, "frequency_penalty": 0.0, "presence_penalty": 0.0,
    "seed": 42, "stop": ["\n\n\n"], "logit_bias": {"5": -10}, "reasoning_effort": "medium",
    "response_format": {"type": "text"},
}  # fmt: skip
streamed = list(events(REAL, "/v1/chat/completions", chat | controls))
text = "".join(choice["delta"].get("content") or "" for event in streamed for choice in event["choices"])
assert "Paris" in text
assert streamed[0]["choices"][0]["delta"]["role"] == "assistant"
assert [event["usage"] for event in streamed[:-1]] == [None] * (len(streamed) - 1)
assert streamed[-1]["choices"] == [] and streamed[-1]["usage"]["completion_tokens"] == len(streamed) - 1
parts = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
assert list(events(REAL, "/v1/chat/completions", chat | {"messages": [parts], "max_completion_tokens": 2}))
title = {"model": MODEL, "messages": [QUESTION], "stream": False, "max_completion_tokens": 2}
answer = told(REAL, "/v1/chat/completions", title)
assert answer["choices"][0]["message"]["content"] and answer["choices"][0]["finish_reason"] == "length"

conversation = [{"role": "user", "content": WEATHER}]
offered = {"model": MODEL, "messages": conversation, "stream": True, "tools": [TOOL]}
deltas = [event["choices"][0]["delta"] for event in events(SCRIPTED, "/v1/chat/completions", offered)]
calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
assert all(call["index"] == 0 for call in calls) and calls[0]["function"]["name"] == "weather"
arguments = "".join(call["function"].get("arguments") or "" for call in calls)
assert json.loads(arguments) == CALLED
called = {"id": calls[0]["id"], "type": "function", "function": {"name": "weather", "arguments": arguments}, "index": 0}
conversation += [
    {"role": "assistant", "content": "", "tool_calls": [called]},
    {"role": "tool", "tool_call_id": calls[0]["id"], "content": "sunny"},
]
final = list(events(SCRIPTED, "/v1/chat/completions", offered))
assert "".join(event["choices"][0]["delta"].get("content") or "" for event in final) == SUNNY

# ---- a connection of Ollama's -----------------------------------------------------------------------

assert told(REAL, "/api/version")["version"]
(model,) = told(REAL, "/api/tags")["models"]
assert (model["model"], model["name"]) == (MODEL, MODEL) and isinstance(model["details"], dict) and model["digest"]
assert [one["model"] for one in told(REAL, "/api/ps")["models"]] == [MODEL]
assert "completion" in told(REAL, "/api/show", {"model": MODEL})["capabilities"]
options = {
    "temperature": 0.0, "top_p": 0.9, "seed": 42, "mirostat": 0, "mirostat_eta": 0.1, "mirostat_tau": 5.0,
    "num_ctx": 2048, "num_batch": 512, "num_keep": 24, "num_predict": 32, "repeat_last_n": 64, "top_k": 40,
    "min_p": 0.0, "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "num_gpu": 1,
    "use_mmap": True, "use_mlock": False, "num_thread": 2, "stop": ["\n\n\n"],
}  # fmt: skip
body = {"model": MODEL, "messages": [SYSTEM, QUESTION], "stream": True, "options": options, "keep_alive": "5m"}
spoken = lines(REAL, "/api/chat", body | {"think": False})
assert "".join(line["message"]["content"] for line in spoken) == text
assert [line["done"] for line in spoken] == [False] * (len(spoken) - 1) + [True]
numbers = (
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
)
assert all(isinstance(spoken[-1][name], int) for name in numbers) and spoken[-1]["done_reason"] == "stop"
title = {"model": MODEL, "messages": [QUESTION], "stream": False, "options": {"num_predict": 2}}
assert told(REAL, "/api/chat", title)["done_reason"] == "length"
turns = [
    {"role": "user", "content": WEATHER},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"index": 0, "id": "call_1", "function": {"name": "weather", "arguments": CALLED}}],
    },
    {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
]
first = lines(SCRIPTED, "/api/chat", {"model": MODEL, "messages": turns[:1], "stream": True, "tools": [TOOL]})
(function,) = [call["function"] for line in first for call in line["message"].get("tool_calls") or ()]
assert (function["name"], function["arguments"]) == ("weather", CALLED)
last = lines(SCRIPTED, "/api/chat", {"model": MODEL, "messages": turns, "stream": True, "tools": [TOOL]})
assert "".join(line["message"]["content"] for line in last) == SUNNY
assert len(told(REAL, "/api/embed", {"model": MODEL, "input": ["a", "b"], "truncate": True})["embeddings"]) == 2
wrong = ask(REAL, "/api/pull", {"name": MODEL})  # which is its admin's page
assert wrong.status == 404 and isinstance(json.loads(wrong.read())["error"], str)

# ---- the stop button --------------------------------------------------------------------------------

left = ask(REAL, "/v1/chat/completions", {"model": MODEL, "messages": [QUESTION], "stream": True, "ignore_eos": True})
assert left.readline().startswith(b"data: ")
left.close()
running = 1.0
for _ in range(100):
    metrics = ask(REAL, "/metrics").read().decode().splitlines()
    running = sum(float(line.rsplit(" ", 1)[1]) for line in metrics if line.startswith("vllm:num_requests_running{"))
    if not running:
        break
    time.sleep(0.1)
assert running == 0.0
