"""OpenAI's routes over a scripted engine: every answer, whole and streamed, in the shape that
clients read.
"""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from octavo.engine.async_engine import ReplyStream
from octavo.server.config import ServerConfig
from octavo.server.openai.schemas import CompletionRequest
from tests.server.conftest import Served, parse_events, serving
from tests.server.scripted_engine import ScriptedEngine

COMPLETION = {"prompt": "Hi", "max_tokens": 64}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_completion(served: Served) -> None:
    status, body = await served.post("/v1/completions", COMPLETION)
    assert status == 200
    assert body["object"] == "text_completion"
    assert body["model"] == "org/tiny"
    assert body["id"].startswith("cmpl-")
    assert abs(body["created"] - time.time()) < 60
    (choice,) = body["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"], choice["logprobs"]) == (
        0,
        "Hello world",
        "stop",
        None,
    )
    # The end token is counted as output, as in OpenAI's usage.
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 12,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_chat(served: Served) -> None:
    status, body = await served.post("/v1/chat/completions", CHAT)
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello world"}
    assert choice["finish_reason"] == "stop"


async def test_default_lengths(served: Served) -> None:
    """16 tokens on completions, up to the model's length on chats."""
    served.engine.script.answer = b"x" * 100
    _, body = await served.post("/v1/completions", {"prompt": "Hi"})
    assert (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (16, "length")
    _, body = await served.post("/v1/chat/completions", CHAT)
    assert body["choices"][0]["message"]["content"] == "x" * 100


async def test_the_models_defaults_count_where_a_request_says_nothing(served: Served) -> None:
    defaults = {"max_tokens": 5, "temperature": 0.25}
    served.engine.generation_defaults = defaults
    for path, body in (("/v1/completions", {"prompt": "Hi"}), ("/v1/chat/completions", CHAT)):
        _, answer = await served.post(path, body)
        assert answer["usage"]["completion_tokens"] == 5
        _, answer = await served.post(path, {**body, "max_tokens": 7, "temperature": 0.5})
        assert answer["usage"]["completion_tokens"] == 7
    for given, expected in ((None, 0.25), (0.0, 0.0), (0.5, 0.5)):
        params = CompletionRequest(temperature=given).to_sampling_params(defaults)
        assert (params.temperature, params.max_tokens) == (expected, 5)
    # A default that the prompt leaves no room for is cut, not refused.
    served.engine.generation_defaults = {"max_tokens": 500}
    status, _ = await served.post("/v1/completions", {"prompt": "x" * 400})
    assert status == 200


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_chat_length_fields(served: Served, field: str) -> None:
    _, body = await served.post("/v1/chat/completions", {**CHAT, field: 3})
    assert body["choices"][0]["message"]["content"] == "Hel"
    assert body["choices"][0]["finish_reason"] == "length"


async def test_stop_string(served: Served) -> None:
    _, body = await served.post("/v1/completions", {**COMPLETION, "stop": "o"})
    assert body["choices"][0]["text"] == "Hell"
    assert (body["choices"][0]["finish_reason"], body["choices"][0]["stop_reason"]) == ("stop", "o")


async def test_stream_joined_equals_the_whole_text(served: Served) -> None:
    events = await served.events("/v1/completions", COMPLETION)
    assert events[-1] == "[DONE]"
    choices = [event["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == "Hello world"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert len({event["id"] for event in events[:-1]}) == 1


async def test_chat_stream(served: Served) -> None:
    events = await served.events("/v1/chat/completions", CHAT)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == "Hello world"
    assert events[0]["object"] == "chat.completion.chunk"


async def test_include_usage(served: Served) -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    events = await served.events("/v1/chat/completions", {**CHAT, "stream_options": options})
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 12
    assert all(event["usage"] is None for event in events[:-2])


async def test_continuous_usage(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await served.events("/v1/completions", {**COMPLETION, "stream_options": options})
    assert [event["usage"]["completion_tokens"] for event in events[:-2]] == list(range(1, 13))


async def test_stream_headers_and_request_id(served: Served) -> None:
    headers = {"X-Request-Id": "abc-1", "Accept": "application/json"}
    async with served.http.post(
        served.url + "/v1/completions", json={**COMPLETION, "stream": True}, headers=headers
    ) as got:
        assert got.content_type == "text/event-stream"
        assert got.headers["Cache-Control"] == "no-cache"
        assert got.headers["X-Accel-Buffering"] == "no"
        assert got.headers["X-Request-Id"] == "abc-1"
        await got.read()


async def test_several_choices(served: Served) -> None:
    _, body = await served.post("/v1/completions", {**COMPLETION, "n": 3})
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["text"] for choice in body["choices"]} == {"Hello world"}
    assert body["usage"]["completion_tokens"] == 36


PROMPT_LISTS = [["a", "bc"], [[1], [2, 3]]]


@pytest.mark.parametrize("prompts", PROMPT_LISTS)
async def test_prompt_lists(served: Served, prompts: list[object]) -> None:
    _, body = await served.post("/v1/completions", {**COMPLETION, "prompt": prompts, "n": 2})
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3, 48)


@pytest.mark.parametrize("prompts", PROMPT_LISTS)
async def test_prompt_lists_streamed(served: Served, prompts: list[object]) -> None:
    body = {**COMPLETION, "prompt": prompts, "n": 2, "stream_options": {"include_usage": True}, "logprobs": 1}
    events = await served.events("/v1/completions", body)
    assert events[-1] == "[DONE]"
    assert (events[-2]["choices"], events[-2]["usage"]["completion_tokens"]) == ([], 48)
    texts, ends = dict.fromkeys(range(4), ""), {}
    for event in events[:-2]:
        assert event["usage"] is None
        for choice in event["choices"]:
            before = len(texts[choice["index"]])
            lengths = [len(token) for token in choice["logprobs"]["tokens"]]
            assert choice["logprobs"]["text_offset"] == [before + sum(lengths[:i]) for i in range(len(lengths))]
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] = choice["finish_reason"]
    assert set(texts.values()) == {"Hello world"}
    assert ends == dict.fromkeys(range(4), "stop")


async def test_the_default_length_of_each_prompt_is_its_own(served: Served) -> None:
    """A long prompt beside them does not cut the answers of the short ones."""
    served.engine.script.answer = b"x" * 100
    room = served.engine.core.longest_request
    _, body = await served.post("/v1/completions", {"prompt": [[1] * (room - 3), [1] * 5, [1] * (room - 20)]})
    lengths = [len(choice["text"]) for choice in body["choices"]]
    assert lengths == [3, 16, 16]
    status, _ = await served.post("/v1/completions", {"prompt": [[1] * (room - 3), [1] * 5], "max_tokens": 16})
    assert status == 400  # what was asked for is not cut


async def test_streams_of_a_prompt_list_are_written_as_others(served: Served) -> None:
    """Lines for every reader, the same digits as in a whole answer, and what was cached in each
    event.
    """
    served.engine.script.answer = "a\u2028b\u2029c\x85d".encode()
    body = {"prompt": [[7] * 40, [8] * 40], "max_tokens": 12, "logprobs": 2}
    _, whole = await served.post("/v1/completions", body)
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = {**body, "stream": True, "stream_options": options}
    async with served.http.post(served.url + "/v1/completions", json=stream) as response:
        text = (await response.read()).decode()
    assert text.splitlines() == text.split("\n")[:-1]
    *events, usage, done = parse_events(text)
    assert done == "[DONE]" and usage["usage"]["prompt_tokens_details"]["cached_tokens"] == 64
    assert all(event["usage"]["prompt_tokens_details"]["cached_tokens"] > 0 for event in events)
    for choice in whole["choices"]:
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name in ("token_logprobs", "top_logprobs"):
            assert [value for part in parts for value in part["logprobs"][name]] == choice["logprobs"][name]


async def test_a_prompt_list_that_waits_has_one_keep_alive(served_slowly: Served) -> None:
    body = {**COMPLETION, "prompt": ["a", "b", "c", "d"], "stream": True}
    served_slowly.engine.script.first_delay = 0.35
    async with served_slowly.http.post(served_slowly.url + "/v1/completions", json=body) as response:
        text = (await response.read()).decode()
    before = text.partition("data:")[0]
    assert 1 <= before.count(": keep-alive\n\n") <= 4 and before.replace(": keep-alive\n\n", "") == ""


@pytest.mark.parametrize(("longest", "is_read"), [(200, True), (100, False)])
async def test_text_is_read_as_far_as_the_longest_tokens_reach(longest: int, is_read: bool) -> None:
    """70,000 characters may be 1,100 tokens: what is not read is refused for its characters alone."""

    class Wide:
        longest_token = longest

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    engine = ScriptedEngine()
    tokenizer, engine.tokenizer = engine.tokenizer, Wide()  # type: ignore[assignment]
    async for served in serving(engine, ServerConfig()):
        chat = {"messages": [{"role": "user", "content": "x" * 70_000}]}
        for path, body in (("/v1/completions", {"prompt": "x" * 70_000}), ("/v1/chat/completions", chat)):
            status, answer = await served.post(path, body)
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
            assert ("characters" in answer["error"]["message"]) != is_read, answer


async def test_token_id_prompt(served: Served) -> None:
    _, body = await served.post("/v1/completions", {**COMPLETION, "prompt": [1, 2, 3]})
    assert body["usage"]["prompt_tokens"] == 3


async def test_completion_logprobs(served: Served) -> None:
    _, body = await served.post("/v1/completions", {**COMPLETION, "max_tokens": 3, "logprobs": 2})
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["H", "e", "l"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert len(logprobs["token_logprobs"]) == 3
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
        assert len(top) == 2  # the drawn one is among them


async def test_chat_logprobs(served: Served) -> None:
    _, body = await served.post("/v1/chat/completions", {**CHAT, "max_tokens": 2, "logprobs": True, "top_logprobs": 2})
    first, second = body["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["bytes"]) == ("H", [72])
    assert len(first["top_logprobs"]) == 2
    assert second["token"] == "e"
    _, body = await served.post("/v1/chat/completions", {**CHAT, "max_tokens": 2, "logprobs": True})
    assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For `json.loads`: an object that has each key once."""
    assert len(dict(pairs)) == len(pairs), pairs
    return dict(pairs)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**COMPLETION, "logprobs": 3}),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 3}),
    ],
)
async def test_streamed_logprobs_are_those_of_the_whole_answer(served: Served, path: str, body: dict[str, Any]) -> None:
    served.engine.script.answer = 'Hé "€\u2028\n'.encode() + b"\xff"
    _, whole = await served.post(path, body)
    joined: dict[str, list[object]] = {}
    async with served.http.post(served.url + path, json={**body, "stream": True}) as response:
        lines = (await response.text()).split("\n\n")
    for line in lines[:-2]:
        event = json.loads(line.removeprefix("data: "), object_pairs_hook=once)
        for name, values in event["choices"][0]["logprobs"].items():
            joined.setdefault(name, []).extend(values)
    assert joined == whole["choices"][0]["logprobs"]


@pytest.mark.parametrize("stop", [[], ["o w"], ["xyz", "lo x"]])
async def test_text_offsets_are_characters_of_the_text_before(served: Served, stop: list[str]) -> None:
    """Also where text is held back that may become a stop string, and of tokens that add no text."""
    served.engine.script.answer = "é€ hello world".encode()
    body = {**COMPLETION, "max_tokens": 22, "ignore_eos": True, "logprobs": 0, "stop": stop}
    _, answer = await served.post("/v1/completions", body)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    # Five tokens are bytes of the first two characters, then each is a letter.
    text = "é€ hello world" if "o w" not in stop else "é€ hell"
    assert choice["text"] == text
    expected = [0, 0, 1, 1, 1, *range(2, 14), 14, 14, 14, 14, 14]
    assert logprobs["text_offset"] == expected[: len(logprobs["tokens"])]
    letters = list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[5:]
    assert all(text[offset:].startswith(token) for token, offset in letters if offset < len(text))
    assert len(logprobs["tokens"]) == (22 if "o w" not in stop else 13)


async def test_a_long_answer_is_written_beside_the_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.engine.script.answer = b"x" * 400
    threads = []
    run_beside = served.engine.run_beside

    async def watched(work: Callable[[], bytes]) -> bytes:
        def write() -> bytes:
            threads.append(threading.current_thread().name)
            return work()

        return await run_beside(write)

    monkeypatch.setattr(served.engine, "run_beside", watched)
    for logprobs, long in ((1, False), (20, True)):
        _, body = await served.post("/v1/completions", {"prompt": "Hi", "max_tokens": 400, "logprobs": logprobs})
        assert len(body["choices"][0]["logprobs"]["tokens"]) == 400
        assert len(threads) == int(long)
    assert threads[0].startswith("octavo-text")


@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "You", "They"]])
async def test_a_whole_answer_wakes_its_handler_once(
    served: Served, monkeypatch: pytest.MonkeyPatch, prompt: object
) -> None:
    served.engine.script.step_delay = 0.002
    woken = []
    wake = ReplyStream.wake

    def counted(stream: ReplyStream) -> None:
        woken.append(stream.reply_id)
        wake(stream)

    monkeypatch.setattr(ReplyStream, "wake", counted)
    await served.post("/v1/completions", {**COMPLETION, "prompt": prompt})
    assert len(woken) == 1
    await served.events("/v1/completions", {**COMPLETION, "prompt": prompt})
    assert len(woken) > 5


async def test_seed_repeats_and_priority_and_salt_are_taken(served: Served) -> None:
    body = {**COMPLETION, "seed": -3, "priority": -1, "cache_salt": "tenant", "temperature": 0.5}
    assert (await served.post("/v1/completions", body))[0] == 200


async def test_models(served: Served) -> None:
    _, body = await served.get("/v1/models")
    assert body["object"] == "list"
    (card,) = body["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("org/tiny", "model", served.engine.max_model_len)
    assert (await served.get("/v1/models/org%2Ftiny"))[1] == card
    assert (await served.get("/v1/models/org/tiny"))[1] == card


async def test_times_between_tokens_are_those_of_one_choice(served: Served) -> None:
    served.engine.script.step_delay = 0.02
    body = {"prompt": "Hi", "n": 4, "max_tokens": 10, "ignore_eos": True}
    await served.events("/v1/completions", body)
    await served.post("/v1/completions", body)
    # Of choices that come together the first token's time may be known no better than by a step.
    for name, count in (("inter_token_latency_seconds", 72), ("request_time_per_output_token_seconds", 8)):
        assert await served.metric(f"vllm:{name}_count") == count
        assert await served.metric(f"vllm:{name}_sum") / count > 0.018


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stall_between_tokens_is_seen_as_one(served: Served, stream: bool) -> None:
    """Also in a whole answer, whose times are taken once, at its end: both have the same buckets."""
    engine, script = served.engine, served.engine.script

    def steps() -> None:
        for step in range(21):
            script.step_delay = 0.25 if step % 10 == 5 else 0.0
            assert script.step()

    engine.hold()
    body = {"prompt": "Hi", "max_tokens": 21, "ignore_eos": True, "stream": stream}
    asking = asyncio.ensure_future(served.http.post(served.url + "/v1/completions", json=body))
    while engine.num_unfinished == 0:
        await asyncio.sleep(0.005)
    await asyncio.to_thread(steps)
    await (await asking).read()
    for bound, count in (("0.2", 18), ("+Inf", 20)):
        assert await served.metric(f'vllm:inter_token_latency_seconds_bucket{{le="{bound}"') == count


@pytest.mark.parametrize("stream", [True, False])
async def test_what_had_finished_when_the_client_left_is_counted(served_narrowly: Served, stream: bool) -> None:
    """Two of three prompts run to their end, the third waits."""
    engine = served_narrowly.engine
    engine.hold()
    body = {"prompt": ["a", "b", "c"], "max_tokens": 3, "ignore_eos": True, "stream": stream}
    asking = asyncio.ensure_future(served_narrowly.http.post(served_narrowly.url + "/v1/completions", json=body))
    while engine.num_unfinished < 3:
        await asyncio.sleep(0.005)
    while engine.num_unfinished == 3:
        engine.script.step()
    if stream:
        (await asking).close()
    else:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    while engine.streams:
        await asyncio.sleep(0.005)
    for reason, count in (("length", 2), ("abort", 1)):
        assert await served_narrowly.metric(f'vllm:request_success_total{{finished_reason="{reason}"') == count
    for name, count in (("time_to_first_token", 2), ("e2e_request_latency", 2), ("inter_token_latency", 4)):
        assert await served_narrowly.metric(f"vllm:{name}_seconds_count") == count


async def test_probes_and_metrics(served: Served) -> None:
    assert (await served.get("/health"))[0] == 200
    assert (await served.get("/ready"))[0] == 200
    await served.post("/v1/completions", COMPLETION)
    await served.events("/v1/chat/completions", CHAT)
    assert await served.metric("vllm:request_success_total") == 2
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert await served.metric(f"vllm:{name}_count") == 2
    assert await served.metric("vllm:inter_token_latency_seconds_count") == 22
    assert await served.metric("vllm:request_generation_tokens_sum") == 24
    async with served.http.get(served.url + "/metrics") as response:
        text = await response.text()
    assert 'finished_reason="stop",model_name="org/tiny"' in text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total"):
        assert f'vllm:{name}{{model_name="org/tiny"}}' in text
    assert 'block_size="16"' in text and 'cache_dtype="auto"' in text
    buckets = [line for line in text.splitlines() if line.startswith("vllm:e2e_request_latency_seconds_bucket")]
    assert 'le="+Inf"' in buckets[-1]
    assert buckets[-1].endswith(" 2.0")


LABELS = {
    "user": "me",
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "store": True,
    "x_anything": {"a": 1},
    "extra_headers": {},
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
}


async def test_labels_are_taken_and_change_nothing(served: Served) -> None:
    _, plain = await served.post("/v1/completions", COMPLETION)
    status, labelled = await served.post("/v1/completions", {**COMPLETION, **LABELS})
    assert (status, labelled["choices"]) == (200, plain["choices"])
    assert "warnings" not in labelled
    assert await served.metric("octavo:unknown_fields_total") == 0
    chat = {"messages": [{"role": "user", "content": "hi"}], **LABELS}
    assert (await served.post("/v1/chat/completions", chat))[0] == 200


UNKNOWN = (
    ("/v1/completions", {"prompt": "a", "max_token": 1}, "max_token", "max_tokens"),
    ("/v1/completions", {"prompt": "a", "messages": []}, "messages", None),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "temprature": 0}, "temprature",
     "temperature"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "prompt": "a"}, "prompt", None),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "qqq\nq": 0}, "qqq\nq", None),
    ("/v1/responses", {"input": "a", "max_output_token": 1}, "max_output_token", "max_output_tokens"),
    ("/v1/embeddings", {"input": "a", "dimension": 1}, "dimension", "dimensions"),
    ("/tokenize", {"prompt": "a", "add_special_token": False}, "add_special_token", "add_special_tokens"),
    ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "top_kk": 1}, "top_kk",
     "top_k"),
    ("/api/chat", {"model": "org/tiny", "messages": [], "thinks": True}, "thinks", "think"),
    ("/generate", {"inputs": "a", "parameter": {}}, "parameter", "parameters"),
    ("/generate", {"inputs": "a", "parameters": {"max_tokens": 1}}, "parameters.max_tokens",
     "parameters.max_new_tokens"),
)  # fmt: skip


@pytest.mark.parametrize(("path", "body", "field", "near"), UNKNOWN)
async def test_unknown_fields_are_refused_with_the_nearest_known_one(
    served: Served, path: str, body: dict[str, Any], field: str, near: str | None
) -> None:
    status, answer = await served.post(path, body)
    assert status == (422 if path == "/generate" else 400)
    error = answer.get("error") if isinstance(answer.get("error"), dict) else {"message": answer["error"]}
    assert f"{field}: unknown field." in error["message"]
    assert near is None or f"Is {near} meant?" in error["message"]
    if "param" in error:
        assert (error["param"], error["code"]) == (field, "unknown_parameter")
    assert served.engine.stats()["requests"] == 0


async def test_lenient_servers_warn_of_unknown_fields() -> None:
    async for served in serving(ScriptedEngine(), ServerConfig(params_mode="lenient")):
        for path, body, field, _ in UNKNOWN:
            status, answer = await served.post(path, body)
            if "/tokenize" in path or body.get("messages") == []:
                assert status in (200, 400)
                continue
            assert status == 200, answer
            assert answer["warnings"] == [f"{field}: unknown field, ignored"]
        before = await served.metric("octavo:unknown_fields_total")
        many = {f"f{number}": 1 for number in range(100)}
        _, answer = await served.post("/v1/completions", {**COMPLETION, **many})
        assert len(answer["warnings"]) == 16
        assert await served.metric("octavo:unknown_fields_total") == before + 100
        events = await served.events("/v1/completions", {**COMPLETION, "foo": 1})
        assert events[-1] == "[DONE]" and "warnings" not in str(events)


async def test_keep_alive_comments_before_the_first_token(served_slowly: Served) -> None:
    body = {**COMPLETION, "stream": True}
    async with served_slowly.http.post(served_slowly.url + "/v1/completions", json=body) as response:
        lines = (await response.read()).decode().split("\n\n")
    assert lines[0] == ": keep-alive"
    assert lines[-2] == "data: [DONE]"


async def test_one_keep_alive_for_a_list_of_prompts(served_slowly: Served) -> None:
    body = {**COMPLETION, "prompt": ["a", "b", "c", "d"], "stream": True}
    async with served_slowly.http.post(served_slowly.url + "/v1/completions", json=body) as response:
        lines = (await response.read()).decode().split("\n\n")
    assert 1 <= lines.count(": keep-alive") <= 4  # in 0.3 s, one each 0.1 s
    assert lines[-2] == "data: [DONE]"


async def test_official_client(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["org/tiny"]
        assert (await client.models.retrieve("org/tiny")).id == "org/tiny"
        chat = await client.chat.completions.create(model="org/tiny", messages=[{"role": "user", "content": "Hi"}])
        assert chat.choices[0].message.content == "Hello world"
        assert chat.usage is not None
        assert chat.usage.prompt_tokens_details.cached_tokens == 0
        text = ""
        stream = await client.chat.completions.create(
            model="org/tiny",
            messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": False},
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        assert text == "Hello world"
        assert chunk.usage is not None
        assert chunk.usage.completion_tokens == 12
        completion = await client.completions.create(model="org/tiny", prompt=["a", "b"], max_tokens=2, logprobs=1)
        assert [choice.text for choice in completion.choices] == ["He", "He"]
        texts = ["", ""]
        stream = await client.completions.create(model="org/tiny", prompt=["a", "b"], max_tokens=5, stream=True)
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == ["Hello", "Hello"]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="org/tiny", prompt="a", temperature=9)
        assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hi"}])


async def test_official_client_sees_an_error_in_a_stream(served: Served) -> None:
    served.engine.script.fail_after = 3
    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        stream = await client.completions.create(model="org/tiny", prompt="Hi", stream=True)
        with pytest.raises(openai.APIError, match="could not be used") as caught:
            async for _ in stream:
                pass
    assert caught.value.code == "numerical_error"


async def test_32_streams_at_once(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:

        async def one(number: int) -> str:
            stream = await client.completions.create(
                model="org/tiny", prompt=f"prompt {number}", max_tokens=20, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        assert await asyncio.gather(*map(one, range(32))) == ["Hello world"] * 32


async def test_the_best_of_several_choices_are_answered(served: Served) -> None:
    body = {"prompt": ["Hi", "You"], "n": 2, "best_of": 3, "max_tokens": 4}
    status, answer = await served.post("/v1/completions", body)
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in answer["choices"]} == {"Hell"}
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 24  # of all that were made
    _, answer = await served.post("/v1/completions", {**body, "logprobs": 1, "echo": True, "return_token_ids": None})
    assert [choice["text"] for choice in answer["choices"]] == ["HiHell", "HiHell", "YouHell", "YouHell"]
    assert len(answer["choices"][3]["logprobs"]["tokens"]) == 7
    _, answer = await served.post("/v1/completions", {**body, "return_token_ids": True})
    assert [choice["prompt_token_ids"] for choice in answer["choices"]][1:3] == [[72, 105], [89, 111, 117]]
