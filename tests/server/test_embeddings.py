"""`/v1/embeddings`, `/pooling` and Ollama's two routes, as their clients read them, over a script whose
embedding of a prompt is made of the mean of its token ids.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import ollama
import openai
import pytest

from octavo.pooling import Embeddings
from octavo.server.config import ServerConfig
from tests.server.conftest import Served, serving
from tests.server.scripted_engine import VECTOR_SIZE, ScriptedEngine, embedding

PATH = "/v1/embeddings"


def ids(text: str) -> list[int]:
    return list(text.encode())


def expected(tokens: list[int], dimensions: int = VECTOR_SIZE, normalize: bool = True) -> list[float]:
    vector = embedding(np.array([1.0, sum(tokens) / len(tokens), 0, 0]))[:dimensions].astype(float)
    return (vector / np.sqrt((vector**2).sum()) if normalize else vector).tolist()


def close(vector: list[float], right: list[float]) -> bool:
    return vector == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize(
    "given",
    ["Hé!", ["Hé!", "xyz", "a"], ids("Hé!"), [ids("Hé!"), ids("xyz")]],
    ids=["text", "texts", "ids", "lists-of-ids"],
)
@pytest.mark.parametrize("encoding", [None, "float", "base64"])
async def test_a_vector_an_input_in_their_order(served: Served, given: Any, encoding: str | None) -> None:
    body = {"model": "org/tiny", "input": given} | ({"encoding_format": encoding} if encoding else {})
    status, answer = await served.post(PATH, body)
    assert status == 200
    inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    tokens = [ids(one) if isinstance(one, str) else one for one in inputs]
    assert [entry["index"] for entry in answer["data"]] == list(range(len(inputs)))
    for entry, own in zip(answer["data"], tokens, strict=True):
        vector = entry["embedding"]
        if encoding == "base64":
            vector = np.frombuffer(base64.b64decode(vector, validate=True), "<f4").tolist()
        assert entry["object"] == "embedding" and close(vector, expected(own))
    assert answer["object"] == "list" and answer["model"] == "org/tiny"
    total = sum(map(len, tokens))
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == total


async def test_a_chat_goes_through_the_template(served: Served) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    status, answer = await served.post(PATH, {"messages": messages})
    assert status == 200 and close(answer["data"][0]["embedding"], expected(ids("<user>Hi")))
    status, answer = await served.post(PATH, {"messages": messages, "input": "Hi"})
    assert status == 400 and answer["error"]["param"] == "messages"


async def test_many_inputs_wait_for_one_another_and_leave_nothing(served: Served) -> None:
    texts = [f"text {number} " * (1 + number % 30) for number in range(300)]
    status, answer = await served.post(PATH, {"input": texts})
    assert status == 200
    for text, entry in zip(texts, answer["data"], strict=True):
        assert close(entry["embedding"], expected(ids(text)))
    assert served.engine.num_unfinished == 0
    assert await served.metric("vllm:request_success_total") == 300
    assert await served.metric("vllm:e2e_request_latency_seconds_count") == 300
    assert await served.metric("vllm:generation_tokens_total") == 0
    served.engine.core.check_integrity()


async def test_answers_and_embeddings_run_beside_one_another(served: Served) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    calls = [served.post(PATH, {"input": "abc"}), served.post("/v1/chat/completions", chat)] * 5
    for number, (status, answer) in enumerate(await asyncio.gather(*calls)):
        assert status == 200
        if number % 2:
            assert answer["choices"][0]["message"]["content"] == "Hello world"
        else:
            assert close(answer["data"][0]["embedding"], expected(ids("abc")))


async def test_the_first_tokens_count_where_inputs_are_cut(served: Served) -> None:
    for given in ("abcdef", ids("abcdef")):
        status, answer = await served.post(PATH, {"input": given, "truncate_prompt_tokens": 2})
        assert status == 200 and close(answer["data"][0]["embedding"], expected(ids("ab")))
        assert answer["usage"]["prompt_tokens"] == 2
    status, answer = await served.post(PATH, {"input": ids("x" * 600), "truncate_prompt_tokens": -1})
    assert status == 200 and answer["usage"]["prompt_tokens"] == 480  # what the pool holds


async def test_pooling_is_vllms_other_form(served: Served) -> None:
    status, answer = await served.post("/pooling", {"input": ["ab", "c"], "task": "embed", "normalize": False})
    assert status == 200
    assert [entry["object"] for entry in answer["data"]] == ["pooling"] * 2
    assert close(answer["data"][1]["data"], expected(ids("c"), normalize=False))


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": None}, "input", "invalid_type"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": [""]}, "input", "invalid_value"),
        ({"input": [[]]}, "input", "invalid_value"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": {"text": "a"}}, "input", "invalid_type"),
        ({"input": ["a", 5]}, "input", "invalid_type"),
        ({"input": [-1]}, "input", "token_id_out_of_range"),
        ({"input": [300]}, "input", "token_id_out_of_range"),
        ({"input": "a" * 513}, "input", "context_length_exceeded"),
        ({"input": [1] * 513}, "input", "context_length_exceeded"),
        ({"input": [1] * 481}, "input", "kv_capacity_exceeded"),  # the pool holds 480, and the last is computed
        ({"input": ["a"] * 1025}, "input", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "a", "encoding_format": 5}, "encoding_format", "invalid_type"),
        ({"input": "a", "dimensions": 2}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": 5}, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": "2"}, "dimensions", "invalid_type"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
        ({"input": "a", "truncate_prompt_tokens": 513}, "truncate_prompt_tokens", "invalid_value"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype", "unsupported_parameter"),
        ({"input": "a", "task": "classify"}, "task", "unsupported_parameter"),
        ({"input": "a", "model": "other"}, "model", "model_not_found"),
    ],
)
async def test_what_is_wrong_is_named(served: Served, body: dict[str, Any], param: str, code: str) -> None:
    for path in (PATH, "/pooling"):
        status, answer = await served.post(path, body)
        error = answer["error"]
        assert (status, error["param"].partition("[")[0], error["code"]) == (
            400 if param != "model" else 404,
            param,
            code,
        )
        assert "prompt[" not in error["message"] and not error["message"].startswith("prompt:")
    status, answer = await served.post(PATH, {"input": "abc"})
    assert status == 200 and served.engine.num_unfinished == 0


async def test_dimensions_of_a_matryoshka_model(served: Served) -> None:
    script = served.engine
    script.embeddings = dataclasses.replace(script.embeddings, is_matryoshka=True, matryoshka_dimensions=(2, 3))
    status, answer = await served.post(PATH, {"input": "abc", "dimensions": 2})
    assert status == 200 and close(answer["data"][0]["embedding"], expected(ids("abc"), 2))
    status, answer = await served.post(PATH, {"input": "abc", "dimensions": 1})
    assert status == 400 and "2, 3" in answer["error"]["message"]
    status, answer = await served.post("/api/embed", {"model": "dummy", "input": "abc", "dimensions": 3})
    assert status == 200 and close(answer["embeddings"][0], expected(ids("abc"), 3))


async def test_openais_client(served: Served) -> None:
    """It asks for base64 unless it is told otherwise."""
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            answer = await client.embeddings.create(model="org/tiny", input=["abc", "d"], user="me", **options)
            for entry, text in zip(answer.data, ("abc", "d"), strict=True):
                vector = entry.embedding
                if options.get("encoding_format") == "base64":  # then it is left as it came
                    vector = np.frombuffer(base64.b64decode(vector), "<f4").tolist()
                assert close(vector, expected(ids(text)))
            assert answer.usage.prompt_tokens == 4 and answer.model == "org/tiny"
        with pytest.raises(openai.BadRequestError, match="matryoshka") as caught:
            await client.embeddings.create(model="org/tiny", input="abc", dimensions=2)
        assert caught.value.param == "dimensions" and caught.value.code == "invalid_value"


async def test_ollamas_client(served: Served) -> None:
    async with ollama.AsyncClient(host=served.url) as client:
        answer = await client.embed("org/tiny:latest", ["abc", "d"])
        for vector, text in zip(answer.embeddings, ("abc", "d"), strict=True):
            assert close(list(vector), expected(ids(text)))
        assert (answer.model, answer.prompt_eval_count) == ("org/tiny:latest", 4)
        assert answer.total_duration is not None and answer.total_duration > 0
        cut = await client.embed("dummy", "x" * 600)
        assert cut.prompt_eval_count == 480
        with pytest.raises(ollama.ResponseError, match="prompt is too long"):
            await client.embed("dummy", "x" * 600, truncate=False)
        old = await client.embeddings("dummy", "abc")
        assert close(list(old.embedding), expected(ids("abc"), normalize=False))
        assert (await client.embed("dummy", "")).embeddings == [] and (await client.embed("dummy", [])).embeddings == []
        assert (await client.embeddings("dummy", "")).embedding == []
        with pytest.raises(ollama.ResponseError, match="dimensions"):
            await client.embed("dummy", "abc", dimensions=2)
        assert "embedding" in ((await client.show("dummy")).capabilities or [])


async def test_one_failure_fails_its_call_and_no_other(served: Served) -> None:
    """A vector with NaN."""
    from tests.server import scripted_engine

    right = scripted_engine.embedding
    try:
        scripted_engine.embedding = lambda mean: right(mean) * (np.nan if mean[1] == 65 else 1.0)
        status, answer = await served.post(PATH, {"input": ["b", "A", "c"]})
        assert status == 500 and answer["error"]["code"] == "numerical_error"
        status, answer = await served.post(PATH, {"input": "b"})
        assert status == 200 and close(answer["data"][0]["embedding"], expected(ids("b")))
    finally:
        scripted_engine.embedding = right
    assert served.engine.num_unfinished == 0


@pytest.fixture
async def served_to_generate() -> AsyncIterator[Served]:
    engine = ScriptedEngine()
    engine.embeddings = None
    async for one in serving(engine, ServerConfig()):
        yield one


@pytest.fixture
async def served_to_embed() -> AsyncIterator[Served]:
    engine = ScriptedEngine()
    engine.embeddings, engine.generates = Embeddings("last", True, VECTOR_SIZE, "the test"), False
    async for one in serving(engine, ServerConfig()):
        yield one


async def test_what_a_server_is_not_for_is_refused(served_to_generate: Served, served_to_embed: Served) -> None:
    for path, body in [(PATH, {"input": "a"}), ("/pooling", {"input": "a"})]:
        status, answer = await served_to_generate.post(path, body)
        assert (status, answer["error"]["code"]) == (400, "task_not_served")
    status, answer = await served_to_generate.post("/api/embed", {"model": "dummy", "input": "a"})
    assert status == 400 and "--runner" in answer["error"]
    messages = [{"role": "user", "content": "Hi"}]
    for path, body in [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/messages", {"messages": messages, "model": "dummy", "max_tokens": 5}),
        ("/api/chat", {"messages": messages, "model": "dummy"}),
        ("/generate", {"inputs": "a"}),
    ]:
        status, answer = await served_to_embed.post(path, body)
        assert status in (400, 422) and "makes embeddings alone" in json.dumps(answer)
    status, answer = await served_to_embed.post(PATH, {"input": "a"})
    assert status == 200
