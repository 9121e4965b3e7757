"""What Ollama's clients send, as msgspec structs, and its translation to a chat of OpenAI's."""

from typing import Any

import msgspec

from octavo.chat import FunctionCall, Message, ToolCall
from octavo.server.errors import bad_request
from octavo.server.openai.schemas import ChatCompletionRequest, Count, Long

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"logprobs": (False,), "top_logprobs": (0,)}
UNSUPPORTED_CHAT = _UNSUPPORTED
UNSUPPORTED_GENERATE = {**_UNSUPPORTED, "context": ([],), "images": ([],), "suffix": ("",), "template": ("",)}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to generate. Options that size Ollama's own engine, such as `num_ctx` and `num_gpu`, have no
    meaning here.
    """

    num_predict: Count | None = None
    temperature: float | None = None
    top_k: Count | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Long | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: Count | None = None

    def fields(self) -> dict[str, Any]:
        """As a chat of OpenAI's has them. Raises `ApiError` 400."""
        if self.mirostat:
            raise bad_request("options.mirostat: not supported.", "options", "unsupported_parameter")
        same = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")
        endless = self.num_predict is not None and self.num_predict < 0  # -1 and -2: as much as fits
        return {name: getattr(self, name) for name in same} | {
            "repetition_penalty": self.repeat_penalty,
            "max_tokens": None if endless else self.num_predict,
        }


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
    content: str = ""
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
    keep_alive: Any = None
    deadline_ms: Count | None = None

    @property
    def streams(self) -> bool:
        """Unless the client says otherwise."""
        return self.stream is not False

    def as_chat(self, messages: list[Message], tools: list[msgspec.Raw] | None = None) -> ChatCompletionRequest:
        """The same as a chat of OpenAI's. Raises `ApiError` 400."""
        return ChatCompletionRequest(
            messages=[msgspec.Raw(msgspec.json.encode(message)) for message in messages],
            tools=tools,
            chat_template_kwargs=None if self.think is None else {"enable_thinking": bool(self.think)},
            structured_outputs=self.wanted_structure(),
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

    def to_chat(self) -> ChatCompletionRequest:
        """The same as a chat of OpenAI's. Raises `ApiError` 400."""
        messages = [_message(turn, f"messages[{place}]") for place, turn in enumerate(self.messages or ())]
        return self.as_chat(messages, self.tools)


class GenerateRequest(_Request, frozen=True, kw_only=True):
    """`POST /api/generate`."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None

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
        turn.content,
        name=turn.tool_name,
        tool_calls=calls or None,
        tool_call_id=(turn.tool_call_id or "call_0") if turn.role == "tool" else None,
        reasoning_content=turn.thinking,
    )
