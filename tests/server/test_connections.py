"""What raw sockets send: broken HTTP, and headers and bodies that never end. Every answer has the
shape of an error.
"""

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from octavo.server.config import ServerConfig
from tests.server.conftest import Served, serving
from tests.server.scripted_engine import ScriptedEngine

POST = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.fixture
async def served_hastily() -> AsyncIterator[Served]:
    """Headers and bodies must come at once."""
    async for one in serving(ScriptedEngine(), ServerConfig(header_timeout=0.3, body_timeout=0.3)):
        yield one


async def exchange(served: Served, *pieces: bytes, pause: float = 0.0) -> tuple[int, dict[str, Any]]:
    """Sends the pieces, reads until the server closes: status and error of its one answer."""
    url = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        answer = await asyncio.wait_for(reader.read(), 120)
    finally:
        writer.close()
        await writer.wait_closed()
    head, _, text = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    assert b"aiohttp" not in head.lower()
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"GET\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon here\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nBad\x00name: 1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nA: b\r\n c\r\n\r\n",  # folded
        b"GET /health HTTP/1.1\r\nHost: a\r\nA: b\nc\r\n\r\n",
        b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 500 + b"\r\n",
        POST + b"Content-Length: 1e3\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        POST + b"Transfer-Encoding: chunked\r\n\r\nXYZ\r\nabc\r\n0\r\n\r\n",
    ],
)
async def test_broken_http_gets_a_json_error(served: Served, sent: bytes) -> None:
    status, error = await exchange(served, sent)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert error["code"] in ("bad_http", "invalid_encoding")
    assert "\n" not in error["message"] and "b'" not in error["message"]
    assert (await served.get("/health"))[0] == 200


async def test_broken_chunks_after_good_ones(served: Served) -> None:
    start = POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + b'{"pro' + b"\r\n"
    status, error = await exchange(served, start, b"XYZ\r\nabc\r\n", pause=0.1)
    assert status == 400 and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("sent", [b"GET /" + b"a" * 20_000 + b" HTTP", b"GET / HTTP/1.1\r\nA: " + b"a" * 1_000_000])
async def test_headers_that_are_too_long(served: Served, sent: bytes) -> None:
    status, error = await exchange(served, sent + b"/1.1\r\nHost: a\r\n\r\n")
    assert (status, error["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/nope"])
@pytest.mark.parametrize(
    "chunks",
    [
        b"1\r\nx\r\n" * 500_000,  # as many as three megabytes have room for
        b"5;" + b"x" * 100_000 + b"\r\nabcde\r\n0\r\n\r\n",
    ],
    ids=["bytes", "extension"],
)
async def test_chunks_that_are_mostly_overhead(served: Served, path: str, chunks: bytes) -> None:
    start = POST.replace(b"/v1/completions", path.encode()) + b"Transfer-Encoding: chunked\r\n\r\n"
    status, error = await exchange(served, start, chunks)
    assert (status, error["code"]) in ((400, "too_many_chunks"), (404, "route_not_found"))
    assert (status == 404) == (path == "/v1/nope")
    assert (await served.post("/v1/completions", {"prompt": "Hi"}))[0] == 200


async def test_chunks_over_the_limit_of_a_body(served: Served) -> None:
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    status, error = await exchange(served, POST + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 17)
    assert (status, error["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("size", [16, 1000, 300_000])
async def test_chunks_of_a_good_size_are_a_body(served: Served, size: int) -> None:
    text = json.dumps({"prompt": "Hi", "user": "x" * 100_000}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(text), size):
            yield text[start : start + size]

    for _ in range(2):  # on one connection
        async with served.http.post(served.url + "/v1/completions", data=pieces()) as response:
            assert response.status == 200


async def test_pipelined_requests_are_no_overhead(served: Served) -> None:
    url = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    body = b'{"prompt": "Hi"}'
    headers = POST + b"X-Padding: " + b"x" * 8000 + b"\r\nContent-Length: %d\r\n\r\n" % len(body)
    writer.write((headers + body) * 20)
    for _ in range(20):
        assert await asyncio.wait_for(reader.readuntil(b"\r\n"), 120) == b"HTTP/1.1 200 OK\r\n"
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
    writer.close()


@pytest.mark.parametrize("keep_alive", [b"", b"Connection: keep-alive\r\n"])
async def test_a_stream_of_http_1_0_ends_with_its_connection(served: Served, keep_alive: bytes) -> None:
    body = b'{"prompt": "Hi", "stream": true}'
    url = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(POST.replace(b"1.1", b"1.0") + keep_alive + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    head, _, events = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")  # to the end
    assert b"keep-alive" not in head.lower()
    assert events.endswith(b"data: [DONE]\n\n")
    writer.close()


async def test_what_no_handler_sees_is_counted_and_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "octavo")
    await exchange(served, b"GET\r\n\r\n")
    await exchange(served, POST + b"Content-Length: 16\r\nExpect: bananas\r\n\r\n")
    assert await served.metric('octavo:http_errors_total{code="bad_http"') == 1
    assert await served.metric('octavo:http_errors_total{code="unknown_expectation"') == 1
    lines = [record.getMessage() for record in caplog.records if record.name == "octavo.server.log"]
    assert [line.split(": ")[1][:3] for line in lines] == ["400", "417"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_leaving_during_the_upload_is_no_error(
    served: Served, caplog: pytest.LogCaptureFixture, chunked: bool
) -> None:
    url = urlsplit(served.url)
    for _ in range(3):
        _, writer = await asyncio.open_connection(url.hostname, url.port)
        length = b"Transfer-Encoding: chunked\r\n\r\n5\r\n" if chunked else b"Content-Length: 100\r\n\r\n"
        writer.write(POST + length + b'{"pro')
        await asyncio.sleep(0.05)
        writer.transport.abort()
    await asyncio.sleep(0.1)
    gc.collect()  # what nobody looked at is said then
    await asyncio.sleep(0)
    assert (await served.get("/health"))[0] == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


@pytest.mark.parametrize("pieces", [[b"GET /hea"], [POST], [b"GET / HT", b"TP/1.1\r\n", b"A: 1\r\n"]])
async def test_slow_headers_are_cut_off(served_hastily: Served, pieces: list[bytes]) -> None:
    served = served_hastily
    status, error = await exchange(served, *pieces, pause=0.05)
    assert (status, error["code"]) == (408, "header_timeout")


async def test_slow_headers_of_a_later_request_are_cut_off(served_hastily: Served) -> None:
    served = served_hastily
    url = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert b"200 OK" in await reader.readuntil(b"}")
    await asyncio.sleep(0.5)  # an idle connection is not a slow one
    writer.write(b"GET /health HT")
    assert b"408 Request Timeout" in await asyncio.wait_for(reader.read(), 120)
    writer.close()


async def test_a_slow_body_is_cut_off(served_hastily: Served) -> None:
    served = served_hastily
    status, error = await exchange(served, POST + b"Content-Length: 100\r\n\r\n{", b'"', b"a", pause=0.05)
    assert (status, error["code"]) == (408, "body_timeout")


async def test_a_long_answer_is_not_cut_off(served_hastily: Served) -> None:
    served = served_hastily
    served.engine.script.first_delay = 0.6
    status, _ = await served.post("/v1/completions", {"prompt": "Hi"})
    assert status == 200
