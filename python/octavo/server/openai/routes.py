"""OpenAI's routes: `/v1/completions`, `/v1/chat/completions`, `/v1/models`.

A request becomes a `Call` here: body, struct, checks, prompts (tokenised off the loop). `calls.py`
answers it.
"""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, Generic, TypeVar

import msgspec
from aiohttp import web

from octavo import _core
from octavo.errors import EngineDeadError
from octavo.sampling_params import SamplingParams
from octavo.server.body import Form, Parsed
from octavo.server.calls import Call, check_deadline
from octavo.server.errors import bad_request, body_refused, prompt_too_long
from octavo.server.intake import ChatText, Intake
from octavo.server.openai.forced_calls import forced_calls
from octavo.server.openai.messages import template_kwargs, template_messages, template_tools, tool_use
from octavo.server.openai.schemas import (
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
    ChatCompletionRequest,
    CompletionRequest,
    StreamOptions,
    ToolChoice,
    check_prompt_entries,
)
from octavo.server.structured import Wanted

R = TypeVar("R", CompletionRequest, ChatCompletionRequest)


@dataclass(frozen=True)
class Kind(Generic[R]):
    """Where the two routes that generate differ."""

    form: Form[R]
    prompt_field: str
    """What a request calls its prompt."""
    id_prefix: str
    reply_format: Callable[..., _core.ReplyFormat]


_INNER = {"stream_options": StreamOptions}

COMPLETION = Kind(
    Form(CompletionRequest, frozenset({"prompt"}), frozenset(), UNSUPPORTED_COMPLETION, inner=_INNER),
    "prompt",
    "cmpl-",
    _core.ReplyFormat.openai_completion,
)
CHAT = Kind(
    Form(
        ChatCompletionRequest,
        frozenset({"messages", "tools", "documents"}),
        frozenset({"messages", "tools", "chat_template_kwargs", "documents"}),
        UNSUPPORTED_CHAT,
        inner={**_INNER, "tool_choice": ToolChoice},
    ),
    "messages",
    "chatcmpl-",
    _core.ReplyFormat.openai_chat,
)


_ANY_LENGTH = 2**24
"""Token ids of a prompt that is shortened; a body holds no more."""
_ANTHROPIC = "anthropic-version"
"""A header of Anthropic's clients."""
MAX_CALL_CONTEXTS = 256
"""The prompts of one call together are as long as so many prompts of the model's length."""


@dataclass(frozen=True)
class PreparedChat:
    """A chat as the engine takes it."""

    prompt: _core.Prompt
    params: SamplingParams
    grammar: _core.Grammar | None
    answer: _core.AnswerFormat | None

    def call(self, **particular: Any) -> Call:
        """What `calls.py` answers. particular: the other fields of a `Call`."""
        return Call(prompts=[self.prompt], params=self.params, grammar=self.grammar, **particular)


class OpenAIRoutes:
    """The handlers."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._engine = intake.engine
        self._calls = intake.calls
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

    async def models(self, request: web.Request) -> web.Response:
        """`GET /v1/models`."""
        answer: dict[str, Any] = {"object": "list", "data": [self._card(name, request) for name in self._intake.names]}
        if _ANTHROPIC in request.headers:
            answer |= {"has_more": False, "first_id": self._intake.names[0], "last_id": self._intake.names[-1]}
        return web.json_response(answer)

    async def model(self, request: web.Request) -> web.Response:
        """`GET /v1/models/{id}`; clients send a slash of the id as %2F or as it is."""
        name = request.match_info["model"]
        if name not in self._intake.names:
            raise self._intake.unknown_model(name)
        return web.json_response(self._card(name, request))

    def _card(self, name: str, request: web.Request) -> dict[str, Any]:
        """A model as OpenAI shows it; to Anthropic's clients with what they look for besides."""
        since = datetime.fromtimestamp(self._started, timezone.utc).isoformat().replace("+00:00", "Z")
        theirs = {"type": "model", "display_name": name, "created_at": since} if _ANTHROPIC in request.headers else {}
        return theirs | {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "octavo",
            "root": self._engine.model_name,
            "parent": None,
            "max_model_len": self._engine.max_model_len,
        }

    # ---- generation ------------------------------------------------------------------------------

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/completions`."""
        arrival = time.monotonic()
        read, given = await self._intake.read(request, self._read_completion)
        self._intake.ignored(request, read.ignored)
        parsed = read.request
        wanted = parsed.wanted_structure()
        try:
            params = self.sampling_params(parsed)
            most = parsed.prompt_limit(self._engine.max_model_len)
            prompts = await self._encode(given, parsed.add_special_tokens is not False, most)
            echo = await self._echo(parsed, given if most is None else prompts) if parsed.echo else None
            grammar = await self._engine.compile_grammar(wanted.params)
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self._calls.refusal(error, _names(COMPLETION, parsed, wanted)) from None
        more: dict[str, Any] = {"echo": echo}
        if parsed.makes_more:
            more["best_of"] = (params.n, parsed.n or 1, parsed.logprobs is not None)
        call = self._call(COMPLETION, parsed, prompts, params, grammar, arrival, **more)
        return await self._calls.serve(request, call)

    def _read_completion(self, body: bytes) -> tuple[Parsed[CompletionRequest], list[str | _core.Prompt]]:
        parsed = self._decode(COMPLETION, body)
        parsed.request.check()
        if not parsed.prompts:
            raise bad_request("prompt: this field is required.", "prompt", "missing_required_parameter")
        prompts: list[str | _core.Prompt] = []
        for value in parsed.prompts:
            try:
                prompts = _core.read_prompts(
                    parsed.body,
                    value.start,
                    value.stop,
                    max_prompts=self._intake.config.max_prompts,
                    max_tokens=self._engine.max_model_len
                    if parsed.request.truncate_prompt_tokens is None
                    else _ANY_LENGTH,
                    max_characters=self._intake.max_characters,
                )
            except _core.RefusedError as error:
                raise body_refused(error) from None
        self._intake.config.check_fields(parsed.request, num_prompts=len(prompts))
        return parsed, prompts

    async def _encode(
        self, given: list[str | _core.Prompt], add_special_tokens: bool, kept: int | None
    ) -> list[_core.Prompt]:
        """The prompts as tokens, the last `kept` of each. A call that cannot be taken is refused before
        any of them.
        """
        most = self._engine.config.max_waiting
        if len(given) > most:
            raise bad_request(f"prompt: {len(given)} prompts, at most max_waiting = {most} can wait.", "prompt")
        self._engine.core.check_queue(len(given) - 1)
        prompts, num_tokens, most_tokens = [], 0, MAX_CALL_CONTEXTS * self._engine.max_model_len
        for prompt in given:
            if isinstance(prompt, str):
                encoded = self._intake.shortened(await self._engine.encode_text(prompt, add_special_tokens), kept)
                if len(encoded) > self._engine.max_model_len:
                    raise prompt_too_long(self._engine.max_model_len, f"the prompt has {len(encoded)}.", "prompt")
            else:
                encoded = self._intake.shortened(prompt, kept)
            self._intake.check_length(encoded, "prompt")
            if len(encoded) == 0:
                raise bad_request("prompt: must have at least one token.", "prompt")
            prompts.append(encoded)
            num_tokens += len(encoded)
            if num_tokens > most_tokens:
                raise bad_request(f"prompt: at most {most_tokens} tokens over all prompts of a call.", "prompt")
        return prompts

    async def _echo(self, parsed: CompletionRequest, given: Sequence[str | _core.Prompt]) -> _core.Echo:
        """What completions begin with: prompts as they were given, or the text of their tokens."""
        tokenizer = self._engine.tokenizer

        def text_of(prompt: str | _core.Prompt) -> str:
            if isinstance(prompt, str):
                return prompt
            return "" if tokenizer is None else tokenizer.decode(prompt.token_ids, skip_special_tokens=False)

        texts = await self._engine.run_beside(lambda: [text_of(prompt) for prompt in given])
        return _core.Echo(
            texts,
            choices_each=parsed.n or 1,
            alone=parsed.is_echo_alone,
            logprobs=parsed.logprobs,
            prompt_logprobs=parsed.prompt_logprobs,
        )

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/chat/completions`."""
        arrival = time.monotonic()
        read, text = await self._intake.read(request, self._read_chat)
        self._intake.ignored(request, read.ignored)
        parsed = read.request
        chat = await self.prepare(parsed, text, _names(CHAT, parsed))
        call = self._call(CHAT, parsed, [chat.prompt], chat.params, chat.grammar, arrival, answer=chat.answer)
        return await self._calls.serve(request, call)

    async def prepare(self, chat: ChatCompletionRequest, text: ChatText, names: Mapping[str, str]) -> PreparedChat:
        """What a chat becomes before it is a call; chats of other protocols too, translated. Raises
        `ApiError`.

        names: what the request calls the core's fields.
        """
        forced = forced_calls(chat.tools or (), text.tool_use)
        wanted = forced or chat.wanted_structure()
        try:
            params = replace(self.sampling_params(chat), structured_outputs=wanted.params)
            if forced is not None:
                params = replace(params, thinking_token_budget=None)  # there is no reasoning
            prompt = await self.encode_chat(chat, text)
            if forced is None:
                params = self._engine.answers.leaves_room(prompt, params)
            grammar = await self._engine.compile_grammar(wanted.params)
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self._calls.refusal(error, {**(wanted.names or {}), **names}) from None
        answer = self._engine.answers.format(
            prompt, text.tool_use, include_reasoning=chat.include_reasoning is not False
        )
        if chat.skip_special_tokens is None:
            params = self._engine.answers.params(answer, params)
        return PreparedChat(prompt, params, grammar, answer)

    def sampling_params(self, request: CompletionRequest | ChatCompletionRequest) -> SamplingParams:
        """With the model's defaults, and what the answer must look like. Raises `ValueError`."""
        self._intake.config.check_fields(request)
        params = request.to_sampling_params(self._engine.generation_defaults)
        return replace(params, structured_outputs=request.wanted_structure().params)

    async def encode_chat_of(self, request: web.Request) -> _core.Prompt:
        """The prompt that a chat's body makes, for routes that show it."""
        read, text = await self._intake.read(request, self._read_chat)
        try:
            return await self.encode_chat(read.request, text)
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self._calls.refusal(error, _names(CHAT, read.request)) from None

    async def encode_chat(self, chat: ChatCompletionRequest, text: ChatText) -> _core.Prompt:
        """A conversation as tokens. Raises `ApiError`, and what `AsyncEngine.encode_chat` raises."""
        continues = bool(chat.continue_final_message)
        if continues and chat.add_generation_prompt:
            raise bad_request(
                "continue_final_message: not together with add_generation_prompt.", "continue_final_message"
            )
        return await self._intake.encode_chat(
            text,
            add_generation_prompt=not continues and chat.add_generation_prompt is not False,
            continue_final_message=continues,
            most=chat.prompt_limit(self._engine.max_model_len),
        )

    def _read_chat(self, body: bytes) -> tuple[Parsed[ChatCompletionRequest], ChatText]:
        parsed = self._decode(CHAT, body)
        return parsed, self.chat_text(parsed.request)

    def chat_text(self, chat: ChatCompletionRequest) -> ChatText:
        """What the template gets of a chat. Raises `ApiError` 400."""
        messages = msgspec.json.encode(template_messages(chat, self._intake.config))
        own = self._own_template(chat.chat_template)
        template = own or self._engine.chat_template
        tools = template_tools(chat, template is None or template.takes_tools)
        return ChatText(messages, tools, template_kwargs(chat), own, tool_use(chat))

    def _own_template(self, source: str | None) -> _core.ChatTemplate | None:
        """The template that a request brings, compiled, where that may be."""
        if source is None:
            return None
        if not self._intake.config.trust_request_chat_template:
            raise bad_request(
                "chat_template: not taken from requests; start the server with --trust-request-chat-template for that.",
                "chat_template",
                "unsupported_parameter",
            )
        if self._engine.tokenizer is None:
            raise bad_request("chat_template: this model has no tokenizer.", "chat_template", "unsupported_parameter")
        try:
            return _core.ChatTemplate(source, self._engine.tokenizer.named_tokens)
        except ValueError as error:
            raise bad_request(f"chat_template: {error}", "chat_template", "template_error") from None

    def _decode(self, kind: Kind[R], body: bytes) -> Parsed[R]:
        """What both routes check of a body."""
        parsed = self._intake.decode(kind.form, body)
        self._intake.check_model(parsed.request.model)
        parsed.request.check_stream_options()
        check_deadline(parsed.request.deadline_ms)
        return parsed

    def _call(
        self,
        kind: Kind[R],
        parsed: R,
        prompts: list[_core.Prompt],
        params: SamplingParams,
        grammar: _core.Grammar | None,
        arrival: float,
        **particular: Any,
    ) -> Call:
        """What `calls.py` answers. particular: what the reply format of the route takes besides."""
        check_prompt_entries(sum(len(prompt) for prompt in prompts), params)
        call_id = kind.id_prefix + uuid.uuid4().hex
        reply_format = kind.reply_format(
            id=call_id,
            model=self._engine.model_name,
            created=int(time.time()),
            stream=bool(parsed.stream),
            include_usage=parsed.include_usage,
            continuous_usage=parsed.continuous_usage,
            timing=bool(parsed.timing),
            token_ids=_core.TokenIds(prompts, choices_each=parsed.n or 1) if parsed.return_token_ids else None,
            **particular,
        )
        return Call(
            id=call_id,
            prompts=prompts,
            names=_names(kind, parsed),
            params=params,
            grammar=grammar,
            max_tokens=parsed.output_limit,
            reply_format=reply_format,
            stream=bool(parsed.stream),
            priority=parsed.priority or 0,
            cache_salt=parsed.cache_salt,
            deadline_ms=parsed.deadline_ms,
            arrival=arrival,
        )


def _names(kind: Kind[R], parsed: R, wanted: Wanted | None = None) -> dict[str, str]:
    """What the request calls the core's fields."""
    of_structure = wanted.names if wanted is not None and wanted.names is not None else {}
    return {"prompt": kind.prompt_field, "max_tokens": parsed.output_limit_field, **of_structure}
