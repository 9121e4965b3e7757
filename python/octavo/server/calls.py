"""Serving one call: submit its prompts, then answer in one piece or with a stream of events.

Whatever happens, the call is closed in the end, so a client that leaves gives its blocks back. What
the answer looks like is the protocol's affair, in Rust: bytes come from there and go to the socket.
"""

import asyncio
import functools
import logging
import re
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import HttpVersion11, web

from octavo import _core
from octavo.errors import EngineDeadError
from octavo.pooling import CheckedPooling
from octavo.sampling_params import SamplingParams
from octavo.server.config import ServerConfig
from octavo.server.errors import (
    ApiError,
    bad_request,
    deadline_exceeded,
    engine_dead,
    from_failure,
    internal_error,
    overloaded,
    refused,
    shutting_down,
)
from octavo.server.keys import CALLER, Caller
from octavo.server.metrics import CallTimes, Metrics
from octavo.server.request_id import request_id
from octavo.server.timelines import Timelines

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine, ReplyStream

logger = logging.getLogger(__name__)

T = TypeVar("T")

IGNORED: web.RequestKey[tuple[str, ...]] = web.RequestKey("ignored", tuple)
"""Fields of a request that had no effect."""
MAX_WARNINGS = 16
MAX_DEADLINE_MS = 86_400_000
DEADLINE_HEADER = "X-Deadline-Ms"
UNREAD_BYTES = 48 * 1024
"""Less than this in the socket's buffer, and a write cannot block: the transport pauses at 64 KiB."""


@dataclass(frozen=True)
class StreamForm:
    """What a stream is to HTTP."""

    headers: Mapping[str, str]
    keep_alive: bytes
    """Written while a stream waits for its first token; nothing where nothing may be."""


_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
SERVER_SENT_EVENTS = StreamForm(
    {"Content-Type": "text/event-stream; charset=utf-8", **_UNBUFFERED}, b": keep-alive\n\n"
)
JSON_LINES = StreamForm({"Content-Type": "application/x-ndjson", **_UNBUFFERED}, b"")


class EventWriter:
    """Writes server-sent events to one client, as fast as it reads."""

    def __init__(self, request: web.Request, response: web.StreamResponse, config: ServerConfig) -> None:
        self._transport = request.transport
        self._response = response
        self._keep_alive_interval = config.sse_keep_alive_interval
        self._write_timeout = config.write_timeout

    async def write(self, data: bytes) -> None:
        """Waits while the client does not read. Raises `ConnectionResetError` after a minute
        without progress.
        """
        if self._transport is None:
            raise ConnectionResetError("the client has left")
        if self._transport.get_write_buffer_size() + len(data) < UNREAD_BYTES:
            await self._response.write(data)  # cannot block, so it needs no timer: this is the path of every token
            return
        try:
            await asyncio.wait_for(self._response.write(data), self._write_timeout)
        except asyncio.TimeoutError:
            self._transport.abort()
            raise ConnectionResetError("the client does not read its stream") from None

    async def keep_alive(self, first: Coroutine[Any, Any, T], line: bytes) -> T:
        """Waits for the first delta; comment lines meanwhile keep proxies from cutting a long
        queue.
        """
        waiting = asyncio.ensure_future(first)
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=self._keep_alive_interval)
                if done:
                    return waiting.result()
                if line:
                    await self.write(line)
        finally:
            waiting.cancel()


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call, ready to be submitted."""

    id: str
    prompts: list[_core.Prompt]
    names: Mapping[str, str]
    """What its request calls the core's fields, for refusals."""
    params: SamplingParams | CheckedPooling
    grammar: _core.Grammar | None = None
    """What the parameters' `structured_outputs` was compiled to."""
    max_tokens: int | None
    """What the client asked for; else that of `params` is a default, which gives way to what fits."""
    reply_format: _core.ReplyFormat
    stream: bool
    priority: int = 0
    cache_salt: str | None = None
    arrival: float
    """On the monotonic clock."""
    deadline_ms: int | None = None
    """By when it must be done, from its arrival on; the server's own limit holds as well."""
    stream_form: StreamForm = SERVER_SENT_EVENTS
    answer_headers: Callable[[_core.ReplyDelta], Mapping[str, str]] | None = None
    """Further headers of an answer in one piece."""


class Deadline:
    """Stops the task that entered it when time is up, once. Without a time it does nothing."""

    def __init__(self, at: float | None) -> None:
        """at: on the monotonic clock."""
        self.is_over = False
        self._at = at
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None

    def __enter__(self) -> "Deadline":
        if self._at is not None:
            self._task = asyncio.current_task()
            self._timer = asyncio.get_running_loop().call_later(max(0.0, self._at - time.monotonic()), self._stop)
        return self

    def _stop(self) -> None:
        self.is_over = True
        if self._task is not None:
            self._task.cancel()

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def caught(self) -> bool:
        """Whether it was this that stopped the task, which then goes on."""
        if self.is_over and self._task is not None and hasattr(self._task, "uncancel"):
            return bool(self._task.uncancel() == 0)  # else the client has left, too
        return self.is_over


def check_deadline(milliseconds: int | None, field: str = "deadline_ms") -> None:
    """A deadline lies ahead, and within a day. Raises `ApiError` 400."""
    if milliseconds is not None and not 1 <= milliseconds <= MAX_DEADLINE_MS:
        raise bad_request(f"{field} = {milliseconds}: must be from 1 to {MAX_DEADLINE_MS}.", field)


def header_deadline(request: web.Request) -> int | None:
    """`X-Deadline-Ms`, which counts on every route that has an engine answer. Raises `ApiError` 400."""
    given = request.headers.get(DEADLINE_HEADER)
    if given is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", given):
        raise bad_request(f"{DEADLINE_HEADER} = {given[:50]!r}: must be a whole number.", DEADLINE_HEADER)
    check_deadline(int(given), DEADLINE_HEADER)
    return int(given)


class CallServer:
    """Answers calls. `active` counts those that are being answered."""

    def __init__(self, engine: "AsyncEngine", config: ServerConfig, metrics: Metrics, timelines: Timelines) -> None:
        self.active = 0
        self._timelines = timelines
        self._engine = engine
        self._config = config
        self._metrics = metrics

    def check_open(self) -> None:
        """Raises `ApiError` 503 when no new call is welcome."""
        if self._engine.is_dead:
            raise engine_dead()
        if self._engine.draining:
            raise shutting_down()

    def check_request(self, request: web.Request) -> None:
        """What is known before the body is read. Raises `ApiError`: 503, 429 where the key's limits leave
        nothing, 400 for headers of ours that are none.
        """
        self.check_open()
        header_deadline(request)
        if (caller := request.get(CALLER)) is not None:
            caller.check()

    def refusal(
        self, error: ValueError | _core.OverloadedError | EngineDeadError, names: Mapping[str, str]
    ) -> ApiError:
        """The 429 for a call that found the queue full, or the 400 for one that can never be
        served.
        """
        if isinstance(error, EngineDeadError):
            return engine_dead()
        if isinstance(error, _core.OverloadedError):
            return overloaded(str(error), self._metrics.retry_after())
        return refused(error, names)

    async def serve(self, request: web.Request, call: Call) -> web.StreamResponse:
        """Runs the call to its end, whole or as a stream; its requests never outlive this."""
        self.check_open()  # tokenising took time
        deadline = self._deadline(call, header_deadline(request))
        if isinstance(call.params, SamplingParams) and not self._engine.generates:
            raise ApiError(
                400,
                "task_not_served",
                "This server makes embeddings alone (/v1/embeddings); to generate, start it with --runner generate.",
                param="model",
            )
        warnings = [f"{name[:100]}: unknown field, ignored" for name in request.get(IGNORED, ())[:MAX_WARNINGS]]
        self.active += 1
        caller = request.get(CALLER)
        num_prompt_tokens = sum(len(prompt) for prompt in call.prompts)
        use = None
        times = None
        try:
            if caller is not None:
                num_choices = len(call.prompts) * call.params.n if isinstance(call.params, SamplingParams) else 0
                use = caller.begin(num_prompt_tokens, num_choices, call.max_tokens)
            reply = self._submit(call, await self._core_params(call), caller)
            self._timelines.remember(
                request, call.id, request_id(request), reply.reply_id, len(call.prompts), call.arrival
            )
            self._metrics.accepted(len(call.prompts), call.params.n, call.max_tokens)
            times = CallTimes(self._metrics, call.arrival, len(call.prompts))
            try:
                with Deadline(deadline) as timer:
                    if call.stream:
                        return await self._streamed(request, call, reply, times, timer)
                    try:
                        return await self._whole(call, reply, times, warnings)
                    except asyncio.CancelledError:
                        if timer.caught():
                            raise deadline_exceeded() from None
                        raise
            finally:
                if last := reply.close():  # what the client did not wait for counts as well
                    times.add(last)
                times.close()
        finally:
            self.active -= 1
            if use is not None:
                use.end(0 if times is None else times.num_tokens)

    def _deadline(self, call: Call, of_header: int | None) -> float | None:
        limits = [self._config.request_timeout]
        limits += [None if limit is None else limit / 1000 for limit in (call.deadline_ms, of_header)]
        return min((call.arrival + seconds for seconds in limits if seconds is not None), default=None)

    async def _core_params(self, call: Call) -> _core.SamplingParams:
        """What the core is asked for; words are tokenised beside the loop."""
        try:
            if not isinstance(call.params, SamplingParams):
                return call.params.to_core()
            make = functools.partial(self._engine.answers.of_model, call.params, call.prompts, call.grammar)
            of_model = await self._engine.run_beside(make) if call.params.bad_words else make()
            return call.params.to_core(of_model, max_tokens_is_default=call.max_tokens is None)
        except ValueError as error:
            raise self.refusal(error, call.names) from None

    def _submit(self, call: Call, params: _core.SamplingParams, caller: Caller | None) -> "ReplyStream":
        share = None if caller is None else (caller.number, caller.key.weight)
        try:
            return self._engine.submit(
                call.prompts,
                params,
                priority=call.priority if caller is None else caller.priority(call.priority),
                cache_salt=call.cache_salt if caller is None else caller.salt(call.cache_salt),
                share=share,
                reply_format=call.reply_format,
            )
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self.refusal(error, call.names) from None

    async def _next(self, reply: "ReplyStream", times: CallTimes) -> _core.ReplyDelta:
        """The next delta, counted as it is taken: a client that leaves meanwhile does not undo it."""
        delta = await reply.next()
        times.add(delta)
        return delta

    async def _whole(self, call: Call, reply: "ReplyStream", times: CallTimes, warnings: list[str]) -> web.Response:
        """The answer in one piece; the reply has no news before its end."""
        delta = await self._next(reply, times)
        if delta.error is not None:
            raise from_failure(delta.error)
        headers = {} if call.answer_headers is None else call.answer_headers(delta)
        body = await self._written(delta)
        if warnings and body.endswith(b"}"):
            body = body[:-1] + b',"warnings":' + msgspec.json.encode(warnings) + b"}"
        return web.Response(body=body, content_type="application/json", headers=headers)

    async def _streamed(
        self, request: web.Request, call: Call, reply: "ReplyStream", times: CallTimes, deadline: Deadline
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=call.stream_form.headers)
        if request.version < HttpVersion11:
            response.force_close()  # without chunks it is the end of the connection that ends a stream
        await response.prepare(request)
        events = EventWriter(request, response, self._config)
        try:
            delta = await events.keep_alive(self._next(reply, times), call.stream_form.keep_alive)
            while True:
                if data := await self._written(delta):  # news may have been taken with those before
                    await events.write(data)
                if delta.finished:
                    break
                delta = await self._next(reply, times)
            if delta.error is not None:
                self._metrics.errors[delta.error.code] += 1
        except asyncio.CancelledError:
            if not deadline.caught():
                raise
            if last := reply.close():  # its blocks are free before the client has read the end
                times.add(last)
            error = deadline_exceeded()
            self._metrics.errors[error.code] += 1
            await events.write(call.reply_format.write_error(error.code, error.message))
        except ConnectionError:
            raise
        except Exception:
            logger.exception("stream %s failed", call.id)
            error = internal_error()
            await events.write(call.reply_format.write_error(error.code, error.message))
        await response.write_eof()
        return response

    async def _written(self, delta: _core.ReplyDelta) -> bytes:
        """What to send of a delta. A long one is written beside the loop, which other clients wait
        for.
        """
        return await self._engine.run_beside(delta.write) if delta.is_long else delta.write()
