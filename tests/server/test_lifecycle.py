"""Clients that leave, queues that overflow, engines that die, and SIGTERM: over real sockets."""

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from octavo.engine.gate import Part, Verdict
from octavo.server.config import ServerConfig
from octavo.server.keys import Keys
from octavo.server.metrics import Metrics
from octavo.server.serve import open_socket, serve_engine
from tests.server.conftest import Served, parse_events
from tests.server.scripted_engine import ScriptedEngine

LONG: dict[str, Any] = {"prompt": "Hi", "max_tokens": 400, "ignore_eos": True}
LONG_CHAT = {**LONG, "messages": [{"role": "user", "content": "Hi"}]}
del LONG_CHAT["prompt"]


async def eventually(condition: Callable[[], bool], timeout: float = 120.0) -> None:
    """Waits until something holds; fails loudly where it never does, which a busy machine must not
    look like.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


# ---- clients that leave --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["queued", "running"])
async def test_a_client_that_leaves_frees_its_request(served: Served, path: str, stream: bool, when: str) -> None:
    engine = served.engine
    engine.script.step_delay = 0.01
    if when == "queued":
        engine.hold()
    body = {**(LONG_CHAT if "chat" in path else LONG), "stream": stream}
    asking = asyncio.ensure_future(served.http.post(served.url + path, json=body))
    await eventually(lambda: engine.num_unfinished == 1)
    if when == "running":
        await asyncio.sleep(0.05)
    if stream:
        (await asking).close()
    else:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    engine.release()
    await eventually(lambda: engine.num_unfinished == 0)
    assert await served.metric("vllm:num_requests_running") == 0
    assert await served.metric('vllm:request_success_total{finished_reason="abort"') == 1
    assert (await served.post(path, {**body, "stream": False, "ignore_eos": False}))[0] == 200


async def test_half_of_many_leave(served: Served) -> None:
    served.engine.script.step_delay = 0.002

    async def one(number: int) -> str:
        body = {"prompt": f"prompt {number}", "max_tokens": 64, "stream": True}
        async with served.http.post(served.url + "/v1/completions", json=body) as response:
            if number % 2:
                await response.content.readany()
                response.close()
                return "left"
            events = parse_events((await response.read()).decode())
            return "".join(event["choices"][0]["text"] for event in events[:-1])

    assert await asyncio.gather(*map(one, range(16))) == ["Hello world", "left"] * 8
    await eventually(lambda: served.engine.num_unfinished == 0)


async def test_one_bad_prompt_of_many_leaves_nothing_running(served: Served) -> None:
    served.engine.hold()
    status, _ = await served.post("/v1/completions", {"prompt": [[1]] * 5 + [[299]] + [[1] * 511], "max_tokens": 10})
    assert status == 400
    assert served.engine.num_unfinished == 0
    served.engine.release()


async def test_a_call_that_finds_no_room_for_all_its_prompts_leaves_nothing(served_narrowly: Served) -> None:
    """Four may wait."""
    engine = served_narrowly.engine
    engine.hold()
    body = {"max_tokens": 5, "prompt": ["a"] * 5}
    status, answer = await served_narrowly.post("/v1/completions", body)
    # Five would never find room: it would not help to ask again.
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert "max_waiting = 4" in answer["error"]["message"]
    asking = asyncio.ensure_future(served_narrowly.post("/v1/completions", {**body, "prompt": "a"}))
    await eventually(lambda: engine.stats()["num_requests_queued"] == 1)
    status, answer = await served_narrowly.post("/v1/completions", {**body, "prompt": ["a"] * 4})
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    assert (engine.stats()["requests"], len(engine.streams)) == (1, 1)
    more = asyncio.ensure_future(served_narrowly.post("/v1/completions", {**body, "prompt": ["a"] * 3}))
    await eventually(lambda: engine.stats()["num_requests_queued"] == 4)
    engine.release()
    assert ((await asking)[0], (await more)[0]) == (200, 200)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prompt_that_fails_ends_the_call(served: Served, stream: bool) -> None:
    script = served.engine.script
    script.fail_after, script.fail_slots, script.step_delay = 3, {1}, 0.005
    body = {**LONG, "prompt": ["a", "b", "c"], "stream": stream}
    async with served.http.post(served.url + "/v1/completions", json=body) as response:
        text = (await response.read()).decode()
    assert response.status == (200 if stream else 500)
    assert text.count("numerical_error") == 1
    await eventually(lambda: served.engine.num_unfinished == 0)
    assert served.engine.streams == {}
    for reason, count in (("error", 1), ("abort", 2)):
        assert await served.metric(f'vllm:request_success_total{{finished_reason="{reason}"') == count
    assert await served.metric('octavo:http_errors_total{code="numerical_error"') == 1


async def test_a_slow_reader_does_not_slow_others(served: Served) -> None:
    body = {**LONG, "stream": True, "logprobs": 20}
    async with served.http.post(served.url + "/v1/completions", json=body) as slow:
        await slow.content.readexactly(10)
        assert (await served.post("/v1/completions", {"prompt": "Hi"}))[0] == 200
        assert (await slow.read()).endswith(b"data: [DONE]\n\n")


# ---- refusals and failures -----------------------------------------------------------------------


async def test_queue_overflow(served_narrowly: Served) -> None:
    """Every call is either served or refused with 429 and Retry-After; the sum is what was asked."""
    served_narrowly.engine.script.step_delay = 0.002

    async def one(_: int) -> tuple[int, str | None]:
        body = {"prompt": "Hi", "max_tokens": 20}
        async with served_narrowly.http.post(served_narrowly.url + "/v1/completions", json=body) as response:
            answer = await response.json()
            if response.status == 429:
                assert (answer["error"]["code"], answer["error"]["type"]) == ("queue_full", "rate_limit_error")
                assert 1 <= int(response.headers["Retry-After"]) <= 60
            return response.status, response.headers.get("Retry-After")

    statuses = [status for status, _ in await asyncio.gather(*map(one, range(40)))]
    assert set(statuses) == {200, 429}
    assert (await served_narrowly.post("/v1/completions", {"prompt": "Hi"}))[0] == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_text_work_counts_towards_the_queue(served_narrowly: Served, path: str) -> None:
    """While nothing can be tokenised, four calls wait for it and the others are refused at once,
    without text work.
    """
    go = threading.Event()
    pool = served_narrowly.engine._text_pool
    busy = [pool.submit(go.wait, 30) for _ in range(2)]
    body = {**(LONG_CHAT if "chat" in path else LONG), "max_tokens": 5, "ignore_eos": False}
    calls = [asyncio.ensure_future(served_narrowly.post(path, body)) for _ in range(12)]
    try:
        await eventually(lambda: sum(call.done() for call in calls) == 8)
        assert pool._work_queue.qsize() == 4
        assert {call.result()[0] for call in calls if call.done()} == {429}
        calls.pop(
            next(index for index, call in enumerate(calls) if not call.done())
        ).cancel()  # its place is free again
        await eventually(lambda: served_narrowly.engine._in_text == 3)
    finally:
        go.set()
    statuses = [(await call)[0] for call in calls]
    assert all(job.result() for job in busy)
    assert sorted(statuses) == [200] * 3 + [429] * 8
    assert served_narrowly.engine._in_text == 0
    assert (await served_narrowly.post(path, body))[0] == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failed_request_says_so(served: Served, stream: bool) -> None:
    served.engine.script.fail_after = 3
    body = {"prompt": "Hi", "stream": stream}
    async with served.http.post(served.url + "/v1/completions", json=body) as response:
        if stream:
            *_, error, done = parse_events((await response.read()).decode())
            assert (response.status, done) == (200, "[DONE]")
        else:
            error = await response.json()
            assert response.status == 500
    assert (error["error"]["type"], error["error"]["code"]) == ("server_error", "numerical_error")
    served.engine.script.fail_after = None
    assert (await served.post("/v1/completions", body | {"stream": False}))[0] == 200
    assert await served.metric('vllm:request_success_total{finished_reason="error"') == 1


async def test_dead_engine(served: Served) -> None:
    served.engine.die("CUDA error: an illegal memory access at /secret/path")
    await eventually(lambda: served.engine.is_dead)
    for path in ("/health", "/ready"):
        assert (await served.get(path))[0] == 503
    status, answer = await served.post("/v1/completions", {"prompt": "Hi"})
    assert (status, answer["error"]["code"]) == (503, "engine_dead")
    assert "secret" not in answer["error"]["message"]


async def test_an_engine_that_dies_under_a_whole_answer(served: Served) -> None:
    served.engine.script.step_delay = 0.01
    asking = asyncio.ensure_future(served.http.post(served.url + "/v1/completions", json=LONG))
    await eventually(lambda: served.engine.num_unfinished == 1)
    served.engine.die("CUDA error: an illegal memory access at /secret/path")
    async with await asking as response:
        answer = await response.json()
    assert (response.status, answer["error"]["code"]) == (503, "engine_dead")
    assert answer["error"]["type"] == "overloaded_error"
    assert int(response.headers["Retry-After"]) > 0
    assert "secret" not in answer["error"]["message"]


async def test_a_call_that_comes_while_the_engine_dies_is_told(served: Served) -> None:
    """Between the look at the engine and the core: its last words have gone out, to all but this
    call.
    """
    engine = served.engine
    core = engine.core

    class Dying:
        def __getattr__(self, name: str) -> object:
            return getattr(core, name)

        def add_call(self, *args: object, **kwargs: object) -> int:
            engine.die("illegal memory access")
            deadline = time.monotonic() + 60
            while engine._thread.is_alive():
                assert time.monotonic() < deadline
                time.sleep(0.005)
            return core.add_call(*args, **kwargs)

    engine.core = Dying()
    status, answer = await asyncio.wait_for(served.post("/v1/completions", {"prompt": "Hi"}), 60)
    assert (status, answer["error"]["code"]) == (503, "engine_dead")
    assert engine.num_unfinished == 0


async def test_retry_after_does_not_count_idle_time(served_narrowly: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that take 2 s one after the other, with an hour between the second and the third."""
    metrics = Metrics(served_narrowly.engine, Keys(ServerConfig()))
    clock = iter([102.0, 104.0, 3702.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    for arrival in (100.0, 100.5, 3700.0):
        metrics.finished("stop", arrival)
    monkeypatch.undo()
    served_narrowly.engine.stats = lambda: {"num_requests_queued": 3.0}
    assert metrics.retry_after() == 6
    for _ in range(10):
        metrics.finished("abort", 0.0)  # who leaves says nothing of how long an answer takes
    assert metrics.retry_after() == 6


async def test_what_fewer_bits_cost_is_told(served: Served) -> None:
    metrics = Metrics(served.engine, Keys(ServerConfig()))
    assert b"octavo:quality_loss" not in metrics.render()
    kept = {3: 0.5, 7: 0.6}
    parts = (Part("weights", "int4 weights", kept), Part("kv_cache", "int8 keys and values", {}))
    served.engine.report = SimpleNamespace(verdict=Verdict(30, 256, 0.125, parts))
    told = metrics.render().decode()
    assert re.search(r"^octavo:quality_loss{[^}]*} 0.125$", told, re.M)
    for part, count in (("weights", "2.0"), ("kv_cache", "0.0")):
        assert re.search(rf'^octavo:layers_in_16_bits{{[^}}]*part="{part}"}} {count}$', told, re.M)
    served.engine.report = SimpleNamespace(verdict=Verdict(30))  # random weights
    assert b"octavo:quality_loss" not in metrics.render()


async def test_parameters_are_counted_for_each_request(served: Served) -> None:
    await served.post("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2})
    await served.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3})
    await served.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    for name, count, total in (("n", 6, 9), ("max_tokens", 2, 6), ("prompt_tokens", 6, None)):
        name = f"vllm:request_params_{name}" if total else f"vllm:request_{name}"
        assert await served.metric(f"{name}_count") == count
        assert total is None or await served.metric(f"{name}_sum") == total


async def test_prompt_tokens_count_as_they_are_computed(served: Served) -> None:
    """A prompt of 40 tokens, and then the eight of it that no whole block keeps."""
    for _ in range(2):
        await served.post("/v1/completions", {"prompt": [7] * 40, "max_tokens": 1})
    stats = served.engine.stats()
    assert (stats["prompt_tokens"], stats["computed_prompt_tokens"]) == (80, 48)


@pytest.mark.parametrize("body", [{"prompt": ["a"] * 5}, {"prompt": ["a"] * 9}, {"prompt": ["a", "x" * 600]}])
async def test_a_call_that_is_refused_counts_as_nothing_else(served_narrowly: Served, body: dict[str, object]) -> None:
    assert (await served_narrowly.post("/v1/completions", body))[0] == 400
    assert await served_narrowly.metric("vllm:request_success_total") == 0
    assert await served_narrowly.metric("vllm:request_params_n_count") == 0


async def test_stuck_engine_is_unhealthy(served: Served) -> None:
    served.engine.script.step_started_at = time.monotonic() - 61.0
    assert (await served.get("/health"))[0] == 503


# ---- the life of the process ---------------------------------------------------------------------


class Process:
    """`serve_engine` as a task of this process, on a free port."""

    def __init__(self, **options: float) -> None:
        self.engine = ScriptedEngine()
        self.engine.script.step_delay = 0.01
        config = ServerConfig(port=0, **options)
        listener = open_socket(config)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.task = asyncio.ensure_future(serve_engine(self.engine, config, listener))

    async def ready(self, http: aiohttp.ClientSession) -> None:
        for _ in range(12_000):
            try:
                async with http.get(self.url + "/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.01)
        raise AssertionError("never ready")

    async def exit_code(self) -> int:
        return await asyncio.wait_for(self.task, 120)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def streaming(process: Process, http: aiohttp.ClientSession, **fields: object) -> aiohttp.ClientResponse:
    """A stream whose first token has come."""
    response = await http.post(process.url + "/v1/completions", json={**LONG, "stream": True, **fields})
    await response.content.readuntil(b"\n\n")
    return response


async def test_sigterm_drains(
    http: aiohttp.ClientSession, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "octavo")
    process = Process(shutdown_timeout=30.0)
    await process.ready(http)
    assert f"curl {process.url}/v1/chat/completions" in capfd.readouterr().err
    response = await streaming(process, http, max_tokens=40)
    os.kill(os.getpid(), signal.SIGTERM)
    await eventually(lambda: process.engine.draining)
    for path, status in (("/health", 200), ("/ready", 503), ("/metrics", 200)):
        async with http.get(process.url + path) as probe:
            assert probe.status == status
    async with http.post(process.url + "/v1/completions", json=LONG) as refused:
        assert refused.status == 503
        assert (await refused.json())["error"]["code"] == "server_shutting_down"
        assert int(refused.headers["Retry-After"]) > 0
    events = parse_events((await response.read()).decode())
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert await process.exit_code() == 0
    assert "draining: 1 requests run and 0 wait, which have 30 s" in caplog.text
    assert caplog.messages[-1] == "stopped"


async def test_a_body_that_is_half_sent_is_told_of_the_end(http: aiohttp.ClientSession) -> None:
    process = Process(shutdown_timeout=30.0)
    await process.ready(http)
    host, _, port = process.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    await asyncio.sleep(0.2)  # until its handler waits for the rest
    os.kill(os.getpid(), signal.SIGTERM)
    answer = await asyncio.wait_for(reader.read(), 60)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"server_shutting_down" in answer and b"Retry-After" in answer
    writer.close()
    assert await process.exit_code() == 0


@pytest.mark.parametrize("second_signal", [False, True])
async def test_what_does_not_finish_in_time_gets_an_error(http: aiohttp.ClientSession, second_signal: bool) -> None:
    process = Process(shutdown_timeout=60.0 if second_signal else 0.1)
    await process.ready(http)
    response = await streaming(process, http)
    os.kill(os.getpid(), signal.SIGTERM)
    if second_signal:
        await eventually(lambda: process.engine.draining)
        os.kill(os.getpid(), signal.SIGTERM)
    *_, error, done = parse_events((await response.read()).decode())
    assert (error["error"]["code"], done) == ("server_shutting_down", "[DONE]")
    assert await process.exit_code() == 0


async def test_a_dead_engine_ends_the_process(http: aiohttp.ClientSession) -> None:
    process = Process()
    await process.ready(http)
    response = await streaming(process, http)
    process.engine.die("illegal memory access")
    *_, error, done = parse_events((await response.read()).decode())
    assert (error["error"]["code"], done) == ("engine_dead", "[DONE]")
    assert await process.exit_code() == 1


async def test_an_engine_that_dies_in_a_drain_is_told_by_the_exit_code(http: aiohttp.ClientSession) -> None:
    process = Process(shutdown_timeout=30.0)
    await process.ready(http)
    response = await streaming(process, http)
    os.kill(os.getpid(), signal.SIGTERM)
    await eventually(lambda: process.engine.draining)
    process.engine.die("illegal memory access")
    *_, error, done = parse_events((await response.read()).decode())
    assert (error["error"]["code"], done) == ("engine_dead", "[DONE]")
    assert await process.exit_code() == 1


def test_a_port_in_use_is_said_at_once() -> None:
    with open_socket(ServerConfig(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            open_socket(ServerConfig(port=port))
