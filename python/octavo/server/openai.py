"""OpenAI's routes: `/v1/completions`, `/v1/chat/completions`, `/v1/models`.

A call goes: body -> struct -> prompts (tokenised off the loop) -> `engine.submit` -> deltas -> frames or one body.
Whatever happens, the streams are closed in the end, so a client that leaves gives its blocks back.
"""

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from aiohttp import web

from octavo import _core
from octavo.errors import EngineDeadError
from octavo.sampling_params import SamplingParams
from octavo.server import responses
from octavo.server.body import decode, read_body
from octavo.server.config import ServerConfig
from octavo.server.errors import (
    ApiError,
    bad_request,
    engine_dead,
    from_engine_text,
    from_value_error,
    internal_error,
    overloaded,
    shutting_down,
)
from octavo.server.messages import template_kwargs, template_messages, template_tools
from octavo.server.metrics import Metrics, RequestTimes
from octavo.server.responses import Choice, Usage
from octavo.server.schemas import (
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
    ChatCompletionRequest,
    CompletionRequest,
    check_choices,
)

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine, RequestStream

logger = logging.getLogger(__name__)

WRITE_TIMEOUT = 60.0
"""Seconds without progress after which a client that does not read is given up."""

_ANY_MODEL = frozenset({"", "dummy", "tgi"})
"""What clients of single-model servers put where a name must be."""

_SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


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


class OpenAIRoutes:
    """The handlers. `active` counts the calls that are being served."""

    def __init__(self, engine: "AsyncEngine", config: ServerConfig, metrics: Metrics) -> None:
        self.active = 0
        self._engine = engine
        self._config = config
        self._metrics = metrics
        self._names = engine.config.served_model_name or (engine.model_name,)
        self._max_characters = max(64 * 1024, 16 * engine.max_model_len)
        self._started = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application."""
        return [
            web.post("/v1/completions", self.completions),
            web.post("/v1/chat/completions", self.chat_completions),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{model:.+}", self.model),
        ]

    # ---- models ------------------------------------------------------------------------------------------------------

    async def models(self, _: web.Request) -> web.Response:
        """`GET /v1/models`."""
        return web.json_response({"object": "list", "data": [self._card(name) for name in self._names]})

    async def model(self, request: web.Request) -> web.Response:
        """`GET /v1/models/{id}`; clients send a slash of the id as %2F or as it is."""
        name = request.match_info["model"]
        if name not in self._names:
            raise self._unknown_model(name)
        return web.json_response(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "octavo",
            "root": self._engine.model_name,
            "parent": None,
            "max_model_len": self._engine.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._names and name not in _ANY_MODEL:
            raise self._unknown_model(name)

    def _unknown_model(self, name: str) -> ApiError:
        shown = name if len(name) <= 100 else name[:100] + "..."
        return ApiError(404, "model_not_found", f"The model {shown!r} is not served here.", param="model")

    # ---- generation --------------------------------------------------------------------------------------------------

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/completions`."""
        arrival = time.monotonic()
        self._check_open()
        body = await read_body(request, self._config.max_body_size)
        parsed, unknown = decode(CompletionRequest, body, UNSUPPORTED_COMPLETION)
        self._metrics.unknown_fields += unknown
        self._check_model(parsed.model)
        parsed.check_stream_options()
        given = parsed.prompts()
        check_choices(len(given), parsed.n or 1)
        try:
            params = parsed.to_sampling_params()
            prompts = [await self._encode(prompt, parsed.add_special_tokens is not False) for prompt in given]
        except (ValueError, OverflowError) as error:
            raise self._refusal(parsed, error, "prompt") from None
        return await self._serve(request, self._call("completion", parsed, prompts, params, arrival))

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/chat/completions`."""
        arrival = time.monotonic()
        self._check_open()
        body = await read_body(request, self._config.max_body_size)
        parsed, unknown = decode(ChatCompletionRequest, body, UNSUPPORTED_CHAT)
        self._metrics.unknown_fields += unknown
        self._check_model(parsed.model)
        parsed.check_stream_options()
        messages = template_messages(parsed)
        self._check_characters(sum(len(message["content"]) for message in messages), "messages")
        tools = template_tools(parsed.tools)
        kwargs = template_kwargs(parsed.chat_template_kwargs)
        try:
            params = parsed.to_sampling_params()
            prompt = await self._engine.encode_chat(
                msgspec.json.encode(messages).decode(),
                tools,
                add_generation_prompt=parsed.add_generation_prompt is not False,
                kwargs_json=kwargs,
            )
        except (ValueError, OverflowError) as error:
            raise self._refusal(parsed, error, "messages") from None
        return await self._serve(request, self._call("chat", parsed, [prompt], params, arrival))

    async def _encode(self, prompt: str | list[int], add_special_tokens: bool) -> _core.Prompt:
        if isinstance(prompt, str):
            self._check_characters(len(prompt), "prompt")
            encoded = await self._engine.encode_text(prompt, add_special_tokens)
        else:
            self._check_length(len(prompt))
            try:
                encoded = _core.Prompt(prompt)
            except (OverflowError, ValueError):
                raise bad_request("prompt: token id out of range.", "prompt", "token_id_out_of_range") from None
        if len(encoded) == 0:
            raise bad_request("prompt: must have at least one token.", "prompt")
        return encoded

    def _check_characters(self, count: int, param: str) -> None:
        if count > self._max_characters:
            message = f"{param}: {count} characters cannot fit into {self._engine.max_model_len} tokens."
            raise bad_request(message, param, "context_length_exceeded")

    def _check_length(self, count: int) -> None:
        if count > self._engine.max_model_len:
            message = f"prompt: {count} tokens are more than the model's {self._engine.max_model_len}."
            raise bad_request(message, "prompt", "context_length_exceeded")

    def _call(
        self,
        kind: Literal["completion", "chat"],
        parsed: CompletionRequest | ChatCompletionRequest,
        prompts: list[_core.Prompt],
        params: SamplingParams,
        arrival: float,
    ) -> Call:
        prefix = "cmpl-" if kind == "completion" else "chatcmpl-"
        return Call(kind, parsed, prompts, params, prefix + uuid.uuid4().hex, int(time.time()), arrival)

    def _check_open(self) -> None:
        if self._engine.is_dead:
            raise engine_dead()
        if self._engine.draining:
            raise shutting_down()

    def _refusal(self, parsed: CompletionRequest | ChatCompletionRequest, error: Exception, param: str) -> ApiError:
        return from_value_error(error, frozenset(parsed.__struct_fields__), param)

    async def _serve(self, request: web.Request, call: Call) -> web.StreamResponse:
        """Runs the call to its end, whole or as a stream; its requests never outlive this."""
        self._check_open()  # tokenising took time
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
            raise overloaded(str(error), self._metrics.retry_after()) from None
        except EngineDeadError:
            raise engine_dead() from None
        except (ValueError, OverflowError) as error:
            raise self._refusal(call.request, error, "prompt" if call.kind == "completion" else "messages") from None
        return Running(stream, RequestTimes(self._metrics, call.arrival), first_choice)

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
        return web.Response(body=responses.body(head, bodies, usage.body()), content_type="application/json")

    # ---- streams -----------------------------------------------------------------------------------------------------

    async def _streamed(self, request: web.Request, call: Call, running: list[Running]) -> web.StreamResponse:
        response = web.StreamResponse(headers=_SSE_HEADERS)
        await response.prepare(request)
        try:
            if len(running) == 1:
                await self._frames_of_one(response, running[0])
            else:
                await self._chunks_of_many(response, call, running)
        except ApiError as error:
            self._metrics.errors[error.code] += 1
            await self._write(response, error.frames())
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            logger.exception("stream %s failed", call.id)
            await self._write(response, internal_error().frames())
        await response.write_eof()
        return response

    async def _frames_of_one(self, response: web.StreamResponse, one: Running) -> None:
        """The usual stream: bytes from Rust to the socket."""
        delta = await self._first_delta(response, one)
        while True:
            if delta.error is not None:
                raise from_engine_text(delta.error)
            if delta.frames:
                await self._write(response, delta.frames)
            if delta.finished:
                return
            delta = await one.next()

    async def _first_delta(self, response: web.StreamResponse, one: Running) -> _core.RequestDelta:
        """Waits for the first token; comment lines keep proxies from cutting a long queue."""
        first = asyncio.ensure_future(one.next())
        try:
            while True:
                done, _ = await asyncio.wait({first}, timeout=self._config.sse_keep_alive_interval)
                if done:
                    return first.result()
                await self._write(response, b": keep-alive\n\n")
        finally:
            first.cancel()

    async def _chunks_of_many(self, response: web.StreamResponse, call: Call, running: list[Running]) -> None:
        """A stream over several prompts: chunks are built here, since a frame template knows one request only."""
        usage = Usage()
        head = call.head(self._engine.model_name, "text_completion")
        num_prompt_tokens = sum(len(prompt) for prompt in call.prompts)
        num_output_tokens = [0] * len(running)

        async def forward(position: int, one: Running) -> None:
            offsets = [0] * call.params.n
            delta = await self._first_delta(response, one)
            while True:
                num_output_tokens[position] = delta.num_output_tokens
                so_far = (
                    Usage(num_prompt_tokens, sum(num_output_tokens)).body() if call.request.continuous_usage else None
                )
                for gained in delta.choices:
                    choice = Choice(one.first_choice + gained.index)
                    choice.add(gained)
                    text_offset = offsets[gained.index]
                    offsets[gained.index] += len(gained.text)
                    piece = responses.completion_choice(
                        choice, self._engine.tokenizer, call.params.logprobs, text_offset
                    )
                    chunk = b"data: " + responses.body(head, [piece], so_far) + b"\n\n"
                    await self._write(response, chunk)
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
            await self._write(response, b"data: " + responses.body(head, [], usage.body()) + b"\n\n")
        await self._write(response, b"data: [DONE]\n\n")

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        """Waits while the client does not read; gives it up after a minute without progress."""
        try:
            await asyncio.wait_for(response.write(data), WRITE_TIMEOUT)
        except asyncio.TimeoutError:
            raise ConnectionResetError("the client does not read its stream") from None
