"""A request's story: `usage.timing`, and `/v1/requests/{id}/timeline`."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from octavo.server.config import ServerConfig
from octavo.server.timelines import Timelines
from tests.server.conftest import Served, serving
from tests.server.scripted_engine import ScriptedEngine

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
CALLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "abc"}),
    ("/v1/chat/completions", CHAT),
    ("/v1/responses", {"input": "hi"}),
    ("/v1/messages", {**CHAT, "max_tokens": 50}),
    ("/api/chat", {"model": "tiny", **CHAT, "stream": False}),
    ("/api/generate", {"model": "tiny", "prompt": "hi", "stream": True}),
    ("/generate", {"inputs": "abc"}),
    ("/v1/embeddings", {"input": "abc"}),
)


@pytest.fixture
async def served_with_keys() -> AsyncIterator[Served]:
    async for one in serving(ScriptedEngine(model="tiny"), ServerConfig(api_key=("one", "two"))):
        yield one


@pytest.fixture
async def served_by_one() -> AsyncIterator[Served]:
    """One request runs at a time."""
    engine = ScriptedEngine(max_num_seqs=1)
    async for one in serving(engine, ServerConfig()):
        yield one


async def answer(served: Served, path: str, body: Any, **headers: str) -> tuple[Any, str]:
    """The bytes of an answer and its request id."""
    async with served.http.post(served.url + path, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        return await response.read(), response.headers["X-Request-Id"]


def of(story: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for prompt in story["prompts"] for event in prompt["events"] if event["event"] == kind]


@pytest.mark.parametrize(("path", "body"), CALLS, ids=[path for path, _ in CALLS])
async def test_a_story_is_found_by_the_request_id_with_the_same_key_alone(
    served_with_keys: Served, path: str, body: dict[str, Any]
) -> None:
    served = served_with_keys
    mine, theirs = {"Authorization": "Bearer one"}, {"Authorization": "Bearer two"}
    _, name = await answer(served, path, body, Authorization="Bearer one", **{"X-Request-Id": "a.name:1"})
    assert name == "a.name:1"
    status, story = await served.get("/v1/requests/a.name:1/timeline", headers=mine)
    assert (status, story["object"], story["ended"]) == (200, "request.timeline", True)
    assert [event["event"] for event in story["prompts"][0]["events"]][:2] == ["queued", "prompt_chunk"]
    assert of(story, "ended")[0]["reason"] == "stop"
    status, error = await served.get("/v1/requests/a.name:1/timeline", headers=theirs)
    assert (status, error["error"]["code"]) == (404, "timeline_not_found")
    status, error = await served.get("/v1/requests/a.name:1/timeline")
    assert (status, error["error"]["code"]) == (401, "invalid_api_key")


async def test_it_is_found_by_the_id_of_the_answer(served: Served) -> None:
    for path, body in CALLS[:4]:
        _, reply = await served.post(path, body)
        status, story = await served.get(f"/v1/requests/{reply['id']}/timeline")
        assert (status, story["id"]) == (200, reply["id"])


async def test_unknown_ids_are_a_404(served: Served) -> None:
    for name in ("chatcmpl-none", "%00", "x" * 5000, "..%2F..%2Fetc"):
        status, error = await served.get(f"/v1/requests/{name}/timeline")
        assert (status, error["error"]["code"]) in ((404, "timeline_not_found"), (404, "route_not_found"))
        assert len(error["error"]["message"]) < 400


async def test_what_is_told_adds_up_with_the_answer(served: Served) -> None:
    body = {"prompt": ["abc", "defgh"], "n": 2, "max_tokens": 5, "timing": True}
    _, reply = await served.post("/v1/completions", body)
    _, story = await served.get(f"/v1/requests/{reply['id']}/timeline")
    usage = reply["usage"]
    assert [prompt["prompt_tokens"] for prompt in story["prompts"]] == [3, 5]
    assert sum(prompt["output_tokens"] for prompt in story["prompts"]) == usage["completion_tokens"] == 20
    drawn = sum(event["output_tokens"] for event in of(story, "prompt_chunk") + of(story, "decode"))
    assert drawn == 20
    for prompt in story["prompts"]:
        for choice in (0, 1):
            events = [event for event in prompt["events"] if event["choice"] == choice]
            queued = events[0]
            # Those of a choice follow one another, and what it waited for fills its waiting.
            assert [event["event"] for event in events] == ["queued", "prompt_chunk", "decode", "ended"]
            assert sum(queued["by"].values()) == pytest.approx(queued["duration"], abs=1e-4)
            for event, then in itertools.pairwise(events):
                assert event["at"] + event["duration"] <= then["at"] + then["duration"] + 1e-5
            assert queued["at"] + queued["duration"] == pytest.approx(events[1]["at"], abs=1e-5)
            assert queued["cached_tokens"] + events[1]["tokens"] == prompt["prompt_tokens"]
            assert (events[3]["reason"], events[2]["steps"]) == ("length", 4)
    timing = usage["timing"]
    parts = timing["queue_time"] + timing["prompt_time"] + timing["completion_time"]
    assert parts == pytest.approx(timing["total_time"], abs=2e-6)
    last = max(event["at"] for event in of(story, "ended"))
    assert timing["total_time"] == pytest.approx(last - story["prompts"][0]["received"], abs=1e-4)


async def test_a_long_prompt_is_told_chunk_by_chunk() -> None:
    engine = ScriptedEngine(max_model_len=8192, num_blocks=600)
    async for served in serving(engine, ServerConfig()):
        budget = engine.config.max_num_batched_tokens or 0
        length = 2 * budget + 100
        assert length < 8192
        _, reply = await served.post("/v1/completions", {"prompt": [65] * length, "max_tokens": 1})
        _, story = await served.get(f"/v1/requests/{reply['id']}/timeline")
        assert [event["tokens"] for event in of(story, "prompt_chunk")] == [budget, budget, 100]
        _, again = await served.post("/v1/completions", {"prompt": [65] * length, "max_tokens": 1})
        _, story = await served.get(f"/v1/requests/{again['id']}/timeline")
        cached = of(story, "queued")[0]["cached_tokens"]
        assert cached == story["prompts"][0]["cached_tokens"] == (length - 1) // 16 * 16
        assert sum(event["tokens"] for event in of(story, "prompt_chunk")) == length - cached


async def test_who_waits_is_told_for_what_while_it_waits(served_by_one: Served) -> None:
    served = served_by_one
    served.engine.script.step_delay = 0.02
    first = asyncio.create_task(answer(served, "/v1/completions", {"prompt": "abc", "max_tokens": 12}))
    while served.engine.stats()["num_requests_running"] < 1:
        await asyncio.sleep(0.005)
    second = asyncio.create_task(
        answer(served, "/v1/completions", {"prompt": "abc", "max_tokens": 2}, **{"X-Request-Id": "second"})
    )
    while served.engine.stats()["num_requests_waiting"] < 1:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.06)
    _, story = await served.get("/v1/requests/second/timeline")
    (waits,) = of(story, "queued")
    assert not story["ended"] and not waits["admitted"] and waits["by"]["slots"] > 0.02
    await asyncio.gather(first, second)
    _, story = await served.get("/v1/requests/second/timeline")
    (waited,) = of(story, "queued")
    assert story["ended"] and waited["admitted"] and waited["by"]["slots"] > waits["by"]["slots"]


async def test_a_preempted_request_says_so() -> None:
    engine = ScriptedEngine(max_num_seqs=2, num_blocks=7, max_model_len=96)  # six blocks of 16 tokens
    engine.script.answer = b"x" * 200
    async for served in serving(engine, ServerConfig()):
        bodies = [{"prompt": [65 + i] * 30, "max_tokens": 60, "timing": True} for i in range(2)]
        replies = await asyncio.gather(*(served.post("/v1/completions", body) for body in bodies))
        preemptions = 0
        for _, reply in replies:
            _, story = await served.get(f"/v1/requests/{reply['id']}/timeline")
            told = of(story, "preempted")
            assert len(told) == reply["usage"]["timing"]["preemptions"] == story["prompts"][0]["preemptions"]
            assert len(of(story, "queued")) == 1 + len(told)
            drawn = sum(event["output_tokens"] for event in of(story, "prompt_chunk") + of(story, "decode"))
            assert drawn == 60
            preemptions += len(told)
        assert preemptions == served.engine.stats()["num_preemptions"]


async def test_a_client_that_leaves_is_told_of(served_by_one: Served) -> None:
    served = served_by_one
    served.engine.hold()
    body = {"prompt": "abc"}
    with pytest.raises(asyncio.TimeoutError):
        await served.http.post(
            served.url + "/v1/completions",
            json=body,
            headers={"X-Request-Id": "left"},
            timeout=aiohttp.ClientTimeout(total=0.3),
        )
    while served.engine.num_unfinished:
        await asyncio.sleep(0.01)
    served.engine.release()
    _, story = await served.get("/v1/requests/left/timeline")
    assert of(story, "ended")[0]["reason"] == "abort" and not of(story, "queued")[0]["admitted"]


async def test_later_requests_take_the_place_of_a_story(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.server.timelines.MAX_CALLS", 2)
    names = []
    for _ in range(4):
        _, reply = await served.post("/v1/completions", {"prompt": "abc", "max_tokens": 1})
        names.append(reply["id"])
    statuses = [(await served.get(f"/v1/requests/{name}/timeline"))[0] for name in names]
    assert statuses == [404, 404, 200, 200]
    # One whose events are partly overwritten is not told in part, though it is known by name.
    kept = Timelines._stories
    monkeypatch.setattr(Timelines, "_stories", lambda *given: [*kept(*given), None])
    status, answer = await served.get(f"/v1/requests/{names[-1]}/timeline")
    assert (status, answer["error"]["code"]) == (404, "timeline_not_found")


@pytest.mark.parametrize(("path", "body"), CALLS[:4], ids=[path for path, _ in CALLS[:4]])
async def test_usage_has_the_timing_where_it_is_asked_for(served: Served, path: str, body: dict[str, Any]) -> None:
    fields = {"queue_time", "prompt_time", "completion_time", "total_time", "preemptions"}
    _, reply = await served.post(path, {**body, "timing": True})
    assert set(reply["usage"]["timing"]) == fields
    _, reply = await served.post(path, body)
    assert "timing" not in reply["usage"]
    async with served.http.post(served.url + path, json={**body, "timing": True, "stream": True}) as response:
        text = await response.text()
    assert text.count('"timing":{') == 1
    async with served.http.post(served.url + path, json={**body, "stream": True}) as response:
        assert "timing" not in await response.text()


DEADLINES = (*CALLS[:6], ("/generate", {"inputs": "abc"}), ("/generate_stream", {"inputs": "abc"}))


@pytest.mark.parametrize(("path", "body"), DEADLINES, ids=[path for path, _ in DEADLINES])
@pytest.mark.parametrize("by_header", [False, True])
async def test_a_deadline_holds_on_every_route_that_generates(
    served_by_one: Served, path: str, body: dict[str, Any], by_header: bool
) -> None:
    served = served_by_one
    body = body if "model" not in body else {**body, "model": "org/tiny"}
    in_body = not by_header and not path.startswith("/generate")
    given = {**body, "deadline_ms": 150} if in_body else body
    headers = {} if in_body else {"X-Deadline-Ms": "150"}
    served.engine.hold()
    async with served.http.post(served.url + path, json=given, headers=headers) as response:
        text = await response.text()
    assert "not done in time" in text or "deadline" in text
    if response.status == 200:  # the stream had begun
        assert body.get("stream") or path == "/generate_stream"
    else:
        assert response.status == 408
    while served.engine.num_unfinished:
        await asyncio.sleep(0.01)
    served.engine.release()


@pytest.mark.parametrize(("path", "body"), DEADLINES, ids=[path for path, _ in DEADLINES])
@pytest.mark.parametrize("value", ["0", "-1", "1e3", "86400001", "x", "9" * 200])
async def test_a_deadline_that_is_none_is_refused(served: Served, path: str, body: dict[str, Any], value: str) -> None:
    body = body if "model" not in body else {**body, "model": "org/tiny"}
    status, error = await served.post(path, body, headers={"X-Deadline-Ms": value})
    assert status in (400, 422)
    assert "X-Deadline-Ms" in str(error)
    if value in ("0", "-1", "86400001") and not path.startswith("/generate"):
        status, error = await served.post(path, {**body, "deadline_ms": int(value)})
        assert status == 400 and "deadline_ms" in str(error)
