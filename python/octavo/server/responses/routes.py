"""`/v1/responses` and `/v1/responses/input_tokens`. A request becomes a chat of OpenAI's, and its answer
is written as a response. Nothing is stored.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from aiohttp import web

from octavo import _core
from octavo.server.body import Form, Parsed
from octavo.server.calls import check_deadline
from octavo.server.errors import ApiError
from octavo.server.intake import ChatText, Intake
from octavo.server.openai.routes import OpenAIRoutes
from octavo.server.openai.schemas import ChatCompletionRequest
from octavo.server.responses.schemas import INNER, NAMES, UNSUPPORTED, InputRequest, ResponsesRequest

R = TypeVar("R", bound=InputRequest)

_BULKY = frozenset({"input", "instructions", "tools"})
_PROMPT = _BULKY | {"chat_template_kwargs"}
RESPONSES = Form(ResponsesRequest, _BULKY, _PROMPT, UNSUPPORTED, "input", INNER)
INPUT = Form(InputRequest, _BULKY, _PROMPT, UNSUPPORTED, "input", INNER)


class ResponsesRoutes:
    """The handlers."""

    def __init__(self, intake: Intake, chats: OpenAIRoutes) -> None:
        self._intake = intake
        self._chats = chats

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application."""
        return [
            web.post("/v1/responses", self.responses),
            web.post("/v1/responses/input_tokens", self.input_tokens),
        ]

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/responses`."""
        arrival = time.monotonic()
        parsed, chat, text = await self._intake.read(request, self._reader(RESPONSES, ResponsesRequest.to_chat))
        self._intake.ignored(request, parsed.ignored)
        with _named():
            prepared = await self._chats.prepare(chat, text, {})
        read = parsed.request
        call_id = "resp_" + uuid.uuid4().hex
        call = prepared.call(
            id=call_id,
            names=NAMES,
            max_tokens=read.max_output_tokens,
            reply_format=_core.ReplyFormat.responses(
                id=call_id,
                model=self._intake.engine.model_name,
                created=int(time.time()),
                request=read.told(prepared.params),
                stream=bool(read.stream),
                answer=prepared.answer,
                timing=bool(read.timing),
            ),
            stream=bool(read.stream),
            priority=read.priority or 0,
            cache_salt=read.cache_salt,
            deadline_ms=read.deadline_ms,
            arrival=arrival,
        )
        return await self._intake.calls.serve(request, call)

    async def input_tokens(self, request: web.Request) -> web.Response:
        """`POST /v1/responses/input_tokens`."""
        parsed, chat, text = await self._intake.read(request, self._reader(INPUT, InputRequest.as_chat))
        self._intake.ignored(request, parsed.ignored)
        with _named():
            prepared = await self._chats.prepare(chat, text, {})
        return web.json_response({"object": "response.input_tokens", "input_tokens": len(prepared.prompt)})

    def _reader(
        self, form: Form[R], to_chat: Callable[[R], ChatCompletionRequest]
    ) -> Callable[[bytes], tuple[Parsed[R], ChatCompletionRequest, ChatText]]:
        def read(body: bytes) -> tuple[Parsed[R], ChatCompletionRequest, ChatText]:
            parsed = self._intake.decode(form, body)
            self._intake.check_model(parsed.request.model)
            if isinstance(parsed.request, ResponsesRequest):
                check_deadline(parsed.request.deadline_ms)
            chat = to_chat(parsed.request)
            with _named():
                return parsed, chat, self._chats.chat_text(chat)

        return read


@contextmanager
def _named() -> Iterator[None]:
    """Refusals of the chat that a request becomes name the request's own fields."""
    try:
        yield
    except ApiError as error:
        raise error.renamed(NAMES) from None
