"""What Anthropic's clients send, as msgspec structs, and its translation to a chat of OpenAI's."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from octavo.chat import FunctionCall, Message, Part, ToolCall
from octavo.server.errors import bad_request
from octavo.server.openai.schemas import ChatCompletionRequest, Count
from octavo.server.openai.schemas import ToolChoice as ChatToolChoice

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
}
EFFORTS = ("low", "medium", "high", "xhigh", "max")


class Block(msgspec.Struct, frozen=True):
    """A block of a message's content."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = msgspec.Raw(b"{}")
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None


class Turn(msgspec.Struct, frozen=True):
    """A message."""

    role: str
    content: str | list[Block]


class Tool(msgspec.Struct, frozen=True):
    """A tool that the client runs."""

    name: str
    input_schema: msgspec.Raw = msgspec.Raw(b"null")
    description: str | None = None
    type: str | None = None


class ToolChoice(msgspec.Struct, frozen=True):
    """Whether tools are called."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True):
    """Whether the model reasons."""

    type: str
    budget_tokens: Count | None = None
    display: str | None = None


class OutputConfig(msgspec.Struct, frozen=True):
    """What the answer must look like, and how hard the model tries."""

    effort: str | None = None
    format: msgspec.Raw = msgspec.Raw()


INNER: Mapping[str, type[msgspec.Struct]] = {
    "thinking": Thinking,
    "tool_choice": ToolChoice,
    "output_config": OutputConfig,
}
"""Fields that are objects, whose own fields are known as well."""


class CountRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/messages/count_tokens`, and what is of it in a request for a message."""

    messages: list[Turn]
    model: str | None = None
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: msgspec.Raw = msgspec.Raw()
    """The older name of `output_config.format`."""
    cache_control: dict[str, Any] | None = None
    """What may be cached; every prompt is."""

    def as_chat(self, **fields: Any) -> ChatCompletionRequest:
        """The same as a chat of OpenAI's. Raises `ApiError` 400."""
        messages = [] if self.system is None else [Message("system", self.system_parts())]
        for place, turn in enumerate(self.messages):
            messages += _messages(turn, f"messages[{place}]")
        choice = self.tool_choice
        return ChatCompletionRequest(
            messages=[msgspec.Raw(msgspec.json.encode(message)) for message in messages],
            tools=None if self.tools is None else [_tool(tool, place) for place, tool in enumerate(self.tools)],
            tool_choice=None if choice is None else _choice(choice),
            parallel_tool_calls=None if choice is None else not choice.disable_parallel_tool_use,
            chat_template_kwargs=self.template_kwargs(),
            continue_final_message=bool(self.messages) and self.messages[-1].role == "assistant",
            structured_outputs=self.wanted_structure(),
            reasoning_effort=self.effort(),
            **fields,
        )

    def system_parts(self) -> str | list[Part]:
        """What is said before the conversation."""
        if isinstance(self.system, list):
            return [Part("text", _text(block, f"system[{place}]")) for place, block in enumerate(self.system)]
        return self.system or ""

    def template_kwargs(self) -> dict[str, Any] | None:
        """How templates that know of reasoning call it."""
        if self.thinking is None:
            return None
        if self.thinking.type not in ("enabled", "adaptive", "disabled"):
            raise bad_request("thinking.type: must be enabled, adaptive or disabled.", "thinking")
        if self.thinking.display not in (None, "summarized"):
            raise bad_request(
                "thinking.display: must be summarized; what is thought is told.", "thinking", "unsupported_parameter"
            )
        return {"enable_thinking": self.thinking.type != "disabled"}

    def effort(self) -> str | None:
        """What templates know as `reasoning_effort`."""
        effort = None if self.output_config is None else self.output_config.effort
        if effort not in (None, *EFFORTS):
            raise bad_request(f"output_config.effort: must be one of {', '.join(EFFORTS)}.", "output_config")
        return effort

    def wanted_structure(self) -> msgspec.Raw:
        """The schema of the answer, as `structured_outputs`. Raises `ApiError` 400."""
        for name, given in (
            ("output_config.format", b"" if self.output_config is None else bytes(self.output_config.format)),
            ("output_format", bytes(self.output_format)),
        ):
            if given not in (b"", b"null"):
                return _structure(given, name)
        return msgspec.Raw()


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: Count
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    deadline_ms: Count | None = None
    timing: bool | None = None

    def to_chat(self, *, reasons: bool) -> ChatCompletionRequest:
        """The same as a chat of OpenAI's. Raises `ApiError` 400.

        reasons: the model writes its reasoning apart. A budget for one that does not is kept anyway.
        """
        budget = None if self.thinking is None or self.thinking.type == "disabled" else self.thinking.budget_tokens
        return self.as_chat(
            thinking_token_budget=budget if reasons else None,
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )


def _structure(given: bytes, where: str) -> msgspec.Raw:
    fields = msgspec.json.decode(given)
    if not isinstance(fields, dict) or fields.get("type") != "json_schema":
        raise bad_request(f'{where}: must be {{"type": "json_schema", "schema": {{...}}}}.', where)
    if unknown := next((name for name in fields if name not in ("type", "schema", "name", "strict")), None):
        raise bad_request(f"{where}.{unknown[:50]}: unknown field.", f"{where}.{unknown[:50]}", "unknown_parameter")
    if not isinstance(fields.get("schema"), dict):
        raise bad_request(f"{where}.schema: must be a JSON schema, which is an object.", where, "invalid_schema")
    return msgspec.Raw(msgspec.json.encode({"json": fields["schema"]}))


def _messages(turn: Turn, where: str) -> Iterator[Message]:
    """A turn as messages of OpenAI's: what tools said stands before what the user says."""
    if turn.role not in ("user", "assistant"):
        raise bad_request(f"{where}.role: must be user or assistant.", "messages")
    if isinstance(turn.content, str):
        yield Message(turn.role, turn.content)
        return
    texts: list[Part] = []
    calls: list[ToolCall] = []
    reasoning: list[str] = []
    for place, block in enumerate(turn.content):
        path = f"{where}.content[{place}]"
        if block.type == "tool_result" and turn.role == "user":
            if block.tool_use_id is None:
                raise _missing(f"{path}.tool_use_id")
            yield Message("tool", _result(block, path), tool_call_id=block.tool_use_id)
        elif block.type == "tool_use" and turn.role == "assistant":
            if block.name is None or block.id is None:
                raise _missing(f"{path}.{'name' if block.name is None else 'id'}")
            calls.append(ToolCall(FunctionCall(block.name, block.input), block.id, "function"))
        elif block.type == "thinking" and turn.role == "assistant":
            reasoning.append(block.thinking or "")
        elif block.type != "redacted_thinking":
            texts.append(Part("text", _text(block, path)))
    if turn.role == "assistant":
        yield Message(
            "assistant", texts or None, tool_calls=calls or None, reasoning_content="\n".join(reasoning) or None
        )
    elif texts or not turn.content:
        yield Message("user", texts)


def _result(block: Block, where: str) -> str | list[Part]:
    if isinstance(block.content, list):
        return [Part("text", _text(part, f"{where}.content[{place}]")) for place, part in enumerate(block.content)]
    return block.content or ""


def _text(block: Block, where: str) -> str:
    if block.type != "text":
        raise bad_request(
            f"{where}.type: {block.type[:50]!r} is not supported here.", "messages", "unsupported_content"
        )
    if block.text is None:
        raise _missing(f"{where}.text")
    return block.text


def _missing(where: str) -> Exception:
    return bad_request(f"{where}: this field is required.", "messages", "missing_required_parameter")


def _tool(tool: Tool, place: int) -> msgspec.Raw:
    """A tool as OpenAI has it."""
    if tool.type not in (None, "custom"):
        raise bad_request(f"tools[{place}].type: only custom tools are supported.", "tools", "unsupported_parameter")
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema
    return msgspec.Raw(msgspec.json.encode({"type": "function", "function": function}))


def _choice(choice: ToolChoice) -> str | ChatToolChoice:
    words = {"auto": "auto", "any": "required", "none": "none"}
    if choice.type == "tool":
        if choice.name is None:
            raise bad_request("tool_choice.name: required when type is tool.", "tool_choice")
        return ChatToolChoice.of(choice.name)
    if choice.type not in words:
        raise bad_request("tool_choice.type: must be auto, any, tool or none.", "tool_choice")
    return words[choice.type]
