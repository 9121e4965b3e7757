"""Serving one call: submit its prompts, then answer with one body or with a stream of server-sent events.

Whatever happens, the requests of a call are closed in the end, so a client that leaves gives its blocks back. The usual
stream is bytes made in Rust, written as they come; only a stream over several prompts is put together here.
"""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from aiohttp import web

from octavo import _core
from octavo.errors import EngineDeadError
from octavo.sampling_params import SamplingParams
from octavo.server import responses
from octavo.server.config import ServerConfig
from octavo.server.errors import (
    ApiError,
    engine_dead,
    from_engine_text,
    from_value_error,
    internal_error,
    overloaded,
    shutting_down,
)
from octavo.server.metrics import Metrics, RequestTimes
from octavo.server.responses import Choice, Usage
from octavo.server.schemas import ChatCompletionRequest, CompletionRequest

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine, RequestStream

logger = logging.getLogger(__name__)

T = TypeVar("T")

WRITE_TIMEOUT = 60.0
"""Seconds without progress after which a client that does not read is given up."""
UNREAD_BYTES = 48 * 1024
"""Less than this in the socket's buffer, and a write cannot block: the transport pauses at 64 KiB."""

SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class EventWriter:
    """Writes server-sent events to one client, as fast as it reads."""

    def __init__(self, request: web.Request, response: web.StreamResponse, keep_alive_interval: float) -> None:
        self._transport = request.transport
        self._response = response
        self._keep_alive_interval = keep_alive_interval

    async def write(self, data: bytes) -> None:
        """Waits while the client does not read. Raises `ConnectionResetError` after a minute without progress."""
        if self._transport is None:
            raise ConnectionResetError("the client has left")
        if self._transport.get_write_buffer_size() + len(data) < UNREAD_BYTES:
            await self._response.write(data)  # cannot block, so it needs no timer: this is the path of every token
            return
        try:
            await asyncio.wait_for(self._response.write(data), WRITE_TIMEOUT)
        except asyncio.TimeoutError:
            self._transport.abort()
            raise ConnectionResetError("the client does not read its stream") from None

    async def keep_alive(self, first: Coroutine[Any, Any, T]) -> T:
        """Waits for the first delta; comment lines meanwhile keep proxies from cutting a long queue."""
        waiting = asyncio.ensure_future(first)
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=self._keep_alive_interval)
                if done:
                    return waiting.result()
                await self.write(b": keep-alive\n\n")
        finally:
            waiting.cancel()


@dataclass(frozen=True)
class Call:
    """One accepted call, ready to be submitted."""

    kind: Literal["completion", "chat"]
    request: CompletionRequest | ChatCompletionRequest
    prompts: list[_core.Prompt]
    params: SamplingParams
    id: str
    created: int
    arrival: float

    def head(self, model: str, object: str) -> dict[str, Any]:
        """The fields with which every body and every chunk begins."""
        return {"id": self.id, "object": object, "created": self.created, "model": model}


@dataclass(frozen=True)
class Running:
    """One submitted prompt of a call."""

    stream: "RequestStream"
    times: RequestTimes
    first_choice: int

    async def next(self) -> _core.RequestDelta:
        """The next delta, counted."""
        delta = await self.stream.next()
        self.times.add(delta)
        return delta

    def close(self) -> None:
        """Aborts what has not finished."""
        self.stream.close()
        self.times.close()


def refusal(request: CompletionRequest | ChatCompletionRequest, error: Exception, param: str) -> ApiError:
    """The 400 for what the core would not take; `param` is meant where its message names no field of the request."""
    return from_value_error(error, frozenset(request.__struct_fields__), param)


class CallServer:
    """Answers calls. `active` counts those that are being answered."""

    def __init__(self, engine: "AsyncEngine", config: ServerConfig, metrics: Metrics) -> None:
        self.active = 0
        self._engine = engine
        self._config = config
        self._metrics = metrics

    def check_open(self) -> None:
        """Raises `ApiError` 503 when no new call is welcome."""
        if self._engine.is_dead:
            raise engine_dead()
        if self._engine.draining:
            raise shutting_down()

    def queue_full(self, error: _core.OverloadedError) -> ApiError:
        """The 429 for a call that found the queue full."""
        return overloaded(str(error), self._metrics.retry_after())

    async def serve(self, request: web.Request, call: Call) -> web.StreamResponse:
        """Runs the call to its end, whole or as a stream; its requests never outlive this."""
        self.check_open()  # tokenising took time
        running: list[Running] = []
        self.active += 1
        try:
            for prompt in call.prompts:
                running.append(self._submit(call, prompt, first_choice=len(running) * call.params.n))
            self._metrics.accepted(call.params.n, call.params.max_tokens)
            if not call.request.stream:
                return await self._whole(call, running)
            return await self._streamed(request, call, running)
        finally:
            self.active -= 1
            for one in running:
                one.close()

    def _submit(self, call: Call, prompt: _core.Prompt, first_choice: int) -> Running:
        frames = None
        if call.request.stream and len(call.prompts) == 1:
            frames = _core.FrameTemplate(
                call.kind,
                id=call.id,
                model=self._engine.model_name,
                created=call.created,
                include_usage=call.request.include_usage,
                continuous_usage=call.request.continuous_usage,
            )
        try:
            stream = self._engine.submit(
                prompt,
                call.params.to_core(),
                priority=call.request.priority or 0,
                cache_salt=call.request.cache_salt,
                frames=frames,
            )
        except _core.OverloadedError as error:
            raise self.queue_full(error) from None
        except EngineDeadError:
            raise engine_dead() from None
        except (ValueError, OverflowError) as error:
            raise refusal(call.request, error, "prompt" if call.kind == "completion" else "messages") from None
        return Running(stream, RequestTimes(self._metrics, call.arrival, call.params.n), first_choice)

    # ---- one body ----------------------------------------------------------------------------------------------------

    async def _whole(self, call: Call, running: list[Running]) -> web.Response:
        choices: list[Choice] = []
        usage = Usage()
        for one in running:
            own = [Choice(one.first_choice + index) for index in range(call.params.n)]
            while True:
                delta = await one.next()
                for gained in delta.choices:
                    own[gained.index].add(gained)
                if delta.error is not None:
                    raise from_engine_text(delta.error)
                if delta.finished:
                    break
            usage.add(delta)
            choices += own
        tokenizer, logprobs = self._engine.tokenizer, call.params.logprobs
        if call.kind == "completion":
            head = call.head(self._engine.model_name, "text_completion")
            bodies = [responses.completion_choice(choice, tokenizer, logprobs) for choice in choices]
        else:
            head = call.head(self._engine.model_name, "chat.completion")
            bodies = [responses.chat_choice(choice, tokenizer, logprobs) for choice in choices]
        return web.Response(body=responses.body(head, bodies, usage), content_type="application/json")

    # ---- streams -----------------------------------------------------------------------------------------------------

    async def _streamed(self, request: web.Request, call: Call, running: list[Running]) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE_HEADERS)
        await response.prepare(request)
        events = EventWriter(request, response, self._config.sse_keep_alive_interval)
        try:
            if len(running) == 1:
                await self._frames_of_one(events, running[0])
            else:
                await self._chunks_of_many(events, call, running)
        except ApiError as error:
            self._metrics.errors[error.code] += 1
            await events.write(error.frames())
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            logger.exception("stream %s failed", call.id)
            await events.write(internal_error().frames())
        await response.write_eof()
        return response

    async def _frames_of_one(self, events: EventWriter, one: Running) -> None:
        """The usual stream: bytes from Rust to the socket."""
        delta = await events.keep_alive(one.next())
        while True:
            if delta.error is not None:
                raise from_engine_text(delta.error)
            if delta.frames:
                await events.write(delta.frames)
            if delta.finished:
                return
            delta = await one.next()

    async def _chunks_of_many(self, events: EventWriter, call: Call, running: list[Running]) -> None:
        """A stream over several prompts: chunks are built here, since a frame template knows one request only."""
        usage = Usage()
        head = call.head(self._engine.model_name, "text_completion")
        num_prompt_tokens = sum(len(prompt) for prompt in call.prompts)
        num_output_tokens = [0] * len(running)

        async def forward(position: int, one: Running) -> None:
            offsets = [0] * call.params.n
            delta = await events.keep_alive(one.next())
            while True:
                num_output_tokens[position] = delta.num_output_tokens
                so_far = Usage(num_prompt_tokens, sum(num_output_tokens)) if call.request.continuous_usage else None
                for gained in delta.choices:
                    choice = Choice(one.first_choice + gained.index)
                    choice.add(gained)
                    offset = offsets[gained.index]
                    offsets[gained.index] += len(gained.text)
                    piece = responses.completion_choice(choice, self._engine.tokenizer, call.params.logprobs, offset)
                    await events.write(b"data: " + responses.body(head, [piece], so_far) + b"\n\n")
                if delta.error is not None:
                    raise from_engine_text(delta.error)
                if delta.finished:
                    usage.add(delta)
                    return
                delta = await one.next()

        tasks = [asyncio.ensure_future(forward(position, one)) for position, one in enumerate(running)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        if call.request.include_usage:
            await events.write(b"data: " + responses.body(head, [], usage) + b"\n\n")
        await events.write(b"data: [DONE]\n\n")
