"""What a response's `input` holds, as msgspec structs, and its translation to the messages of a chat.

Reasoning, text and calls of functions are items of their own; a chat has them in one message of the
assistant's.
"""

from collections.abc import Sequence

import msgspec

from octavo.chat import FunctionCall, Message, ToolCall
from octavo.chat import Part as ChatPart
from octavo.server.errors import ApiError, bad_request

ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


class Part(msgspec.Struct, frozen=True):
    """A part of a message, of reasoning, or of what a function gave."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(msgspec.Struct, frozen=True):
    """A message, a call of a function, its output, or reasoning."""

    type: str | None = None
    role: str | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: list[Part] | None = None


def messages_of(given: str | Sequence[Item], instructions: str | None) -> list[Message]:
    """The conversation, after what `instructions` say. Raises `ApiError` 400 that names the item."""
    messages = [] if instructions is None else [Message("system", instructions)]
    if isinstance(given, str):
        return [*messages, Message("user", given)]
    if not given:
        raise bad_request("input: must not be empty.", "input")
    turn = _AssistantTurn()
    for place, item in enumerate(given):
        where = f"input[{place}]"
        kind = item.type or ("message" if item.role is not None else None)
        if kind == "reasoning":
            messages += turn.ended_unless(turn.is_new)
            turn.reasoning.append(_reasoning(item, where))
        elif kind == "function_call":
            turn.calls.append(_call(item, where))
        elif kind == "message" and item.role == "assistant":
            messages += turn.ended_unless(not turn.has_spoken)
            turn.parts = _content(item, where)
        else:
            messages += turn.ended_unless(False)
            messages.append(_other(item, kind, where))
    return [*messages, *turn.ended_unless(False)]


class _AssistantTurn:
    """Items that make one message of the assistant's."""

    def __init__(self) -> None:
        self.reasoning: list[str] = []
        self.parts: str | list[ChatPart] | None = None
        self.calls: list[ToolCall] = []

    @property
    def has_spoken(self) -> bool:
        return self.parts is not None or bool(self.calls)

    @property
    def is_new(self) -> bool:
        """Nothing but reasoning is here."""
        return not self.has_spoken

    def ended_unless(self, goes_on: bool) -> list[Message]:
        """The message, where the turn does not go on; then the next one begins."""
        if goes_on or not (self.has_spoken or self.reasoning):
            return []
        reasoning = "\n".join(self.reasoning) or None
        message = Message("assistant", self.parts, tool_calls=self.calls or None, reasoning_content=reasoning)
        self.__init__()  # type: ignore[misc]
        return [message]


def _other(item: Item, kind: str | None, where: str) -> Message:
    if kind == "function_call_output":
        if item.call_id is None:
            raise _missing(f"{where}.call_id")
        if item.output is None:
            raise _missing(f"{where}.output")
        return Message("tool", _texts(item.output, f"{where}.output"), tool_call_id=item.call_id)
    if kind == "message":
        if item.role is None:
            raise _missing(f"{where}.role")
        if item.role not in ROLES:
            raise bad_request(f"{where}.role: must be one of {', '.join(ROLES)}.", "input")
        return Message(item.role, _content(item, where))
    if kind is None:
        raise _missing(f"{where}.type")
    if kind == "item_reference":
        raise bad_request(
            f"{where}.type: item_reference names what is stored, and nothing is stored here; send the item itself.",
            "input",
            "unsupported_content",
        )
    raise bad_request(
        f"{where}.type: {kind[:50]!r} is not supported here; message, reasoning, function_call and "
        "function_call_output are.",
        "input",
        "unsupported_content",
    )


def _call(item: Item, where: str) -> ToolCall:
    for field in ("call_id", "name", "arguments"):
        if getattr(item, field) is None:
            raise _missing(f"{where}.{field}")
    arguments = msgspec.Raw(msgspec.json.encode(item.arguments))
    return ToolCall(FunctionCall(item.name or "", arguments), item.call_id, "function")


def _reasoning(item: Item, where: str) -> str:
    """What was thought, or where that is not told, its summary."""
    if isinstance(item.content, str):
        return item.content
    parts, field = (item.content, "content") if item.content else (item.summary or [], "summary")
    return "\n".join(_text(part, f"{where}.{field}[{place}]") for place, part in enumerate(parts))


def _content(item: Item, where: str) -> str | list[ChatPart]:
    if item.content is None:
        raise _missing(f"{where}.content")
    return _texts(item.content, f"{where}.content")


def _texts(content: str | list[Part], where: str) -> str | list[ChatPart]:
    if isinstance(content, str):
        return content
    return [ChatPart("text", _text(part, f"{where}[{place}]")) for place, part in enumerate(content)]


def _text(part: Part, where: str) -> str:
    if part.type not in (*_TEXTS, "refusal"):
        raise bad_request(f"{where}.type: {part.type[:50]!r} is not supported here.", "input", "unsupported_content")
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise _missing(f"{where}.{'refusal' if part.type == 'refusal' else 'text'}")
    return text


def _missing(where: str) -> ApiError:
    return bad_request(f"{where}: this field is required.", "input", "missing_required_parameter")
