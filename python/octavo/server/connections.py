"""What happens on a connection before there is a request: a time limit for its headers, and errors
of the protocol in the one shape that all errors have.

aiohttp answers what it cannot parse with plain text, and lets headers trickle in for as long as an
idle connection lives. Bodies have their own limit (`body_timeout`), since those of a request
are read by its handler.
"""

import asyncio
import logging
import socket
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import _ErrInfo

from octavo.server.errors import ApiError, bad_http, internal_error
from octavo.server.limits import Limits
from octavo.server.log import log_refusal
from octavo.server.metrics import Metrics
from octavo.server.middleware import from_http

logger = logging.getLogger(__name__)

LAST_READ_SECONDS = 2.0
"""How long a client may go on sending a body that was given up, unread: a connection that is closed
before is reset, and its client may not see the answer.
"""
MAX_OVERHEAD = 64 * 1024
"""Bytes by which a body may be longer on its way than it is: sizes and extensions of its chunks. A
chunk costs as much work as a kilobyte, so a few megabytes in chunks of a byte would take seconds.
"""
_PIECE = 16 * 1024  # so many bytes are parsed between two looks at the overhead


class Connection(web.RequestHandler):
    """aiohttp's connection with a clock on the headers, a limit of chunks, and JSON errors."""

    __slots__ = ("_body", "_body_bytes", "_broken", "_discards", "_header_timer", "_limits", "_metrics",
                 "_overhead")  # fmt: skip

    def __init__(self, server: web.Server, metrics: Metrics, limits: Limits, **options: Any) -> None:
        super().__init__(server, **options)
        self._metrics = metrics
        self._limits = limits
        self._header_timer: asyncio.TimerHandle | None = None
        self._body: StreamReader | None = None
        self._body_bytes = 0
        self._overhead = 0
        self._broken = False
        self._discards = False

    def data_received(self, data: bytes) -> None:
        """Bytes while no request is being answered begin a request, until aiohttp has read its
        headers.
        """
        for start in range(0, len(data) or 1, _PIECE):  # aiohttp gives no bytes to have it parse what it kept
            request = self._current_request
            if self._discards or (request is not None and request.content.exception() is not None):
                return  # the body was given up: the connection closes after the answer
            piece = data[start : start + _PIECE]
            super().data_received(piece)
            self._watch_body(len(piece))
        if not self._awaits_headers():
            self._stop_timer()
        elif self._header_timer is None and data:
            self._header_timer = asyncio.get_running_loop().call_later(
                self._limits.header_timeout, self._headers_are_late
            )

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
            error = ApiError(431, "headers_too_large", "The request line or a header is too long (max_header_size).")
        else:
            # The first line says what is wrong; the others show what the client sent.
            what = (message or "").partition("\n")[0].rstrip(": ")
            error = bad_http(what)
        self._note(error)
        self._broken = True
        response = error.response()
        response.headers["Server"] = "octavo"
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Also of errors that aiohttp answers before any handler: an `Expect` that it does not know."""
        closes = self._broken or request.content.exception() is not None
        self._discards |= closes
        if isinstance(resp, web.HTTPException):
            error = from_http(resp, request)
            self._note(error)
            resp = error.response()
            resp.force_close()
        finished = await super().finish_response(request, resp, start_time)
        if closes and self.transport is not None and self.transport.can_write_eof():
            self.transport.write_eof()
            await asyncio.sleep(LAST_READ_SECONDS)  # cancelled when the client has gone
        return finished

    def _note(self, error: ApiError) -> None:
        """Counts and logs an error that no handler has seen."""
        self._metrics.errors[error.code] += 1
        log_refusal(error, "connection", self._peer(), None)

    def _peer(self) -> str:
        peer = self.peername
        return f"from {peer[0]}" if isinstance(peer, tuple) else "from a client"

    def _watch_body(self, num_bytes: int) -> None:
        """Looks at the body that is on its way, after so many bytes more."""
        if self._messages:
            message, body = self._messages[-1]
            if isinstance(message, _ErrInfo):
                if self._body is not None and not self._body.is_eof():
                    # aiohttp forgets the body that broke, and its reader would wait for the rest
                    # until the time limit.
                    self._body.set_exception(web.RequestPayloadError("broken chunks"))
                return
        elif self._current_request is not None:
            body = self._current_request.content
        else:
            self._body = None
            return
        if body is not self._body:
            self._body, self._body_bytes, self._overhead = body, body.total_bytes, 0
        elif not body.is_eof():
            self._overhead += num_bytes - (body.total_bytes - self._body_bytes)
            self._body_bytes = body.total_bytes
            # Where aiohttp has paused it keeps bytes that it has not looked at.
            if self._overhead > MAX_OVERHEAD and not self._reading_paused:
                why = "The body's chunks are too small, or have long extensions: send larger ones."
                body.set_exception(ApiError(400, "too_many_chunks", why, headers={"Connection": "close"}))
                body.feed_eof()  # else aiohttp reads on, for politeness
                self._discards = True

    def _awaits_headers(self) -> bool:
        return self._waiter is not None and not self._waiter.done() and not self._messages

    def _headers_are_late(self) -> None:
        self._header_timer = None
        if self.transport is None or not self._awaits_headers():
            return
        why = f"The headers did not arrive within {self._limits.header_timeout:g} s (header_timeout)."
        error = ApiError(408, "header_timeout", why)
        self._note(error)
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


async def listen(
    runner: web.AppRunner, metrics: Metrics, listener: socket.socket, backlog: int, limits: Limits
) -> asyncio.Server:
    """Has the application of a runner that is set up answer on a bound socket. Close the result
    before the runner.
    """
    server, loop = runner.server, asyncio.get_running_loop()
    assert server is not None

    def connection() -> Connection:
        return Connection(
            server,
            metrics,
            limits,
            loop=loop,
            access_log=None,
            auto_decompress=False,  # see `body.unpack`
            keepalive_timeout=limits.keep_alive_timeout,
            max_line_size=limits.max_header_size,
            max_field_size=limits.max_header_size,
            max_headers=limits.max_headers,
        )

    return await loop.create_server(connection, sock=listener, backlog=backlog)
