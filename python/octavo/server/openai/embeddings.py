"""Embeddings: OpenAI's `/v1/embeddings` and vLLM's `/pooling`; and what Ollama's routes share with
them.
"""

import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from octavo import _core
from octavo.errors import EngineDeadError
from octavo.pooling import PoolingParams, first_tokens
from octavo.server.body import Form, Parsed
from octavo.server.calls import Call
from octavo.server.errors import ApiError, bad_request, body_refused, prompt_too_long
from octavo.server.intake import Intake
from octavo.server.openai.routes import MAX_CALL_CONTEXTS, OpenAIRoutes
from octavo.server.openai.schemas import ChatCompletionRequest, Count

_NAMES = {"prompt": "input"}
_ENCODINGS = ("float", "base64")
_ANY_LENGTH = 2**24
"""Token ids of an input that is shortened; a body holds no more."""


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/embeddings` and `/pooling`, all but `input`: that may be millions of token ids."""

    model: str | None = None
    messages: list[msgspec.Raw] | None = None
    encoding_format: str | None = None
    dimensions: Count | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: Count | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: Count | None = None
    cache_salt: str | None = None
    task: str | None = None


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation": (),
    "chat_template": (),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "mm_processor_kwargs": ({},),
    "softmax": (),
    "truncation_side": ("right",),
}
FORM = Form(
    EmbeddingRequest,
    frozenset({"input", "messages"}),
    frozenset({"messages", "chat_template_kwargs"}),
    _UNSUPPORTED,
    "input",
    apart="input",
)


class EmbeddingRoutes:
    """The handlers."""

    def __init__(self, intake: Intake, chats: OpenAIRoutes) -> None:
        self._intake = intake
        self._engine = intake.engine
        self._chats = chats

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application."""
        return [web.post("/v1/embeddings", self.embeddings), web.post("/pooling", self.pooling)]

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/embeddings`."""
        return await self._answer(request, "openai", "embd-")

    async def pooling(self, request: web.Request) -> web.StreamResponse:
        """`POST /pooling`: the same, as vLLM writes it there."""
        return await self._answer(request, "pooling", "pool-")

    async def _answer(self, request: web.Request, form: str, id_prefix: str) -> web.StreamResponse:
        arrival = time.monotonic()
        parsed, given = await self._intake.read(request, self._read)
        self._intake.ignored(request, parsed.ignored)
        read = parsed.request
        self._intake.check_model(read.model)
        self.check_served()
        if read.encoding_format not in (None, *_ENCODINGS):
            raise bad_request(
                f"encoding_format = {read.encoding_format[:50]!r}: must be float or base64.", "encoding_format"
            )
        if read.task not in (None, "embed"):
            raise bad_request(f"task = {read.task[:50]!r}: only embed is supported.", "task", "unsupported_parameter")
        normalize = read.normalize if read.use_activation is None else read.use_activation
        params = PoolingParams(dimensions=read.dimensions, normalize=normalize)
        most = truncation(read.truncate_prompt_tokens, self._engine.max_model_len, self._intake.longest_embedding)
        if read.messages is not None:
            prompts, names = [await self._encode_chat(read, most)], {"prompt": "messages"}
        else:
            prompts, names = await self.encode(given, read.add_special_tokens is not False, most), _NAMES
        call_id = id_prefix + uuid.uuid4().hex
        reply_format = _core.ReplyFormat.embeddings(
            form=form,
            id=call_id,
            model=self._engine.model_name,
            created=int(time.time()),
            base64=read.encoding_format == "base64",
        )
        priority = read.priority or 0
        call = self.call(prompts, params, reply_format, arrival, names, call_id, priority, read.cache_salt)
        return await self._intake.calls.serve(request, call)

    def _read(self, body: bytes) -> tuple[Parsed[EmbeddingRequest], list[str | _core.Prompt]]:
        parsed = self._intake.decode(FORM, body)
        has_messages = parsed.request.messages is not None
        if has_messages and parsed.prompts:
            raise bad_request("messages: not together with input; give one of them.", "messages")
        if has_messages:
            return parsed, []
        return parsed, self.read_inputs(parsed.body, parsed.prompts, parsed.request.truncate_prompt_tokens is not None)

    def read_inputs(self, body: bytes, values: tuple[slice, ...], are_cut: bool) -> list[str | _core.Prompt]:
        """The texts or token ids of `input`. Raises `ApiError` 400. are_cut: those that are too long
        are shortened.
        """
        if not values:
            raise bad_request("input: this field is required.", "input", "missing_required_parameter")
        try:
            return _core.read_prompts(
                body,
                values[-1].start,
                values[-1].stop,
                max_prompts=self._intake.config.max_prompts,
                max_tokens=_ANY_LENGTH if are_cut else self._engine.max_model_len,
                max_characters=self._intake.max_characters,
            )
        except _core.RefusedError as error:
            refused = body_refused(error)
            message = re.sub(r"^prompt(?=[\[:])", "input", refused.message)
            param = None if refused.param is None else re.sub("^prompt", "input", refused.param)
            raise ApiError(refused.status, refused.code, message, param=param) from None

    def check_served(self) -> None:
        """Raises `ApiError` 400 where the model is only to generate."""
        if self._engine.embeddings is None:
            raise ApiError(
                400,
                "task_not_served",
                "This server was started with --runner generate and makes no embeddings; --runner auto does.",
                param="model",
            )

    async def encode(
        self, given: list[str | _core.Prompt], add_special_tokens: bool, most: int | None
    ) -> list[_core.Prompt]:
        """The inputs as tokens, the first `most` of each. A call that cannot be taken is refused before
        any of them. Raises `ApiError`.
        """
        can_wait = self._engine.config.max_waiting
        if len(given) > can_wait:
            raise bad_request(f"input: {len(given)} inputs, at most max_waiting = {can_wait} can wait.", "input")
        longest = self._engine.max_model_len
        most_tokens, num_tokens = MAX_CALL_CONTEXTS * longest, 0
        prompts = []
        try:
            self._engine.core.check_queue(len(given) - 1)
            for number, value in enumerate(given):
                if isinstance(value, str):
                    prompt = await self._engine.encode_text(value, add_special_tokens)
                    if most is not None and len(prompt) > most:
                        plain = await self._engine.encode_text(value, False)
                        prompt = first_tokens(prompt, plain, most)
                else:
                    prompt = value if most is None else first_tokens(value, value, most)
                if len(prompt) > longest:
                    raise prompt_too_long(longest, f"input[{number}] has {len(prompt)}.", "input")
                self._intake.check_length(prompt, "input")
                if len(prompt) == 0:
                    raise bad_request(f"input[{number}]: must have at least one token.", "input")
                num_tokens += len(prompt)
                if num_tokens > most_tokens:
                    raise bad_request(f"input: at most {most_tokens} tokens over all inputs of a call.", "input")
                prompts.append(prompt)
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self._intake.calls.refusal(error, _NAMES) from None
        return prompts

    async def _encode_chat(self, read: EmbeddingRequest, most: int | None) -> _core.Prompt:
        """A conversation through the chat template."""
        chat = ChatCompletionRequest(
            messages=read.messages or [],
            chat_template_kwargs=read.chat_template_kwargs,
            add_generation_prompt=bool(read.add_generation_prompt),
            continue_final_message=read.continue_final_message,
        )
        try:
            prompt = await self._chats.encode_chat(chat, self._chats.chat_text(chat))
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self._intake.calls.refusal(error, {"prompt": "messages"}) from None
        return prompt if most is None else first_tokens(prompt, prompt, most)

    def call(
        self,
        prompts: list[_core.Prompt],
        params: PoolingParams,
        reply_format: _core.ReplyFormat,
        arrival: float,
        names: Mapping[str, str],
        call_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Call:
        """What `calls.py` answers. Raises `ApiError` 400 for dimensions that the model has not."""
        embeddings = self._engine.embeddings
        assert embeddings is not None, "check_served comes first"
        try:
            checked = embeddings.checked(params)
        except ValueError as error:
            raise bad_request(f"{error}.", "dimensions") from None
        return Call(
            id=call_id,
            prompts=prompts,
            names=names,
            params=checked,
            max_tokens=None,
            reply_format=reply_format,
            stream=False,
            priority=priority,
            cache_salt=cache_salt,
            arrival=arrival,
        )


def truncation(wanted: int | None, max_model_len: int, longest: int) -> int | None:
    """How many tokens are kept of an input; None: it must fit as it is. Raises `ApiError` 400.

    longest: what can be kept, and is by -1.
    """
    if wanted is None or wanted == -1:
        return None if wanted is None else longest
    if not 1 <= wanted <= max_model_len:
        raise bad_request(
            f"truncate_prompt_tokens = {wanted}: must be from 1 to {max_model_len}, or -1 for the model's length.",
            "truncate_prompt_tokens",
        )
    return wanted
