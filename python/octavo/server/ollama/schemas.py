"""What Ollama's clients send, as msgspec structs, and its translation to a chat of OpenAI's."""

import re
from typing import Any

import msgspec

from octavo.chat import FunctionCall, Message, ToolCall
from octavo.server.errors import bad_request
from octavo.server.openai.schemas import ChatCompletionRequest, Count, Long

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"_debug_render_only": (False,)}
UNSUPPORTED_CHAT = _UNSUPPORTED
UNSUPPORTED_GENERATE = {**_UNSUPPORTED, "context": ([],), "images": ([],), "suffix": ("",), "template": ("",)}


THINK = ("low", "medium", "high", "max")
_DURATION = re.compile(r"[-+]?(0|((\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h))+)")
"""As Go reads one."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to generate. Whole numbers may be written as 10.0, as many clients' languages do."""

    num_predict: Count | float | None = None
    temperature: float | None = None
    top_k: Count | float | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Long | float | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: Count | float | None = None
    repeat_last_n: Count | float | None = None
    typical_p: float | None = None
    tfs_z: float | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    penalize_newline: bool | None = None
    # These size Ollama's own engine, and have no meaning here.
    num_ctx: Any = None
    draft_num_predict: Any = None
    num_batch: Any = None
    num_keep: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    num_thread: Any = None
    use_mmap: Any = None
    use_mlock: Any = None
    low_vram: Any = None
    f16_kv: Any = None
    numa: Any = None
    vocab_only: Any = None
    logits_all: Any = None
    embedding_only: Any = None

    @property
    def ignored(self) -> tuple[str, ...]:
        """Options that would change the answer, and have no effect."""
        is_penalised = self.repeat_penalty not in (None, 1.0)
        without_effect = (
            ("repeat_last_n", is_penalised and self.repeat_last_n not in (None, 0, -1)),
            ("penalize_newline", is_penalised and self.penalize_newline is False),
            ("typical_p", self.typical_p not in (None, 1.0)),
            ("tfs_z", self.tfs_z not in (None, 1.0)),
        )
        return tuple(f"options.{name}" for name, is_so in without_effect if is_so)

    def fields(self) -> dict[str, Any]:
        """As a chat of OpenAI's has them. Raises `ApiError` 400."""
        if self.mirostat:
            raise bad_request("options.mirostat: not supported.", "options", "unsupported_parameter")
        same = ("temperature", "min_p", "stop", "presence_penalty", "frequency_penalty")
        num_predict, seed, top_k = (self._whole(name) for name in ("num_predict", "seed", "top_k"))
        self._whole("repeat_last_n")
        endless = num_predict is not None and num_predict <= 0  # as much as fits
        return {name: getattr(self, name) for name in same} | {
            "top_k": top_k if self.top_p != 0 else 1,
            "top_p": self.top_p if self.top_p != 0 else None,  # which leaves the likeliest alone
            "seed": None if seed is not None and seed < 0 else seed,  # a new one each time
            "repetition_penalty": None if self.repeat_last_n == 0 else self.repeat_penalty,
            "max_tokens": None if endless else num_predict,
        }

    def _whole(self, name: str) -> int | None:
        value = getattr(self, name)
        if not isinstance(value, float):
            return value  # type: ignore[no-any-return]  # an int, or None
        if not value.is_integer() or abs(value) > 2**31 - 1:
            raise bad_request(f"options.{name} = {value:g}: must be a whole number within 32 bits.", "options")
        return int(value)


class CalledFunction(msgspec.Struct, frozen=True):
    """A call of an earlier turn."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class Called(msgspec.Struct, frozen=True):
    """An entry of `tool_calls`."""

    function: CalledFunction


class Turn(msgspec.Struct, frozen=True):
    """A message."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[Called] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """What both routes have."""

    model: str
    stream: bool | None = None
    options: Options | None = None
    think: bool | str | None = None
    format: msgspec.Raw = msgspec.Raw()
    keep_alive: float | str | None = None
    """Nothing is unloaded, but whoever asks for that is told so."""
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    deadline_ms: Count | None = None

    @property
    def streams(self) -> bool:
        """Unless the client says otherwise."""
        return self.stream is not False

    @property
    def loads(self) -> bool:
        """Whether nothing is to be answered: the client asks for the model to be there, or to be gone."""
        raise NotImplementedError

    @property
    def load_reason(self) -> str:
        """What is answered then."""
        value = self.keep_alive
        is_zero = value == 0 or (isinstance(value, str) and not re.search(r"[1-9]", value))
        return "unload" if is_zero else "load"

    def check(self) -> None:
        """What the struct cannot say. Raises `ApiError` 400."""
        if isinstance(self.keep_alive, str) and not _DURATION.fullmatch(self.keep_alive):
            raise bad_request('keep_alive: must be seconds, or a duration such as "5m" or "-1s".', "keep_alive")
        if isinstance(self.think, str) and self.think not in THINK:
            raise bad_request(f"think: must be true, false or one of {', '.join(THINK)}.", "think")

    @property
    def ignored(self) -> tuple[str, ...]:
        """Options without an effect."""
        return () if self.options is None else self.options.ignored

    def as_chat(self, messages: list[Message], tools: list[msgspec.Raw] | None = None) -> ChatCompletionRequest:
        """The same as a chat of OpenAI's. Raises `ApiError` 400."""
        self.check()
        return ChatCompletionRequest(
            messages=[msgspec.Raw(msgspec.json.encode(message)) for message in messages],
            tools=tools,
            chat_template_kwargs=None if self.think is None else {"enable_thinking": bool(self.think)},
            reasoning_effort=self.think if isinstance(self.think, str) else None,
            structured_outputs=self.wanted_structure(),
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            **(self.options or Options()).fields(),
        )

    def wanted_structure(self) -> msgspec.Raw:
        """`format` as `structured_outputs`: "json" or a schema. Raises `ApiError` 400."""
        if bytes(self.format) in (b"", b"null", b'""'):
            return msgspec.Raw()
        if bytes(self.format) == b'"json"':
            return msgspec.Raw(b'{"json_object": true}')
        if not bytes(self.format).startswith(b"{"):
            raise bad_request('format: must be "json" or a JSON schema, which is an object.', "format")
        return msgspec.Raw(b'{"json": ' + bytes(self.format) + b"}")


class ChatRequest(_Request, frozen=True, kw_only=True):
    """`POST /api/chat`."""

    messages: list[Turn] | None = None
    tools: list[msgspec.Raw] | None = None
    truncate: bool | None = None
    shift: bool | None = None
    """Whatever these say, a conversation that is too long is refused, and an answer ends where the
    context does.
    """

    @property
    def loads(self) -> bool:
        """There is no conversation."""
        return not self.messages

    def to_chat(self) -> ChatCompletionRequest:
        """The same as a chat of OpenAI's. Raises `ApiError` 400."""
        messages = [_message(turn, f"messages[{place}]") for place, turn in enumerate(self.messages or ())]
        return self.as_chat(messages, self.tools)


class GenerateRequest(_Request, frozen=True, kw_only=True):
    """`POST /api/generate`."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    truncate: bool | None = None
    shift: bool | None = None

    @property
    def loads(self) -> bool:
        """There is no prompt."""
        return not self.prompt

    def to_chat(self) -> ChatCompletionRequest:
        """The same as a chat of OpenAI's. Raises `ApiError` 400."""
        system = [Message("system", self.system)] if self.system else []
        return self.as_chat([*system, Message("user", self.prompt or "")])


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/embed`, all but its `input`."""

    model: str
    truncate: bool | None = None
    dimensions: Count | None = None
    options: Options | None = None
    keep_alive: Any = None


class EmbeddingsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/embeddings`, the older route, of one text."""

    model: str
    prompt: str | None = None
    options: Options | None = None
    keep_alive: Any = None


class ShowRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/show`."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


def _message(turn: Turn, where: str) -> Message:
    if turn.images:
        raise bad_request(f"{where}.images: only text is supported.", "messages", "unsupported_content")
    calls = [
        ToolCall(FunctionCall(call.function.name, call.function.arguments), f"call_{place}", "function")
        for place, call in enumerate(turn.tool_calls or ())
    ]
    return Message(
        turn.role,
        turn.content or "",
        name=turn.tool_name,
        tool_calls=calls or None,
        tool_call_id=(turn.tool_call_id or "call_0") if turn.role == "tool" else None,
        reasoning_content=turn.thinking,
    )
