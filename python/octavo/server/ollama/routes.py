"""Ollama's routes: `/api/chat`, `/api/generate`, `/api/embed`, `/api/embeddings`, `/api/tags`, `/api/show`,
`/api/ps`, `/api/version`.
"""

import hashlib
import time
import uuid
from datetime import datetime, timezone
from typing import Any

from aiohttp import web

from octavo import _core
from octavo.errors import EngineDeadError
from octavo.pooling import PoolingParams
from octavo.server.body import Form, Parsed
from octavo.server.calls import JSON_LINES, check_deadline
from octavo.server.errors import bad_request
from octavo.server.intake import ChatText, Intake
from octavo.server.ollama import about
from octavo.server.ollama.schemas import (
    UNSUPPORTED_CHAT,
    UNSUPPORTED_GENERATE,
    ChatRequest,
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    Options,
    ShowRequest,
)
from octavo.server.openai.embeddings import EmbeddingRoutes
from octavo.server.openai.routes import OpenAIRoutes, PreparedChat
from octavo.server.openai.schemas import ChatCompletionRequest

_CHAT_TEXT = frozenset({"messages", "tools"})
_PROMPT_TEXT = frozenset({"prompt", "system"})
_INNER = {"options": Options}
CHAT = Form(ChatRequest, _CHAT_TEXT, _CHAT_TEXT, UNSUPPORTED_CHAT, inner=_INNER)
GENERATE = Form(GenerateRequest, _PROMPT_TEXT, _PROMPT_TEXT, UNSUPPORTED_GENERATE, "prompt", _INNER)
EMBED = Form(EmbedRequest, frozenset({"input"}), frozenset(), {}, "input", _INNER, apart="input")
EMBEDDINGS = Form(EmbeddingsRequest, frozenset({"prompt"}), frozenset({"prompt"}), {}, "prompt", _INNER)
SHOW = Form(ShowRequest, frozenset(), frozenset(), {})
_CHAT_NAMES = {
    "prompt": "messages",
    "max_tokens": "num_predict",
    "repetition_penalty": "repeat_penalty",
    "structured_outputs.json": "format",
}
_GENERATE_NAMES = _CHAT_NAMES | {"prompt": "prompt"}


class OllamaRoutes:
    """The handlers."""

    def __init__(self, intake: Intake, chats: OpenAIRoutes, embeddings: EmbeddingRoutes) -> None:
        self._intake = intake
        self._embeddings = embeddings
        self._engine = intake.engine
        self._chats = chats
        self._since = _rfc3339(time.time())

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application; errors on these have Ollama's form."""
        return [
            web.post("/api/chat", self.chat),
            web.post("/api/generate", self.generate),
            web.post("/api/embed", self.embed),
            web.post("/api/embeddings", self.embed_one),
            web.get("/api/tags", self.tags),
            web.post("/api/show", self.show),
            web.get("/api/ps", self.running),
            web.get("/api/version", self.version),
        ]

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """`POST /api/chat`; without messages the model is to be loaded, or to go."""
        arrival = time.monotonic()
        parsed, chat, text = await self._intake.read(request, self._read_chat)
        self._intake.ignored(request, parsed.ignored + parsed.request.ignored)
        if text is None:
            return _loaded(parsed.request, {"message": {"role": "assistant", "content": ""}})
        prepared = await self._chats.prepare(chat, text, _CHAT_NAMES)
        return await self._serve(request, parsed.request, chat, prepared, arrival)

    def _read_chat(self, body: bytes) -> tuple[Parsed[ChatRequest], ChatCompletionRequest, ChatText | None]:
        parsed = self._intake.decode(CHAT, body)
        self._check_model(parsed.request.model)
        check_deadline(parsed.request.deadline_ms)
        chat = parsed.request.to_chat()
        return parsed, chat, None if parsed.request.loads else self._chats.chat_text(chat)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """`POST /api/generate`: through the chat template unless `raw`; without a prompt the model
        is to be loaded, or to go.
        """
        arrival = time.monotonic()
        parsed, chat, text = await self._intake.read(request, self._read_generate)
        self._intake.ignored(request, parsed.ignored + parsed.request.ignored)
        read = parsed.request
        if read.loads:
            return _loaded(read, {"response": ""})
        if text is not None:
            prepared = await self._chats.prepare(chat, text, _GENERATE_NAMES)
        else:
            try:
                params = self._chats.sampling_params(chat)
                prompt = await self._intake.encode_text(read.prompt or "", "prompt")
                grammar = await self._engine.compile_grammar(params.structured_outputs)
            except (ValueError, _core.OverloadedError, EngineDeadError) as error:
                raise self._intake.calls.refusal(error, _GENERATE_NAMES) from None
            prepared = PreparedChat(prompt, params, grammar, None)
        return await self._serve(request, read, chat, prepared, arrival)

    def _read_generate(self, body: bytes) -> tuple[Parsed[GenerateRequest], ChatCompletionRequest, ChatText | None]:
        parsed = self._intake.decode(GENERATE, body)
        self._check_model(parsed.request.model)
        check_deadline(parsed.request.deadline_ms)
        chat = parsed.request.to_chat()
        return parsed, chat, None if parsed.request.raw else self._chats.chat_text(chat)

    async def _serve(
        self,
        request: web.Request,
        read: ChatRequest | GenerateRequest,
        chat: ChatCompletionRequest,
        prepared: PreparedChat,
        arrival: float,
    ) -> web.StreamResponse:
        is_chat = isinstance(read, ChatRequest)
        call_id = uuid.uuid4().hex
        call = prepared.call(
            id=call_id,
            names=_CHAT_NAMES if is_chat else _GENERATE_NAMES,
            max_tokens=chat.max_tokens,
            reply_format=_core.ReplyFormat.ollama(
                id=call_id,
                model=read.model,
                created_at=_rfc3339(time.time()),
                chat=is_chat,
                stream=read.streams,
                answer=prepared.answer,
            ),
            stream=read.streams,
            deadline_ms=read.deadline_ms,
            arrival=arrival,
            stream_form=JSON_LINES,
        )
        return await self._intake.calls.serve(request, call)

    async def embed(self, request: web.Request) -> web.StreamResponse:
        """`POST /api/embed`: what is too long is cut unless `truncate` is false; without an input it asks
        whether the model is loaded.
        """
        arrival = time.monotonic()
        parsed, given = await self._intake.read(request, self._read_embed)
        self._intake.ignored(request, parsed.ignored)
        read = parsed.request
        if not given:
            return web.json_response({"model": read.model, "embeddings": []})
        most = None if read.truncate is False else self._intake.longest_embedding
        prompts = await self._embeddings.encode(given, True, most)
        call_id = uuid.uuid4().hex
        reply_format = _core.ReplyFormat.embeddings(form="ollama", model=read.model)
        params = PoolingParams(dimensions=read.dimensions)
        call = self._embeddings.call(prompts, params, reply_format, arrival, {"prompt": "input"}, call_id)
        return await self._intake.calls.serve(request, call)

    def _read_embed(self, body: bytes) -> tuple[Parsed[EmbedRequest], list[str | _core.Prompt]]:
        parsed = self._intake.decode(EMBED, body)
        self._check_model(parsed.request.model)
        self._embeddings.check_served()
        if not parsed.prompts or parsed.body[parsed.prompts[-1]].split() in ([b'""'], [b"null"], [b"[]"], [b"[", b"]"]):
            return parsed, []
        return parsed, self._embeddings.read_inputs(parsed.body, parsed.prompts, parsed.request.truncate is not False)

    async def embed_one(self, request: web.Request) -> web.StreamResponse:
        """`POST /api/embeddings`: of one text, not normalised, and cut where it is too long."""
        arrival = time.monotonic()
        parsed = await self._intake.read(request, lambda body: self._intake.decode(EMBEDDINGS, body))
        self._intake.ignored(request, parsed.ignored)
        self._check_model(parsed.request.model)
        self._embeddings.check_served()
        if not parsed.request.prompt:
            return web.json_response({"embedding": []})
        prompts = await self._embeddings.encode([parsed.request.prompt], True, self._intake.longest_embedding)
        reply_format = _core.ReplyFormat.embeddings(form="ollama_one")
        params = PoolingParams(normalize=False)
        call = self._embeddings.call(prompts, params, reply_format, arrival, {"prompt": "prompt"}, uuid.uuid4().hex)
        return await self._intake.calls.serve(request, call)

    def _check_model(self, name: str) -> None:
        """Ollama's names may have a tag, which is `latest` where none is given."""
        self._intake.check_model(name.removesuffix(":latest"))

    async def tags(self, _: web.Request) -> web.Response:
        """`GET /api/tags`."""
        return web.json_response({"models": [self._card(name) for name in self._intake.names]})

    async def running(self, _: web.Request) -> web.Response:
        """`GET /api/ps`; a model that is served stays."""
        stays = {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0, "context_length": self._engine.max_model_len}
        return web.json_response({"models": [self._card(name) | stays for name in self._intake.names]})

    async def show(self, request: web.Request) -> web.Response:
        """`POST /api/show`."""
        read = (await self._intake.read(request, lambda body: self._intake.decode(SHOW, body))).request
        name = read.model or read.name
        if name is None:
            raise bad_request("model: this field is required.", "model", "missing_required_parameter")
        self._check_model(name)
        return web.json_response(
            {
                "modelfile": f"FROM {name}\n",
                "parameters": about.parameters(self._engine),
                "template": about.template(self._engine),
                "details": about.details(self._engine),
                "model_info": about.model_info(self._engine),
                "capabilities": about.capabilities(self._engine),
                "modified_at": self._since,
            }
        )

    async def version(self, _: web.Request) -> web.Response:
        """`GET /api/version`."""
        return web.json_response({"version": _core.__version__})

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "model": name,
            "modified_at": self._since,
            "size": 0,
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": about.details(self._engine),
        }


def _loaded(read: ChatRequest | GenerateRequest, fields: dict[str, Any]) -> web.Response:
    head = {"model": read.model, "created_at": _rfc3339(time.time())}
    return web.json_response(head | fields | {"done": True, "done_reason": read.load_reason})


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")
