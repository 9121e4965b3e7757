"""From the messages and tools of a chat to the JSON that the chat template sees.

Content parts are joined to one text, `developer` becomes `system` (templates know only that), and
the arguments of earlier tool calls become objects, as templates of Hugging Face expect them. Tools
stay as they are. Knows nothing of templates themselves, nor of HTTP.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from octavo import _core

T = TypeVar("T")

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_MESSAGES = 2048
MAX_PARTS = 256
MAX_TOOLS = 256
MAX_DEPTH = 64
"""Of the arguments of a call; the template gets deeper ones as text."""
MAX_VALUES = 65_536
"""Keys and values of the arguments of a call: they are JSON in a text, which is made into objects."""


class ChatError(ValueError):
    """A conversation or a tool that cannot be used. `param` is `messages` or `tools`; `code` is a
    stable word.
    """

    def __init__(self, message: str, param: str = "messages", code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class FunctionCall(msgspec.Struct, frozen=True):
    """A call that the assistant made in an earlier turn."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b'""')  # text, which should be an object's JSON, or an object


class ToolCall(msgspec.Struct, frozen=True):
    """One entry of an assistant turn's `tool_calls`."""

    function: FunctionCall
    id: str | None = None
    type: str | None = None


class Part(msgspec.Struct, frozen=True):
    """A piece of a message's content: text, or what the assistant said instead of an answer."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None


class _ReceivedPart(Part, frozen=True):
    """A part whose texts stay JSON, which nobody has to decode: they may have millions of letters."""

    text: msgspec.Raw = msgspec.Raw(b"null")  # type: ignore[assignment]
    refusal: msgspec.Raw = msgspec.Raw(b"null")  # type: ignore[assignment]


class _ReceivedMessage(Message, frozen=True):
    """A message whose content stays JSON."""

    content: msgspec.Raw = msgspec.Raw(b"null")  # type: ignore[assignment]


class Function(msgspec.Struct, frozen=True):
    """What of a tool's function is checked."""

    name: str
    description: str | None = None
    parameters: msgspec.Raw = msgspec.Raw(b"null")
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """What of a tool is checked."""

    type: str
    function: Function


class _Conversation(msgspec.Struct, frozen=True):
    messages: list[msgspec.Raw]
    tools: list[msgspec.Raw] | None = None


def template_messages(messages: Sequence[msgspec.Raw], max_parts: int = MAX_PARTS) -> list[dict[str, Any]]:
    """The conversation for the template. Keys of a message that nobody checks stay as they are.

    max_parts: of a message's content.

    Raises `ChatError`, and `msgspec.ValidationError` whose path begins with `$.messages`.
    """
    if not messages:
        raise ChatError("messages: must not be empty.")
    if len(messages) > MAX_MESSAGES:
        raise ChatError(f"messages: {len(messages)} messages, at most {MAX_MESSAGES} are allowed.")
    return [_message(message, f"messages[{index}]", max_parts) for index, message in enumerate(messages)]


def template_tools(tools: Sequence[msgspec.Raw] | None, takes_tools: bool) -> bytes | None:
    """The tools as JSON, every key in its place, or None without any.

    takes_tools: the model's template has a place for them. Raises `ChatError`, and
    `msgspec.ValidationError` whose path begins with `$.tools`.
    """
    if not tools:
        return None
    if len(tools) > MAX_TOOLS:
        raise _bad_tools(f"tools: {len(tools)} tools, at most {MAX_TOOLS} are allowed.")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        _check_tool(tool, f"tools[{index}]", names)
    if not takes_tools:
        raise _bad_tools(
            "tools: the model's chat template has no place for them; leave them out, or name another template with "
            "--chat-template.",
            "unsupported_tools",
        )
    return b"[" + b",".join(bytes(tool) for tool in tools) + b"]"


def read_chat(
    messages: Sequence[Any], tools: Sequence[dict[str, Any]] | None, takes_tools: bool
) -> tuple[bytes, bytes | None]:
    """Messages and tools of a caller in Python, checked, as JSON for the template. Raises
    `ChatError`.
    """
    try:
        # In the way that requests come, so that they are checked in the same way.
        body = json.dumps({"messages": messages, "tools": tools or None}, allow_nan=False)
        chat = msgspec.json.decode(body, type=_Conversation)
        tools_json = template_tools(chat.tools, takes_tools)
        checked = template_messages(chat.messages)
    except ChatError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise ChatError(f"messages or tools: {error}", "tools" if "$.tools" in str(error) else "messages") from None
    return msgspec.json.encode(checked), tools_json


def _bad_tools(message: str, code: str = "invalid_value") -> ChatError:
    return ChatError(message, "tools", code)


def _message(raw: msgspec.Raw, where: str, max_parts: int) -> dict[str, Any]:
    message = _decode(raw, _ReceivedMessage, where)
    content = bytes(message.content)
    if not content.startswith((b'"', b"[", b"null")):
        _decode(raw, Message, where)  # says what is wrong
    if message.role not in ROLES:
        raise ChatError(f"{where}.role: must be one of {', '.join(ROLES)}.")
    if message.role == "tool" and message.tool_call_id is None:
        raise ChatError(f"{where}.tool_call_id: required when role is tool.", code="missing_required_parameter")
    if content == b"null" and message.role != "assistant":
        raise ChatError(f"{where}.content: required when role is {message.role}.", code="missing_required_parameter")
    result: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if content.startswith(b"["):
        result["content"] = _joined(raw, content, where, max_parts)
    else:  # a refusal is what the assistant said instead
        result["content"] = (message.refusal or "") if content in (b"null", b'""') else message.content
    others = _decode(raw, dict[str, msgspec.Raw], where)
    if (reasoning := message.reasoning_content or _text_in(others.get("reasoning"))) is not None:
        result["reasoning_content"] = reasoning
    if message.name is not None:
        result["name"] = message.name
    if message.tool_calls:
        result["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result | {key: value for key, value in others.items() if key not in Message.__struct_fields__}


def _text_in(value: msgspec.Raw | None) -> str | None:
    """A text, where it is one."""
    given = None if value is None else msgspec.json.decode(value)
    return given if isinstance(given, str) else None


def _joined(raw: msgspec.Raw, content: bytes, where: str, max_parts: int) -> msgspec.Raw:
    """The texts of a message's parts, a line break between each two."""
    parts = _decode(msgspec.Raw(content), list[_ReceivedPart], f"{where}.content")
    if len(parts) > max_parts:
        raise ChatError(f"{where}.content: {len(parts)} parts, at most {max_parts} are allowed.")
    texts = []
    for index, part in enumerate(parts):
        if part.type not in ("text", "refusal"):
            raise ChatError(
                f"{where}.content[{index}].type: only text parts are supported.", code="unsupported_content"
            )
        said, refused = bytes(part.text), bytes(part.refusal)
        if not (said.startswith((b'"', b"null")) and refused.startswith((b'"', b"null"))):
            _decode(raw, Message, where)  # says what is wrong
        text = said if part.type == "text" else refused
        if text == b"null":
            raise ChatError(
                f"{where}.content[{index}].{part.type}: this field is required.", code="missing_required_parameter"
            )
        texts.append(text[1:-1])
    return msgspec.Raw(b'"' + b"\\n".join(texts) + b'"')


def _tool_call(call: ToolCall, where: str) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": call.type or "function",
        "function": {
            "name": call.function.name,
            "arguments": _arguments(call.function.arguments, f"{where}.function.arguments"),
        },
    }


def _arguments(given: msgspec.Raw, where: str) -> msgspec.Raw | str:
    """An object as its JSON was written, so that no number changes; letters stand for themselves. What
    the model wrote in place of one is text: it may have been wrong, and goes on from there.
    """
    first = bytes(memoryview(given)[:1])
    if first == b"{":
        return given
    if first != b'"':
        if first == b"n":
            return msgspec.Raw(b"{}")
        raise ChatError(f"{where}: must be text or an object.", code="invalid_type")
    text = msgspec.json.decode(given, type=str)
    encoded = _core.resolve_escapes(text.encode()) or b"{}"
    try:
        _core.measure_body(encoded, max_depth=MAX_DEPTH, max_fields=MAX_VALUES, max_values=MAX_VALUES)
        msgspec.json.decode(encoded, type=dict[str, Any])
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        if isinstance(error, _core.RefusedError) and error.code == "too_many_values":
            raise ChatError(f"{where}: {error}", code=error.code) from None
        return text
    return msgspec.Raw(encoded)


def _check_tool(raw: msgspec.Raw, where: str, names: set[str]) -> None:
    """Raises where it cannot be used. names: those of the tools before it, to which its own is
    added.
    """
    tool = _decode(raw, Tool, where)
    if tool.type != "function":
        raise _bad_tools(f"{where}.type: must be function.")
    if bytes(memoryview(tool.function.parameters)[:1]) not in (b"{", b"n"):
        raise _bad_tools(f"{where}.function.parameters: must be an object.", "invalid_type")
    name = tool.function.name
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise _bad_tools(f"{where}.function.name: 1 to 64 letters, digits, _ or -.")
    if name in names:
        raise _bad_tools(f"{where}.function.name: two tools are called {name}.")
    names.add(name)


def _decode(raw: msgspec.Raw, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise msgspec.ValidationError(_moved(str(error), where)) from None


def _moved(text: str, where: str) -> str:
    """msgspec's message with the path of what was decoded put before its own."""
    what, separator, path = text.partition(" - at `$")
    return f"{what} - at `$.{where}{path if separator else '`'}"
