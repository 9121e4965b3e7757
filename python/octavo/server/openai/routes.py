"""OpenAI's routes: `/v1/completions`, `/v1/chat/completions`, `/v1/models`.

A request becomes a `Call` here: body, struct, checks, prompts (tokenised off the loop). `calls.py`
answers it.
"""

import functools
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
from aiohttp import web

from octavo import _core
from octavo.errors import EngineDeadError
from octavo.sampling_params import SamplingParams
from octavo.server.body import Bodies, Form, Parsed, decode
from octavo.server.calls import Call, CallServer
from octavo.server.errors import ApiError, bad_request, body_refused, prompt_too_long
from octavo.server.metrics import Metrics
from octavo.server.openai.messages import template_kwargs, template_messages, template_tools
from octavo.server.openai.schemas import (
    MAX_PROMPTS,
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
    ChatCompletionRequest,
    CompletionRequest,
    check_choices,
)

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine

R = TypeVar("R", CompletionRequest, ChatCompletionRequest)
T = TypeVar("T")

_ANY_MODEL = frozenset({"", "dummy", "tgi"})
"""What clients of single-model servers put where a name must be."""


@dataclass(frozen=True)
class Kind(Generic[R]):
    """Where the two routes that generate differ."""

    form: Form[R]
    prompt_field: str
    """What a request calls its prompt."""
    id_prefix: str
    reply_format: Callable[..., _core.ReplyFormat]


COMPLETION = Kind(
    Form(CompletionRequest, frozenset({"prompt"}), frozenset(), UNSUPPORTED_COMPLETION),
    "prompt",
    "cmpl-",
    _core.ReplyFormat.openai_completion,
)
CHAT = Kind(
    Form(
        ChatCompletionRequest,
        frozenset({"messages", "tools"}),
        frozenset({"messages", "tools", "chat_template_kwargs"}),
        UNSUPPORTED_CHAT,
    ),
    "messages",
    "chatcmpl-",
    _core.ReplyFormat.openai_chat,
)


MAX_CALL_CONTEXTS = 256
"""The prompts of one call together are as long as so many prompts of the model's length."""
_ALWAYS_READ = 64 * 1024
"""Characters that are tokenised whatever the model's length, to say how many tokens they are."""


@dataclass(frozen=True)
class ChatText:
    """What the chat template gets, as JSON."""

    messages: str
    tools: str | None
    kwargs: str | None


class OpenAIRoutes:
    """The handlers."""

    def __init__(self, engine: "AsyncEngine", bodies: Bodies, metrics: Metrics, calls: CallServer) -> None:
        self._calls = calls
        self._engine = engine
        self._bodies = bodies
        self._metrics = metrics
        self._names = engine.config.served_model_name or (engine.model_name,)
        longest_token = 0 if engine.tokenizer is None else engine.tokenizer.longest_token
        self._max_characters = max(_ALWAYS_READ, engine.max_model_len * longest_token)
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
        served = ", ".join(self._names)
        return ApiError(404, "model_not_found", f"The model {shown!r} is not served here, but {served}.", param="model")

    # ---- generation ------------------------------------------------------------------------------

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/completions`."""
        arrival = time.monotonic()
        read, given = await self._read(request, self._read_completion)
        self._metrics.ignored(read.ignored)
        parsed = read.request
        try:
            params = parsed.to_sampling_params(self._engine.generation_defaults)
            prompts = await self._encode(given, parsed.add_special_tokens is not False)
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self._calls.refusal(error, _names(COMPLETION, parsed)) from None
        return await self._calls.serve(request, self._call(COMPLETION, parsed, prompts, params, arrival))

    async def _read(self, request: web.Request, read: Callable[[bytes], T]) -> T:
        """What `read` makes of the body, which nobody keeps."""
        self._calls.check_open()
        body = await self._bodies.read(request)
        return await self._bodies.work(len(body), functools.partial(read, body))

    def _read_completion(self, body: bytes) -> tuple[Parsed[CompletionRequest], list[str | _core.Prompt]]:
        parsed = self._decode(COMPLETION, body)
        if not parsed.prompts:
            raise bad_request("prompt: this field is required.", "prompt", "missing_required_parameter")
        prompts: list[str | _core.Prompt] = []
        for value in parsed.prompts:
            try:
                prompts = _core.read_prompts(
                    body,
                    value.start,
                    value.stop,
                    max_prompts=MAX_PROMPTS,
                    max_tokens=self._engine.max_model_len,
                    max_characters=self._max_characters,
                )
            except _core.RefusedError as error:
                raise body_refused(error) from None
        check_choices(len(prompts), parsed.request.n or 1)
        return parsed, prompts

    async def _encode(self, given: list[str | _core.Prompt], add_special_tokens: bool) -> list[_core.Prompt]:
        """The prompts as tokens. A call that cannot be taken is refused before any of them."""
        most = self._engine.config.max_waiting
        if len(given) > most:
            raise bad_request(f"prompt: {len(given)} prompts, at most max_waiting = {most} can wait.", "prompt")
        self._engine.core.check_queue(len(given) - 1)
        prompts, num_tokens, most_tokens = [], 0, MAX_CALL_CONTEXTS * self._engine.max_model_len
        for prompt in given:
            if isinstance(prompt, str):
                encoded = await self._engine.encode_text(prompt, add_special_tokens)
                if len(encoded) > self._engine.max_model_len:
                    raise prompt_too_long(self._engine.max_model_len, f"the prompt has {len(encoded)}.", "prompt")
            else:
                encoded = prompt
            if len(encoded) == 0:
                raise bad_request("prompt: must have at least one token.", "prompt")
            prompts.append(encoded)
            num_tokens += len(encoded)
            if num_tokens > most_tokens:
                raise bad_request(f"prompt: at most {most_tokens} tokens over all prompts of a call.", "prompt")
        return prompts

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/chat/completions`."""
        arrival = time.monotonic()
        read, text = await self._read(request, self._read_chat)
        self._metrics.ignored(read.ignored)
        parsed = read.request
        try:
            params = parsed.to_sampling_params(self._engine.generation_defaults)
            prompt = await self._engine.encode_chat(
                text.messages,
                text.tools,
                add_generation_prompt=parsed.add_generation_prompt is not False,
                kwargs_json=text.kwargs,
                max_characters=self._max_characters,
            )
        except _core.PromptTooLongError as error:  # what the template makes of them
            raise prompt_too_long(self._engine.max_model_len, str(error), "messages") from None
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self._calls.refusal(error, _names(CHAT, parsed)) from None
        return await self._calls.serve(request, self._call(CHAT, parsed, [prompt], params, arrival))

    def _read_chat(self, body: bytes) -> tuple[Parsed[ChatCompletionRequest], ChatText]:
        parsed = self._decode(CHAT, body)
        chat = parsed.request
        messages = msgspec.json.encode(template_messages(chat)).decode()
        template = self._engine.chat_template
        tools = template_tools(chat, template is None or template.takes_tools)
        return parsed, ChatText(messages, tools, template_kwargs(chat.chat_template_kwargs))

    def _decode(self, kind: Kind[R], body: bytes) -> Parsed[R]:
        """What both routes check of a body."""
        parsed = decode(kind.form, body, self._max_characters, self._engine.max_model_len)
        self._check_model(parsed.request.model)
        parsed.request.check_stream_options()
        return parsed

    def _call(
        self,
        kind: Kind[R],
        parsed: R,
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
            names=_names(kind, parsed),
            params=params,
            max_tokens=parsed.output_limit,
            reply_format=reply_format,
            stream=bool(parsed.stream),
            priority=parsed.priority or 0,
            cache_salt=parsed.cache_salt,
            arrival=arrival,
        )


def _names(kind: Kind[R], parsed: R) -> dict[str, str]:
    """What the request calls the core's fields."""
    return {"prompt": kind.prompt_field, "max_tokens": parsed.output_limit_field}
