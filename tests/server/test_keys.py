"""Keys from a file, what each may use, deadlines, and pages of other origins."""

import asyncio
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from octavo.server import keys as keys_module
from octavo.server.app import build_app
from octavo.server.config import ServerConfig
from octavo.server.keys import Keys, read_keys
from tests.server.conftest import Served, serving
from tests.server.scripted_engine import ScriptedEngine

LIMITED = {
    "keys": [
        {"name": "ops", "sha256": hashlib.sha256(b"ops-key").hexdigest(), "weight": 2.5},
        {"name": "one", "key": "one-key", "max_concurrency": 1},
        {"name": "few", "key": "few-key", "tokens_per_minute": 600},
        {"name": "red", "key": "red-key", "cache_salt": "team"},
        {"name": "blue", "key": "blue-key", "cache_salt": "team"},
    ]
}
CALL = {"prompt": "Hello", "max_tokens": 8}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


def config_of(tmp_path: Path, content: Any, **options: Any) -> ServerConfig:
    file = tmp_path / "keys"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return ServerConfig(api_key_file=str(file), **options)


@pytest.fixture
async def limited(tmp_path: Path) -> AsyncIterator[Served]:
    async for one in serving(ScriptedEngine(), config_of(tmp_path, LIMITED)):
        yield one


def test_lines_and_digests(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"second").hexdigest()
    config = config_of(tmp_path, f"# ours\nfirst\n\n  sha256:{digest}\n", api_key=("third",))
    known = Keys(config)
    callers = {key: known.find(key) for key in ("first", "second", "third", "fourth", "", f"sha256:{digest}")}
    names = {key: caller and caller.key.name for key, caller in callers.items()}
    assert names == {
        "first": "line-2",
        "second": "line-4",
        "third": "api-key-1",
        "fourth": None,
        "": None,
        f"sha256:{digest}": None,
    }
    for text in (repr(known.__dict__), repr(read_keys(config))):
        assert "first" not in text.replace("api_key_file", "") and digest not in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no key"),
        ("# nothing\n", "no key"),
        ("sha256:12", "line 1: sha256 must be 64"),
        ("same\nsame\n", "keys 1 and 2 have the same key"),
        ("{", "not JSON"),
        ({"key": []}, "must be"),
        ({"keys": []}, "no key"),
        ({"keys": [1]}, "key 1: must be an object"),
        ({"keys": [{"name": "a"}]}, "key 1: must have either key or sha256"),
        ({"keys": [{"name": "a", "key": "b", "sha256": "0" * 64}]}, "either key or sha256"),
        ({"keys": [{"key": "b"}]}, "name must be"),
        ({"keys": [{"name": "a b", "key": "b"}]}, "name must be"),
        ({"keys": [{"name": "a", "key": ""}]}, "key must be text"),
        ({"keys": [{"name": "a", "key": "b", "rate": 1}]}, "'rate' is unknown"),
        ({"keys": [{"name": "a", "key": "b", "weight": 0}]}, "weight = 0: must be a number from 0.001"),
        ({"keys": [{"name": "a", "key": "b", "weight": True}]}, "weight = True"),
        ('{"keys": [{"name": "a", "key": "b", "weight": NaN}]}', "weight = nan"),
        ({"keys": [{"name": "a", "key": "b", "max_concurrency": 0}]}, "max_concurrency = 0"),
        ({"keys": [{"name": "a", "key": "b", "tokens_per_minute": 1.5}]}, "tokens_per_minute = 1.5"),
        ({"keys": [{"name": "a", "key": "b"}, {"name": "a", "key": "c"}]}, "the same name"),
    ],
)
def test_files_that_are_wrong_are_refused_by_name(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        read_keys(config_of(tmp_path, content))


def test_a_priority_needs_its_policy(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"keys": [{"name": "late", "key": "k", "priority": 3}]})
    with pytest.raises(ValueError, match=r"late.*--scheduling-policy priority"):
        build_app(ScriptedEngine(), config)
    keys = Keys(config)
    caller = keys.find("k")
    assert caller is not None
    assert [caller.priority(asked) for asked in (0, -5, 2**31 - 1)] == [3, -2, 2**31 - 1]


async def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.*No such file"):
        read_keys(ServerConfig(api_key_file=str(tmp_path / "nowhere")))
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match=f"api_key_file = '{special}': not a regular file"):
            read_keys(ServerConfig(api_key_file=str(special)))


async def test_all_keys_of_the_file_open_the_routes(limited: Served) -> None:
    for key in ("ops-key", "one-key", "few-key"):
        status, answer = await limited.post("/v1/completions", CALL, headers=bearer(key))
        assert (status, answer["choices"][0]["text"]) == (200, "Hello wo")
        async with limited.http.get(limited.url + "/v1/models", headers={"X-Api-Key": key}) as response:
            assert response.status == 200
    for wrong in ("ops", "ops-key ops-key", LIMITED["keys"][0]["sha256"]):
        assert (await limited.post("/v1/completions", CALL, headers=bearer(str(wrong))))[0] == 401


async def test_a_key_may_have_so_many_calls_at_work(limited: Served) -> None:
    limited.engine.script.go.clear()
    first = asyncio.ensure_future(limited.post("/v1/completions", CALL, headers=bearer("one-key")))
    while not limited.engine.stats()["requests"]:
        await asyncio.sleep(0.01)
    for path, body in (
        ("/v1/completions", CALL),
        ("/v1/completions", b"{"),  # before its body is looked at
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True}),
        ("/generate", {"inputs": "Hi"}),
    ):
        async with limited.http.post(
            limited.url + path, data=body if isinstance(body, bytes) else json.dumps(body), headers=bearer("one-key")
        ) as response:
            assert response.status == 429
            assert 1 <= int(response.headers["Retry-After"]) <= 60
            error = await response.json()
            assert "max_concurrency" in (error["error"] if path == "/generate" else error["error"]["message"])
    other = asyncio.ensure_future(limited.post("/v1/completions", CALL, headers=bearer("ops-key")))
    limited.engine.script.go.set()
    assert [(await first)[0], (await other)[0]] == [200, 200]
    assert (await limited.post("/v1/completions", CALL, headers=bearer("one-key")))[0] == 200
    assert await limited.metric('octavo:key_refusals_total{key="one"') == 4
    assert await limited.metric("octavo:key_calls") == 0


async def test_tokens_a_minute(limited: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(keys_module.time, "monotonic", lambda: now)
    caller = limited.keys.find("few-key")
    assert caller is not None
    for _ in range(3):  # 100 of the prompt, 100 set aside, of which 50 come
        caller.begin(100, 1, 100).end(150)
    caller.begin(50, 1, 100).end(150)
    with pytest.raises(Exception, match="600 tokens a minute") as refusal:
        caller.begin(10, 1, 20)
    assert refusal.value.status == 429 and refusal.value.code == "key_token_rate"  # type: ignore[attr-defined]
    assert refusal.value.headers["Retry-After"] == "3"  # type: ignore[attr-defined]  # 30 tokens at 10 a second
    assert (caller.active, caller.tokens, caller.refusals) == (0, 600, 1)
    now += 3.0
    caller.begin(10, 1, 20).end(30)
    now += 3600.0  # no more than a minute's is saved up
    caller.begin(5000, 1, 100).end(5100)  # more than ever fits waits for a whole minute's, and is paid off
    with pytest.raises(Exception, match="tokens a minute"):
        caller.check()
    now += 60 * 4500 / 600 + 0.2
    caller.check()


async def test_the_token_rate_over_http(limited: Served) -> None:
    body = {"prompt": "x" * 90, "max_tokens": 500}
    assert (await limited.post("/v1/completions", body, headers=bearer("few-key")))[0] == 400  # 480 fit at most
    used = {"prompt": "x" * 90, "max_tokens": 300}
    for _ in range(2):
        status, answer = await limited.post("/v1/completions", used, headers=bearer("few-key"))
        assert (status, answer["usage"]["total_tokens"]) == (200, 102)
    async with limited.http.post(
        limited.url + "/v1/completions",
        json={"prompt": "x" * 90, "max_tokens": 380},
        headers={"Authorization": "Bearer few-key"},
    ) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (429, "key_token_rate")
        assert int(response.headers["Retry-After"]) in range(5, 9)  # (470 - (600 - 204)) / 10 tokens a second
    assert await limited.metric('octavo:key_tokens_total{key="few"') == 204


async def test_a_prefix_is_found_by_its_own_key_alone(limited: Served) -> None:
    prompt = "a prefix of more than one block of sixteen tokens, which the cache holds"

    async def cached(key: str, **more: Any) -> bool:
        before = limited.engine.stats()["prefix_cache_hits"]
        body = {"prompt": prompt, "max_tokens": 1, **more}
        assert (await limited.post("/v1/completions", body, headers=bearer(key)))[0] == 200
        return bool(limited.engine.stats()["prefix_cache_hits"] > before)

    assert [await cached(key) for key in ("ops-key", "ops-key", "one-key", "one-key")] == [False, True, False, True]
    assert not await cached("ops-key", cache_salt="another")
    assert not await cached("one-key", cache_salt="another"), "a salt does not lead to another key's"
    assert [await cached("red-key"), await cached("blue-key")] == [False, True], "the file may have two share"


async def test_the_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path, "old\n")
    async for served in serving(ScriptedEngine(), config):
        (tmp_path / "keys").write_text("new\n")
        assert (await served.get("/v1/models", headers=bearer("new")))[0] == 401
        served.keys.reload()
        assert [(await served.get("/v1/models", headers=bearer(key)))[0] for key in ("old", "new")] == [401, 200]
        (tmp_path / "keys").write_text("sha256:bad\n")
        served.keys.reload()
        assert (await served.get("/v1/models", headers=bearer("new")))[0] == 200
        assert "the keys stay what they were" in caplog.text
        os.unlink(tmp_path / "keys")
        served.keys.reload()
        assert (await served.get("/v1/models", headers=bearer("new")))[0] == 200


async def test_one_keys_queue_does_not_delay_anothers_first(tmp_path: Path) -> None:
    engine = ScriptedEngine(max_num_seqs=1)
    async for served in serving(engine, config_of(tmp_path, "many\none\n")):
        served.engine.script.go.clear()
        done: list[str] = []

        async def call(key: str, served: Served = served, done: list[str] = done) -> None:
            assert (await served.post("/v1/completions", CALL, headers=bearer(key)))[0] == 200
            done.append(key)

        calls = [asyncio.ensure_future(call("many")) for _ in range(20)]
        while served.engine.stats()["requests"] < 20:
            await asyncio.sleep(0.01)
        calls.append(asyncio.ensure_future(call("one")))
        while served.engine.stats()["requests"] < 21:
            await asyncio.sleep(0.01)
        served.engine.script.go.set()
        await asyncio.gather(*calls)
        assert done.index("one") <= 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_ends_a_request_and_frees_it(served: Served, stream: bool) -> None:
    served.engine.script.step_delay = 0.05
    served.engine.script.answer = b"x" * 200
    body = {"prompt": "Hello", "max_tokens": 200, "deadline_ms": 300, "stream": stream}
    async with served.http.post(served.url + "/v1/completions", json=body) as response:
        if stream:
            assert response.status == 200
            text = (await response.read()).decode()
            assert '"code": "deadline_exceeded"' in text or '"code":"deadline_exceeded"' in text
            assert text.count('"text"') >= 1, "what came before it was told"
        else:
            assert response.status == 408
            assert (await response.json())["error"]["code"] == "deadline_exceeded"
    await asyncio.sleep(0.15)
    stats = served.engine.stats()
    assert (stats["num_requests_running"], stats["num_requests_waiting"], stats["kv_blocks_used"]) == (0, 0, 0)
    served.engine.script.step_delay = 0.0
    assert (await served.post("/v1/completions", {**CALL, "deadline_ms": 10000}))[0] == 200


async def test_a_deadline_ends_one_that_cannot_start(served: Served) -> None:
    served.engine.script.go.clear()
    status, answer = await served.post("/v1/completions", {**CALL, "deadline_ms": 100})
    assert (status, answer["error"]["code"]) == (408, "deadline_exceeded")
    assert served.engine.stats()["num_requests_waiting"] == 0
    served.engine.script.go.set()


@pytest.mark.parametrize("value", [0, -1, 86_400_001])
async def test_deadlines_that_are_none(served: Served, value: int) -> None:
    status, answer = await served.post("/v1/completions", {**CALL, "deadline_ms": value})
    assert (status, answer["error"]["param"]) == (400, "deadline_ms")


async def test_the_server_has_a_time_of_its_own() -> None:
    async for served in serving(ScriptedEngine(), ServerConfig(request_timeout=0.1)):
        served.engine.script.go.clear()
        for path, body in (
            ("/generate", {"inputs": "Hi"}),
            ("/api/generate", {"model": "m", "prompt": "Hi", "stream": False}),
        ):
            async with served.http.post(served.url + path, json=body) as response:
                assert response.status in (404, 408)
        status, answer = await served.post("/v1/completions", {**CALL, "deadline_ms": 60000})
        assert (status, answer["error"]["code"]) == (408, "deadline_exceeded")
        served.engine.script.go.set()


PREFLIGHT = {
    "Origin": "https://app.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}


@pytest.mark.parametrize("origins", ["*", "https://app.example", '["https://app.example", "https://b.example"]'])
async def test_pages_of_allowed_origins_may_call(origins: str) -> None:
    config = ServerConfig(api_key=("k",), allowed_origins=(origins,))
    async for served in serving(ScriptedEngine(), config):
        async with served.http.options(served.url + "/v1/completions", headers=PREFLIGHT) as response:
            assert response.status == 204, "a preflight comes without a key"
            assert "authorization" in response.headers["Access-Control-Allow-Headers"].lower()
            assert "POST" in response.headers["Access-Control-Allow-Methods"]
            allowed = response.headers["Access-Control-Allow-Origin"]
            assert allowed == ("*" if origins == "*" else "https://app.example")
        for headers, status in (({}, 401), (bearer("k"), 200)):
            async with served.http.get(
                served.url + "/v1/models", headers={"Origin": "https://app.example", **headers}
            ) as response:
                assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (status, allowed)
        body = {**CALL, "stream": True}
        async with served.http.post(
            served.url + "/v1/completions", json=body, headers={"Origin": "https://app.example", **bearer("k")}
        ) as response:
            assert response.headers["Access-Control-Allow-Origin"] == allowed


async def test_pages_of_other_origins_may_not() -> None:
    for config in (ServerConfig(), ServerConfig(allowed_origins=("https://b.example",))):
        async for served in serving(ScriptedEngine(), config):
            async with served.http.options(served.url + "/v1/completions", headers=PREFLIGHT) as response:
                assert response.status == 405
                assert "Access-Control-Allow-Origin" not in response.headers
            async with served.http.get(served.url + "/v1/models", headers=PREFLIGHT) as response:
                assert "Access-Control-Allow-Origin" not in response.headers


async def test_credentials_name_the_origin() -> None:
    config = ServerConfig(allowed_origins=("*",), allow_credentials=True, allowed_headers=("X-One",))
    async for served in serving(ScriptedEngine(), config):
        async with served.http.options(served.url + "/v1/models", headers=PREFLIGHT) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
            assert response.headers["Access-Control-Allow-Credentials"] == "true"
            assert response.headers["Access-Control-Allow-Headers"] == "X-One"


def test_lists_of_origins_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"allowed_origins.*JSON list"):
        ServerConfig(allowed_origins=("[1]",))


def test_the_wait_is_computed() -> None:
    assert keys_module.over_limit("c", "m", 2.2).headers["Retry-After"] == "3"
    assert keys_module.over_limit("c", "m", 1e9).headers["Retry-After"] == "60"
