"""Ollama's routes, as its own client reads them."""

import json
from typing import Any

import ollama
import pytest

from octavo.answers import ModelAnswers
from octavo.config import EngineConfig
from octavo.server.ollama.schemas import Options
from tests.server.conftest import Served

USER: Any = {"role": "user", "content": "Hi"}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


def speaks(served: Served, answer: str = "Hello world") -> ollama.AsyncClient:
    """Has the model answer so, and gives a client."""
    served.engine.script.answer = answer.encode()
    config = EngineConfig(model="m", tool_call_parser="hermes", reasoning_parser="think")
    served.engine.answers = ModelAnswers(config, None, served.engine.tokenizer)
    return ollama.AsyncClient(host=served.url)


async def test_chats(served: Served) -> None:
    async with speaks(served) as client:
        answer = await client.chat("org/tiny", [USER])
        assert (answer.message.role, answer.message.content, answer.done, answer.done_reason) == (
            "assistant",
            "Hello world",
            True,
            "stop",
        )
        assert (answer.prompt_eval_count, answer.eval_count) == (len("<user>Hi"), 12)
        parts = [part async for part in await client.chat("org/tiny:latest", [USER], stream=True)]
        assert "".join(part.message.content or "" for part in parts) == "Hello world"
        assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
        assert parts[-1].eval_count == 12 and (parts[-1].total_duration or 0) >= (parts[-1].eval_duration or 0) > 0
        cut = await client.chat("org/tiny", [USER], options={"num_predict": 2, "temperature": 0})
        assert (cut.message.content, cut.done_reason) == ("He", "length")


async def test_tools_and_reasoning(served: Served) -> None:
    async with speaks(served, f"<think>hm</think>So {CALL}") as client:
        whole = await client.chat("dummy", [USER], tools=[TOOL])
        streamed = [part async for part in await client.chat("dummy", [USER], tools=[TOOL], stream=True)]
        for messages in ([whole.message], [part.message for part in streamed]):
            assert "".join(message.thinking or "" for message in messages) == "hm"
            assert "".join(message.content or "" for message in messages) == "So"
            calls = [call.function for message in messages for call in message.tool_calls or ()]
            assert [(call.name, call.arguments) for call in calls] == [("weather", {"city": "Paris"})]
        turns: Any = [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]},
            {"role": "tool", "content": "Rain", "tool_name": "weather"},
        ]
        answer = await client.chat("dummy", turns, tools=[TOOL])
        prompt = "<user>Hi<assistant><tool>Rain" + json.dumps([TOOL])
        assert answer.prompt_eval_count == len(prompt)


async def test_completions(served: Served) -> None:
    async with speaks(served) as client:
        answer = await client.generate("dummy", "Hi", system="Be brief.")
        assert (answer.response, answer.prompt_eval_count) == ("Hello world", len("<system>Be brief.<user>Hi"))
        assert (await client.generate("dummy", "Hi", raw=True)).prompt_eval_count == 2
        parts = [part async for part in await client.generate("dummy", "Hi", stream=True)]
        assert "".join(part.response for part in parts) == "Hello world" and parts[-1].done
        assert (await client.generate("dummy", "")).done_reason == "load"


@pytest.mark.parametrize("route", ["chat", "generate"])
async def test_nothing_to_answer_loads_and_unloads(served: Served, route: str) -> None:
    empty = {"message": {"role": "assistant", "content": ""}} if route == "chat" else {"response": ""}
    for fields, reason in (
        ({}, "load"),
        ({"keep_alive": -1}, "load"),
        ({"keep_alive": "5m"}, "load"),
        ({"keep_alive": "1h30m", "stream": False}, "load"),
        ({"messages": []} if route == "chat" else {"prompt": ""}, "load"),
        ({"keep_alive": 0}, "unload"),
        ({"keep_alive": 0.0}, "unload"),
        ({"keep_alive": "0"}, "unload"),
        ({"keep_alive": "0s"}, "unload"),
    ):
        status, answer = await served.post(f"/api/{route}", {"model": "org/tiny:latest", **fields})
        created = answer.pop("created_at")
        assert created.endswith("Z") and status == 200
        assert answer == {"model": "org/tiny:latest", **empty, "done": True, "done_reason": reason}, fields
    given = {"messages": [USER]} if route == "chat" else {"prompt": "Hi"}
    status, answer = await served.post(f"/api/{route}", {"model": "dummy", **given, "keep_alive": 0, "stream": False})
    assert status == 200 and answer["done_reason"] == "stop"


async def test_log_probabilities(served: Served) -> None:
    async with speaks(served, "ab") as client:
        chat = await client.chat("dummy", [USER], logprobs=True, top_logprobs=2)
        completion = await client.generate("dummy", "Hi", raw=True, logprobs=True)
        parts = [part async for part in await client.chat("dummy", [USER], logprobs=True, stream=True)]
    for entries in (chat.logprobs, completion.logprobs, [one for part in parts for one in part.logprobs or ()]):
        assert [(entry.token, entry.logprob) for entry in entries or ()][:2] == [("a", -0.5), ("b", -0.5)]
    assert [len(entry.top_logprobs or ()) for entry in chat.logprobs or ()] == [2, 2, 2]
    assert not any(entry.top_logprobs for entry in completion.logprobs or ())
    for fields in ({"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 2}, {"logprobs": True, "top_logprobs": -1}):
        status, refused = await served.post("/api/generate", {"model": "dummy", "prompt": "Hi", **fields})
        assert status == 400 and "top_logprobs" in refused["error"]


async def test_a_model_is_described(served: Served) -> None:
    served.engine.generation_defaults = {"temperature": 0.5, "repetition_penalty": 1.1, "stop": ["x"]}
    status, answer = await served.post("/api/show", {"model": "dummy"})
    assert status == 200 and answer["details"] == {
        "parent_model": "", "format": "safetensors", "family": "llama", "families": ["llama"],
        "parameter_size": "118K", "quantization_level": "BFLOAT16",
    }  # fmt: skip
    info = answer["model_info"]
    assert (info["general.architecture"], info["general.parameter_count"]) == ("llama", 117_504)
    assert (info["llama.context_length"], info["llama.embedding_length"], info["llama.block_count"]) == (512, 64, 2)
    assert (info["llama.attention.head_count"], info["llama.attention.head_count_kv"]) == (4, 2)
    assert [line.split() for line in answer["parameters"].splitlines()] == [
        ["temperature", "0.5"],
        ["repeat_penalty", "1.1"],
    ]
    assert "message.content" in answer["template"] and answer["modelfile"] == "FROM dummy\n"
    assert (await served.get("/api/tags"))[1]["models"][0]["details"] == answer["details"]


async def test_lines_are_the_default_of_raw_callers(served: Served) -> None:
    async with served.http.post(served.url + "/api/generate", json={"model": "dummy", "prompt": "Hi"}) as response:
        assert response.content_type == "application/x-ndjson"
        lines = (await response.text()).splitlines()
    assert len(lines) == 12 and json.loads(lines[-1])["done"]


async def test_models(served: Served) -> None:
    async with speaks(served) as client:
        assert [model.model for model in (await client.list()).models] == ["org/tiny"]
        assert [model.model for model in (await client.ps()).models] == ["org/tiny"]
        assert (await client.show("org/tiny")).capabilities == ["completion", "tools", "thinking", "embedding"]
        assert "version" in (await served.get("/api/version"))[1]


async def test_format_is_a_schema_or_json(served: Served) -> None:
    body = {"model": "dummy", "stream": False, "options": {"num_predict": 200}}
    _, chat = await served.post("/api/chat", {**body, "messages": [USER], "format": {"enum": ["yes", "no"]}})
    assert chat["message"]["content"] in ('"yes"', '"no"')
    for fields in ({}, {"raw": True}):
        schema = {"type": "integer", "minimum": 5, "maximum": 7}
        _, whole = await served.post("/api/generate", {**body, **fields, "prompt": "Hi", "format": schema})
        assert int(whole["response"]) in (5, 6, 7)
    _, chat = await served.post("/api/chat", {**body, "messages": [USER], "format": "json"})
    assert chat["message"]["content"].lstrip().startswith("{")


# (name, route, body, status, what the message names)
BAD = [
    ("no model", "chat", {"messages": [USER]}, 400, "model"),
    ("model", "chat", {"model": "other", "messages": [USER]}, 404, "other"),
    ("format", "chat", {"model": "dummy", "messages": [USER], "format": "xml"}, 400, "format"),
    ("schema", "chat", {"model": "dummy", "messages": [USER], "format": {"type": "list"}}, 400, "format Invalid type"),
    ("images", "chat", {"model": "dummy", "messages": [{**USER, "images": ["a"]}]}, 400, "images"),
    ("role", "chat", {"model": "dummy", "messages": [{"role": "x", "content": ""}]}, 400, "role"),
    ("option", "chat", {"model": "dummy", "messages": [USER], "options": {"top_p": 2.0}}, 400, "top_p"),
    ("mirostat", "chat", {"model": "dummy", "messages": [USER], "options": {"mirostat": 1}}, 400, "mirostat"),
    ("unknown option", "chat", {"model": "dummy", "messages": [USER], "options": {"tempreature": 1}}, 400,
     "options.temperature"),
    ("unknown option of generate", "generate", {"model": "dummy", "prompt": "Hi", "options": {"a": 1}}, 400,
     "options.a"),
    ("unknown option of embed", "embed", {"model": "dummy", "input": "Hi", "options": {"a": 1}}, 400, "options.a"),
    ("suffix", "generate", {"model": "dummy", "prompt": "Hi", "suffix": "x"}, 400, "suffix"),
    ("no JSON", "generate", b"{", 400, "JSON"),
    ("show", "show", {}, 400, "model"),
    ("keep_alive", "chat", {"model": "dummy", "messages": [USER], "keep_alive": "soon"}, 400, "keep_alive"),
    ("keep_alive of a load", "generate", {"model": "dummy", "keep_alive": "5 minutes"}, 400, "keep_alive"),
    ("think", "chat", {"model": "dummy", "messages": [USER], "think": "much"}, 400, "think"),
    ("half a token", "chat", {"model": "dummy", "messages": [USER], "options": {"num_predict": 1.5}}, 400,
     "options.num_predict"),
    ("many tokens", "chat", {"model": "dummy", "messages": [USER], "options": {"num_predict": 1e12}}, 400,
     "options.num_predict"),
    ("no number", "chat", {"model": "dummy", "messages": [USER], "options": {"top_k": True}}, 400, "options.top_k"),
    ("rendering alone", "chat", {"model": "dummy", "messages": [USER], "_debug_render_only": True}, 400,
     "_debug_render_only"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "body", "status", "named"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
async def test_bad_requests(served: Served, route: str, body: Any, status: int, named: str) -> None:
    got, answer = await served.post(f"/api/{route}", body)
    assert got == status and set(answer) == {"error"}
    assert named in answer["error"]
    assert (await served.post("/api/chat", {"model": "dummy", "messages": [USER], "stream": False}))[0] == 200


async def test_options_as_ollama_has_them(served: Served) -> None:
    """Those of its own engine mean nothing, -1 is no seed, and no number of tokens is as many as fit."""
    speaks(served)
    sizes = {
        "num_ctx": 4096,
        "num_batch": 8,
        "num_gpu": 1,
        "main_gpu": 0,
        "num_thread": 2,
        "use_mmap": None,
        "numa": True,
    }
    body = {"model": "dummy", "messages": [USER], "stream": False, "truncate": True, "shift": False, "keep_alive": "5m"}

    async def answered(**options: Any) -> Any:
        status, answer = await served.post("/api/chat", {**body, "options": options})
        assert status == 200, answer
        return answer

    for options in (
        sizes,
        {"num_predict": 0},
        {"num_predict": 100.0, "top_k": 40.0, "seed": -1.0, "repeat_last_n": 64.0, "num_ctx": 4096.0},
        {"num_predict": -2},
        {"top_p": 0},
        {"repeat_penalty": 1.3, "repeat_last_n": 0},
    ):
        answer = await answered(**options)
        assert answer["message"]["content"] == "Hello world" and "warnings" not in answer
    told = await answered(repeat_penalty=1.3, repeat_last_n=64, penalize_newline=False, typical_p=0.5, tfs_z=0.5)
    assert [warning.split(":")[0] for warning in told["warnings"]] == [
        f"options.{name}" for name in ("repeat_last_n", "penalize_newline", "typical_p", "tfs_z")
    ]
    assert not {"typical_p", "repeat_last_n"} & set(
        str((await answered(typical_p=1.0, repeat_last_n=64)).get("warnings"))
    )


def test_options_become_those_of_a_chat() -> None:
    def fields(**options: Any) -> dict[str, Any]:
        return {name: value for name, value in Options(**options).fields().items() if value is not None}

    whole = fields(seed=7.0, num_predict=3.0, top_k=2.0)
    assert whole == {"seed": 7, "max_tokens": 3, "top_k": 2} and {type(value) for value in whole.values()} == {int}
    assert fields(seed=-1) == fields(seed=-5) == {} and fields(seed=0) == {"seed": 0}
    assert fields(num_predict=0) == fields(num_predict=-1) == {} and fields(num_predict=3) == {"max_tokens": 3}
    assert fields(top_p=0.0, top_k=40) == {"top_k": 1} and fields(top_p=0.5, top_k=40) == {"top_k": 40, "top_p": 0.5}
    assert fields(repeat_penalty=1.1, repeat_last_n=0) == {} and fields(repeat_penalty=1.1) == {
        "repetition_penalty": 1.1
    }


async def test_paths_that_lead_nowhere_have_the_form_of_their_protocol(served: Served) -> None:
    for method, path, status in (("POST", "/api/pull", 404), ("DELETE", "/api/delete", 404), ("GET", "/api/chat", 405)):
        async with served.http.request(method, served.url + path) as response:
            assert response.status == status and set(await response.json()) == {"error"}
            assert isinstance((await response.json())["error"], str)
    async with served.http.get(served.url + "/v1/messages/batches") as response:
        assert response.status == 404 and (await response.json())["type"] == "error"
    async with served.http.get(served.url + "/v1/messages") as response:
        assert response.status == 405 and (await response.json())["type"] == "error"
    async with served.http.put(served.url + "/generate") as response:
        assert response.status == 405 and set(await response.json()) == {"error", "error_type"}
    async with served.http.get(served.url + "/apical") as response:
        assert (await response.json())["error"]["code"] == "route_not_found"


async def test_a_failure_is_the_last_line(served: Served) -> None:
    served.engine.script.fail_after = 1
    async with served.http.post(served.url + "/api/generate", json={"model": "dummy", "prompt": "Hi"}) as response:
        lines = (await response.text()).splitlines()
    assert set(json.loads(lines[-1])) == {"error"}
