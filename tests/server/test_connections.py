"""What raw sockets send: broken HTTP, and headers and bodies that never end. Every answer has the
shape of an error.
"""

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from octavo.server import body, connections
from tests.server.conftest import Served

POST = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


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


async def test_headers_that_are_too_long(served: Served) -> None:
    status, error = await exchange(served, b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (status, error["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize("pieces", [[b"GET /hea"], [POST], [b"GET / HT", b"TP/1.1\r\n", b"A: 1\r\n"]])
async def test_slow_headers_are_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch, pieces: list[bytes]) -> None:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT", 0.3)
    status, error = await exchange(served, *pieces, pause=0.05)
    assert (status, error["code"]) == (408, "header_timeout")


async def test_slow_headers_of_a_later_request_are_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT", 0.3)
    url = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert b"200 OK" in await reader.readuntil(b"}")
    await asyncio.sleep(0.5)  # an idle connection is not a slow one
    writer.write(b"GET /health HT")
    assert b"408 Request Timeout" in await asyncio.wait_for(reader.read(), 120)
    writer.close()


async def test_a_slow_body_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_TIMEOUT", 0.3)
    status, error = await exchange(served, POST + b"Content-Length: 100\r\n\r\n{", b'"', b"a", pause=0.05)
    assert (status, error["code"]) == (408, "body_timeout")


async def test_a_long_answer_is_not_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT", 0.2)
    served.engine.script.first_delay = 0.6
    status, _ = await served.post("/v1/completions", {"prompt": "Hi"})
    assert status == 200
