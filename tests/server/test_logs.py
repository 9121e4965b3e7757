"""What the log says of requests: a line for each refusal, none that a client could have written, and
what of a request is ignored.
"""

import asyncio
import errno
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from octavo.server.config import ServerConfig
from octavo.server.log import one_line
from octavo.server.serve import LoopErrors, process_age
from tests.server.conftest import Served, serving
from tests.server.scripted_engine import ScriptedEngine


@pytest.fixture
async def chatty() -> AsyncIterator[Served]:
    config = ServerConfig(api_key=("secret-key",), access_log=True)
    async for one in serving(ScriptedEngine(max_num_seqs=1, max_waiting=1), config):
        yield one


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("octavo.server")]


async def test_each_refusal_leaves_one_line(served_narrowly: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "octavo")
    headers = {"X-Request-Id": "r-1"}
    served = served_narrowly
    for path, body, beginning in (
        ("/v1/completions", {"prompt": "Hi"}, None),
        ("/v1/completions", b"{", "400 json_invalid: "),
        ("/v1/completions", {"prompt": "Hi", "n": 0}, "400 invalid_value: n is 0"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a\nb"}]}, "400 template_error: "),
        ("/v1/nope", {}, "404 route_not_found: "),
        ("/v1/completions", {"prompt": "Hi", "model": "a\nb\x1b[31m"}, "404 model_not_found: "),
        ("/v1/models", {}, "405 method_not_allowed: "),
    ):
        caplog.clear()
        status, _ = await served.post(path, body, headers=headers)
        said = lines(caplog)
        if beginning is None:
            assert (status, said) == (200, [])
            continue
        assert len(said) == 1 and said[0].isprintable(), said
        assert said[0].startswith(f"POST {path}: {beginning}") and said[0].endswith(" (r-1)"), said
    served.engine.hold()
    calls = [asyncio.ensure_future(served.post("/v1/completions", {"prompt": "Hi"})) for _ in range(6)]
    while sum(call.done() for call in calls) < 2:
        await asyncio.sleep(0.005)
    assert sum(" 429 queue_full: " in line for line in lines(caplog)) == 2
    served.engine.release()
    await asyncio.gather(*calls)


async def test_keys_and_queries_are_not_logged(chatty: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "octavo")
    assert (await chatty.get("/v1/models?key=secret-key"))[0] == 401
    headers = {"Authorization": "Bearer secret-key"}
    assert (await chatty.get("/v1/models?key=secret-key", headers=headers))[0] == 200
    body = {"prompt": "my prompt", "max_tokens": 1}
    assert (await chatty.post("/v1/completions", body, headers=headers))[0] == 200
    refused, models, answer = lines(caplog)
    assert refused.startswith("GET /v1/models: 401 invalid_api_key: ")
    assert re.fullmatch(r"GET /v1/models: 200 in \d\.\d+ s, 127\.0\.0\.1 \(\w{32}\)", models)
    assert answer.startswith("POST /v1/completions: 200 in ")
    assert "secret-key" not in caplog.text and "my prompt" not in caplog.text


async def test_ignored_fields_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    async for served in serving(ScriptedEngine(), ServerConfig(params_mode="lenient")):
        await ignored_fields(served, caplog)


async def ignored_fields(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        body = {"prompt": "Hi", "bar": "u", "foo\nbar": 1, "suffix": None, "max_tokens": 1}
        assert (await served.post("/v1/completions", body))[0] == 200
    ignored = "requests have the field {}, which is ignored"
    assert lines(caplog) == [ignored.format("bar"), ignored.format("foo\\nbar")]
    assert await served.metric("octavo:unknown_fields_total") == 6
    many = {"prompt": "Hi", "max_tokens": 1, **{f"f{i}": 1 for i in range(500)}}
    assert (await served.post("/v1/completions", many))[0] == 200
    assert len(lines(caplog)) == 100  # a client cannot fill the log with names


def test_one_line() -> None:
    assert one_line("a\nb\r\u2028\x1b[0m\ud800é") == "a\\nb\\r\\u2028\\x1b[0m\\ud800é"
    assert len(one_line("\n" * 10_000)) < 700


async def test_running_out_of_files_is_a_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    class Loop:
        now, passed_on = 1000.0, 0

        def time(self) -> float:
            return self.now

        def default_exception_handler(self, _: dict[str, Any]) -> None:
            self.passed_on += 1

    loop: Any = Loop()
    handler = LoopErrors()
    for second in range(120):
        loop.now = 1000.0 + second
        handler(loop, {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "Too")})
    assert len(lines(caplog)) == 2 and "out of files" in lines(caplog)[0]
    assert not any(record.exc_info for record in caplog.records)
    handler(loop, {"message": "another", "exception": OSError(errno.EPIPE, "x")})
    handler(loop, {"message": "none"})
    assert loop.passed_on == 2


def test_the_age_of_the_process_counts_its_imports() -> None:
    import subprocess
    import sys

    code = "import time; began = time.monotonic(); from octavo.server.serve import process_age; "
    code += "print(process_age() > time.monotonic() - began)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"True\n"
    assert process_age() > 0.0


def test_log_levels() -> None:
    assert logging.getLevelName(ServerConfig(log_level="debug").log_level.upper()) == logging.DEBUG
    with pytest.raises(ValueError, match="log_level = 'loud': must be one of debug, info"):
        ServerConfig(log_level="loud")
