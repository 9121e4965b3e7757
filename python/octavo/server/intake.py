"""What the routes of all protocols do with a request before it is a `Call`: read the body, check the
name of the model, have template and tokenizer run beside the loop.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import msgspec
from aiohttp import web

from octavo import _core
from octavo.answers import ToolUse
from octavo.server.body import Bodies, Form, Parsed, decode, field_names
from octavo.server.calls import IGNORED, CallServer
from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError, bad_request, prompt_too_long
from octavo.server.metrics import Metrics

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")

_BODY = web.RequestKey("body", bytes)
_ANY_MODEL = frozenset({"", "dummy", "tgi"})
"""What clients of single-model servers put where a name must be."""
_ALWAYS_READ = 64 * 1024
"""Characters that are tokenised whatever the model's length, to say how many tokens they are."""


@dataclass(frozen=True)
class ChatText:
    """What the chat template gets, as JSON, and what the answer may hold."""

    messages: bytes
    tools: bytes | None = None
    kwargs: bytes | None = None
    template: _core.ChatTemplate | None = None
    """That of the request, where it brings one."""
    tool_use: ToolUse = field(default_factory=ToolUse)


class Intake:
    """Shared by the routes of all protocols."""

    def __init__(
        self, engine: "AsyncEngine", config: ServerConfig, bodies: Bodies, metrics: Metrics, calls: CallServer
    ) -> None:
        self.engine = engine
        self.config = config
        self.max_input_tokens = min(engine.max_model_len - 1, config.max_input_tokens or engine.max_model_len)
        self.longest_embedding = min(engine.core.longest_embedding, config.max_input_tokens or engine.max_model_len)
        """Tokens of a prompt that may have one."""
        self.metrics = metrics
        self.calls = calls
        self.names = engine.config.served_model_name or (engine.model_name,)
        longest_token = 0 if engine.tokenizer is None else engine.tokenizer.longest_token
        self.max_characters = max(_ALWAYS_READ, engine.max_model_len * longest_token)
        self._bodies = bodies

    async def fields(self, request: web.Request) -> frozenset[str]:
        """Names of the body's fields, on routes where they say which protocol it is of. The body is
        kept for `read`.
        """
        self.calls.check_request(request)
        body = request[_BODY] = await self._bodies.read(request)
        return frozenset(await self._bodies.work(len(body), functools.partial(field_names, body, self.config)))

    async def read(self, request: web.Request, read: Callable[[bytes], T]) -> T:
        """What `read` makes of the body, which nobody keeps."""
        self.calls.check_request(request)
        body = request.pop(_BODY, None)
        if body is None:
            body = await self._bodies.read(request)
        return await self._bodies.work(len(body), functools.partial(read, body))

    def decode(self, form: Form[S], body: bytes) -> Parsed[S]:
        """A body as its route has it. Raises `ApiError` 400."""
        strict = self.config.params_mode == "strict"
        return decode(form, body, self.max_characters, self.engine.max_model_len, self.config, strict=strict)

    def ignored(self, request: web.Request, fields: tuple[str, ...]) -> None:
        """The request has fields without an effect, which its answer warns of."""
        self.metrics.ignored(fields)
        request[IGNORED] = fields

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` 404 for another model than the one that is served."""
        if name is not None and name not in self.names and name not in _ANY_MODEL:
            raise self.unknown_model(name)

    def unknown_model(self, name: str) -> ApiError:
        """A 404 that names the one that is served."""
        shown = name if len(name) <= 100 else name[:100] + "..."
        served = ", ".join(self.names)
        return ApiError(404, "model_not_found", f"The model {shown!r} is not served here, but {served}.", param="model")

    async def encode_text(self, text: str, field: str, *, add_special_tokens: bool = True) -> _core.Prompt:
        """A prompt as tokens. Raises `ApiError` 400 where it is too long or nothing, with `field` as
        param.
        """
        length = self.engine.max_model_len
        if len(text) > self.max_characters:
            raise prompt_too_long(length, f"{len(text)} characters are more than {self.max_characters}.", field)
        prompt = await self.engine.encode_text(text, add_special_tokens)
        if len(prompt) > length:
            raise prompt_too_long(length, f"the prompt has {len(prompt)}.", field)
        self.check_length(prompt, field)
        if len(prompt) == 0:
            raise bad_request(f"{field}: must have at least one token.", field)
        return prompt

    @staticmethod
    def shortened(prompt: _core.Prompt, most: int | None) -> _core.Prompt:
        """The last `most` tokens of a prompt; all of them where it is None."""
        return prompt if most is None or len(prompt) <= most else _core.Prompt(prompt.token_ids[-most:])

    async def encode_chat(
        self,
        text: ChatText,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        most: int | None = None,
    ) -> _core.Prompt:
        """A conversation as tokens, its last `most` ones. Raises `ApiError` 400 where the template
        makes too much of it.
        """
        try:
            prompt = await self.engine.encode_chat(
                text.messages,
                text.tools,
                add_generation_prompt=add_generation_prompt,
                kwargs_json=text.kwargs,
                max_characters=self.max_characters,
                continue_final_message=continue_final_message,
                **({} if text.template is None else {"template": text.template}),
            )
        except _core.PromptTooLongError as error:
            raise prompt_too_long(self.engine.max_model_len, str(error), "messages") from None
        prompt = self.shortened(prompt, most)
        self.check_length(prompt, "messages")
        return prompt

    def check_length(self, prompt: _core.Prompt, field: str) -> None:
        """Raises `ApiError` 400 for a prompt over `max_input_tokens`."""
        most = self.config.max_input_tokens
        if most is not None and len(prompt) > most:
            what = f"the prompt has {len(prompt)}, and prompts may have {most} (max_input_tokens)."
            raise prompt_too_long(self.engine.max_model_len, what, field)
