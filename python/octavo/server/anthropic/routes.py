"""Anthropic's routes: `/v1/messages`, `/v1/messages/count_tokens`. A request becomes a chat of OpenAI's,
and its answer is written in Anthropic's form.
"""

import time
import uuid

from aiohttp import web

from octavo import _core
from octavo.server.anthropic.schemas import INNER, UNSUPPORTED, CountRequest, MessagesRequest
from octavo.server.body import Form, Parsed
from octavo.server.calls import check_deadline
from octavo.server.intake import ChatText, Intake
from octavo.server.openai.routes import OpenAIRoutes
from octavo.server.openai.schemas import ChatCompletionRequest

_BULKY = frozenset({"messages", "system", "tools"})
MESSAGES = Form(MessagesRequest, _BULKY, _BULKY, UNSUPPORTED, inner=INNER)
COUNT = Form(CountRequest, _BULKY, _BULKY, UNSUPPORTED, inner=INNER)
_NAMES = {
    "prompt": "messages",
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking.budget_tokens",
    "structured_outputs.json": "output_config.format.schema",
}


class AnthropicRoutes:
    """The handlers."""

    def __init__(self, intake: Intake, chats: OpenAIRoutes) -> None:
        self._intake = intake
        self._chats = chats

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application; errors on these have Anthropic's form."""
        return [
            web.post("/v1/messages", self.messages),
            web.post("/v1/messages/count_tokens", self.count_tokens),
        ]

    async def messages(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/messages`."""
        arrival = time.monotonic()
        parsed, chat, text = await self._intake.read(request, self._read_messages)
        self._intake.ignored(request, parsed.ignored)
        read = parsed.request
        prepared = await self._chats.prepare(chat, text, _NAMES)
        call_id = "msg_" + uuid.uuid4().hex
        call = prepared.call(
            id=call_id,
            names=_NAMES,
            max_tokens=read.max_tokens,
            reply_format=_core.ReplyFormat.anthropic(
                id=call_id,
                model=self._intake.engine.model_name,
                stream=bool(read.stream),
                answer=prepared.answer,
                timing=bool(read.timing),
            ),
            stream=bool(read.stream),
            deadline_ms=read.deadline_ms,
            arrival=arrival,
        )
        return await self._intake.calls.serve(request, call)

    async def count_tokens(self, request: web.Request) -> web.Response:
        """`POST /v1/messages/count_tokens`."""
        parsed, chat, text = await self._intake.read(request, self._read_count)
        self._intake.ignored(request, parsed.ignored)
        prepared = await self._chats.prepare(chat, text, _NAMES)
        return web.json_response({"input_tokens": len(prepared.prompt)})

    def _read_messages(self, body: bytes) -> tuple[Parsed[MessagesRequest], ChatCompletionRequest, ChatText]:
        parsed = self._intake.decode(MESSAGES, body)
        self._intake.check_model(parsed.request.model)
        check_deadline(parsed.request.deadline_ms)
        chat = parsed.request.to_chat(reasons=self._intake.engine.answers.reasoning is not None)
        return parsed, chat, self._chats.chat_text(chat)

    def _read_count(self, body: bytes) -> tuple[Parsed[CountRequest], ChatCompletionRequest, ChatText]:
        parsed = self._intake.decode(COUNT, body)
        self._intake.check_model(parsed.request.model)
        chat = parsed.request.as_chat()
        return parsed, chat, self._chats.chat_text(chat)
