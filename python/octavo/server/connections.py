"""What happens on a connection before there is a request: a time limit for its headers, and errors
of the protocol in the one shape that all errors have.

aiohttp answers what it cannot parse with plain text, and lets headers trickle in for as long as an
idle connection lives. Bodies have their own limit (`body.BODY_TIMEOUT`), since those of a request
are read by its handler.
"""

import asyncio
import logging
import socket
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import _ErrInfo

from octavo.server.errors import ApiError, internal_error

logger = logging.getLogger(__name__)

HEADER_TIMEOUT = 30.0
"""Seconds from the first byte of a request to the end of its headers."""
KEEP_ALIVE_SECONDS = 75.0
"""How long a connection may be idle; longer than proxies keep theirs, so that they close first."""


class Connection(web.RequestHandler):
    """aiohttp's connection with a clock on the headers and JSON errors."""

    __slots__ = ("_header_timer",)

    def __init__(self, server: web.Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._header_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Bytes while no request is being answered begin a request, until aiohttp has read its
        headers.
        """
        super().data_received(data)
        running = self._current_request
        if running is not None and self._messages and isinstance(self._messages[-1][0], _ErrInfo):
            # aiohttp forgets the body that broke, and its reader would wait for the rest until the
            # time limit.
            running.content.set_exception(web.RequestPayloadError("broken chunks"))
        if not self._awaits_headers():
            self._stop_timer()
        elif self._header_timer is None and data:
            self._header_timer = asyncio.get_running_loop().call_later(HEADER_TIMEOUT, self._headers_are_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Nobody is left to be told."""
        self._stop_timer()
        super().connection_lost(exc)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to what aiohttp could not parse or what broke outside of every handler; the
        connection closes.
        """
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun: it cannot become an error")
        if status >= 500:
            logger.error("a request failed outside of its handler", exc_info=exc)
            error = internal_error()
        elif isinstance(exc, LineTooLong):
            error = ApiError(431, "headers_too_large", "The request line or a header is too long.")
        else:
            # The first line says what is wrong; the others show what the client sent.
            what = (message or "").partition("\n")[0].rstrip(": ")
            error = ApiError(status, "bad_http", f"Not a valid HTTP request{': ' + what if what else ''}.")
        response = error.response()
        response.headers["Server"] = "octavo"
        response.force_close()
        return response

    def _awaits_headers(self) -> bool:
        return self._waiter is not None and not self._waiter.done() and not self._messages

    def _headers_are_late(self) -> None:
        self._header_timer = None
        if self.transport is None or not self._awaits_headers():
            return
        error = ApiError(408, "header_timeout", f"The headers did not arrive within {HEADER_TIMEOUT:.0f} s.")
        body = error.body() + b"\n"
        head = (
            "HTTP/1.1 408 Request Timeout\r\nServer: octavo\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.force_close()

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


async def listen(runner: web.AppRunner, listener: socket.socket, backlog: int) -> asyncio.Server:
    """Has the application of a runner that is set up answer on a bound socket. Close the result
    before the runner.
    """
    server, loop = runner.server, asyncio.get_running_loop()
    assert server is not None

    def connection() -> Connection:
        return Connection(server, loop=loop, access_log=None, keepalive_timeout=KEEP_ALIVE_SECONDS)

    return await loop.create_server(connection, sock=listener, backlog=backlog)
