"""OpenAI's routes: `/v1/completions`, `/v1/chat/completions`, `/v1/models`.

A request becomes a `Call` here: body, struct, checks, prompts (tokenised off the loop). `calls.py`
answers it.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import web

from octavo import _core
from octavo.errors import EngineDeadError
from octavo.sampling_params import SamplingParams
from octavo.server.body import decode, read_body
from octavo.server.calls import Call, CallServer
from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError, bad_request
from octavo.server.metrics import Metrics
from octavo.server.openai.messages import template_kwargs, template_messages, template_tools
from octavo.server.openai.schemas import (
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
    ChatCompletionRequest,
    CompletionRequest,
    check_choices,
)

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine

R = TypeVar("R", CompletionRequest, ChatCompletionRequest)

_ANY_MODEL = frozenset({"", "dummy", "tgi"})
"""What clients of single-model servers put where a name must be."""


@dataclass(frozen=True)
class Kind:
    """Where the two routes that generate differ."""

    prompt_field: str
    """What a request calls its prompt."""
    id_prefix: str
    reply_format: Callable[..., _core.ReplyFormat]


COMPLETION = Kind("prompt", "cmpl-", _core.ReplyFormat.openai_completion)
CHAT = Kind("messages", "chatcmpl-", _core.ReplyFormat.openai_chat)


class OpenAIRoutes:
    """The handlers."""

    def __init__(self, engine: "AsyncEngine", config: ServerConfig, metrics: Metrics, calls: CallServer) -> None:
        self._calls = calls
        self._engine = engine
        self._config = config
        self._metrics = metrics
        self._names = engine.config.served_model_name or (engine.model_name,)
        self._longest = min(engine.max_model_len, engine.core.longest_request)
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

    # ---- models ----------------------------------------------------------------------------------

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

    # ---- generation ------------------------------------------------------------------------------

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/completions`."""
        arrival = time.monotonic()
        parsed = await self._parse(request, CompletionRequest, UNSUPPORTED_COMPLETION)
        given = parsed.prompts()
        check_choices(len(given), parsed.n or 1)
        try:
            params = parsed.to_sampling_params(self._engine.generation_defaults)
            prompts = [await self._encode(prompt, parsed.add_special_tokens is not False) for prompt in given]
            if parsed.max_tokens is None:
                params = params.fitting(self._longest - max(map(len, prompts)))
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self._calls.refusal(error, COMPLETION.prompt_field) from None
        return await self._calls.serve(request, self._call(COMPLETION, parsed, prompts, params, arrival))

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/chat/completions`."""
        arrival = time.monotonic()
        parsed = await self._parse(request, ChatCompletionRequest, UNSUPPORTED_CHAT)
        messages = template_messages(parsed)
        self._check_characters(sum(len(message["content"]) for message in messages), "messages")
        template = self._engine.chat_template
        tools = template_tools(parsed, template is None or template.takes_tools)
        kwargs = template_kwargs(parsed.chat_template_kwargs)
        try:
            params = parsed.to_sampling_params(self._engine.generation_defaults)
            prompt = await self._engine.encode_chat(
                msgspec.json.encode(messages).decode(),
                tools,
                add_generation_prompt=parsed.add_generation_prompt is not False,
                kwargs_json=kwargs,
            )
            if parsed.max_tokens is None and parsed.max_completion_tokens is None:
                params = params.fitting(self._longest - len(prompt))
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self._calls.refusal(error, CHAT.prompt_field) from None
        return await self._calls.serve(request, self._call(CHAT, parsed, [prompt], params, arrival))

    def _call(
        self,
        kind: Kind,
        parsed: CompletionRequest | ChatCompletionRequest,
        prompts: list[_core.Prompt],
        params: SamplingParams,
        arrival: float,
    ) -> Call:
        """What `calls.py` answers."""
        call_id = kind.id_prefix + uuid.uuid4().hex
        reply_format = kind.reply_format(
            id=call_id,
            model=self._engine.model_name,
            created=int(time.time()),
            stream=bool(parsed.stream),
            include_usage=parsed.include_usage,
            continuous_usage=parsed.continuous_usage,
        )
        return Call(
            id=call_id,
            prompts=prompts,
            prompt_field=kind.prompt_field,
            params=params,
            reply_format=reply_format,
            stream=bool(parsed.stream),
            priority=parsed.priority or 0,
            cache_salt=parsed.cache_salt,
            arrival=arrival,
        )

    async def _parse(self, request: web.Request, struct: type[R], unsupported: dict[str, tuple[Any, ...]]) -> R:
        self._calls.check_open()
        body = await read_body(request, self._config.max_body_size)
        parsed, unknown = decode(struct, body, unsupported)
        self._metrics.unknown_fields += unknown
        self._check_model(parsed.model)
        parsed.check_stream_options()
        return parsed

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
