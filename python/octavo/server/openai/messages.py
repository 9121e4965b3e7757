"""From the messages and tools of a chat request to the JSON that the chat template sees.

Content parts are joined to one text, `developer` becomes `system` (templates know only that), and
the arguments of earlier tool calls become objects, as templates of Hugging Face expect them. Knows
nothing of templates themselves.
"""

import re
from typing import Any

import msgspec

from octavo.server.body import MAX_DEPTH, nesting
from octavo.server.errors import bad_request
from octavo.server.openai.schemas import ChatCompletionRequest, Message, Tool, ToolCall

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_MESSAGES = 2048
MAX_PARTS = 256
MAX_TOOLS = 256

_RESERVED_KWARGS = frozenset(
    (
        "messages",
        "tools",
        "add_generation_prompt",
        "tokenize",
        "chat_template",
        "bos_token",
        "eos_token",
        "documents",
        "raise_exception",
        "strftime_now",
        "return_dict",
        "continue_final_message",
    )
)


def template_messages(request: ChatCompletionRequest) -> list[dict[str, Any]]:
    """The conversation for the template. Raises `ApiError` 400 with param `messages`."""
    messages = request.messages
    if not messages:
        raise _bad("messages: must not be empty.")
    if len(messages) > MAX_MESSAGES:
        raise _bad(f"messages: {len(messages)} messages, at most {MAX_MESSAGES} are allowed.")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _bad(message: str, code: str = "invalid_value") -> Exception:
    return bad_request(message, "messages", code)


def _message(message: Message, where: str) -> dict[str, Any]:
    if message.role not in ROLES:
        raise _bad(f"{where}.role: must be one of {', '.join(ROLES)}.")
    if message.role == "tool" and message.tool_call_id is None:
        raise _bad(f"{where}.tool_call_id: required when role is tool.", "missing_required_parameter")
    if message.content is None and message.role != "assistant":
        raise _bad(f"{where}.content: required when role is {message.role}.", "missing_required_parameter")
    result: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    result["content"] = _text(message, where)
    if message.name is not None:
        result["name"] = message.name
    if message.tool_calls:
        result["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result


def _text(message: Message, where: str) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    if len(message.content) > MAX_PARTS:
        raise _bad(f"{where}.content: {len(message.content)} parts, at most {MAX_PARTS} are allowed.")
    for index, part in enumerate(message.content):
        if part.type != "text":
            raise _bad(f"{where}.content[{index}].type: only text parts are supported.", "unsupported_content")
        if part.text is None:
            raise _bad(f"{where}.content[{index}].text: this field is required.", "missing_required_parameter")
    return "\n".join(part.text or "" for part in message.content)


def _tool_call(call: ToolCall, where: str) -> dict[str, Any]:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        text = arguments.encode()
        try:
            if nesting(text) > MAX_DEPTH:
                raise ValueError
            arguments = msgspec.json.decode(text or b"{}", type=dict[str, Any])
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
            raise _bad(f"{where}.function.arguments: must be the JSON text of an object.") from None
    return {
        "id": call.id,
        "type": call.type or "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def template_tools(tools: list[Tool] | None) -> str | None:
    """The tools as JSON, or None without any. Raises `ApiError` 400 with param `tools`."""
    if not tools:
        return None
    if len(tools) > MAX_TOOLS:
        raise bad_request(f"tools: {len(tools)} tools, at most {MAX_TOOLS} are allowed.", "tools")
    names = set()
    for index, tool in enumerate(tools):
        if tool.type != "function":
            raise bad_request(f"tools[{index}].type: must be function.", "tools")
        name = tool.function.name
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise bad_request(f"tools[{index}].function.name: 1 to 64 letters, digits, _ or -.", "tools")
        if name in names:
            raise bad_request(f"tools[{index}].function.name: two tools are called {name}.", "tools")
        names.add(name)
    return msgspec.json.encode(tools).decode()


def template_kwargs(kwargs: dict[str, Any] | None) -> str | None:
    """Further variables of the template. What the renderer itself sets, and Python's own names, are
    refused.
    """
    if not kwargs:
        return None
    for name in kwargs:
        if name in _RESERVED_KWARGS or name.startswith("_") or not name.isidentifier():
            raise bad_request(f"chat_template_kwargs: {name[:50]!r} cannot be set by clients.", "chat_template_kwargs")
    return msgspec.json.encode(kwargs).decode()
