"""A chat request's way to the chat template, with errors as HTTP answers have them.

What a conversation may be stands in `octavo.chat`.
"""

from collections.abc import Collection
from typing import Any

import msgspec

from octavo import chat
from octavo.answers import ToolUse
from octavo.server.body import from_validation
from octavo.server.errors import bad_request
from octavo.server.limits import Limits
from octavo.server.openai.schemas import ChatCompletionRequest, NamedFunction, ToolChoice
from octavo.server.openai.tool_schema import check_schema

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


def template_messages(request: ChatCompletionRequest, limits: Limits) -> list[dict[str, Any]]:
    """The conversation for the template. Raises `ApiError` 400 with param `messages`, or `tools` where there
    are too many.
    """
    limits.check_chat(len(request.messages), len(request.tools or ()))
    try:
        return chat.template_messages(request.messages, limits.max_message_parts)
    except chat.ChatError as error:
        raise bad_request(str(error), error.param, error.code) from None
    except msgspec.ValidationError as error:
        raise from_validation(str(error)) from None


def template_tools(request: ChatCompletionRequest, takes_tools: bool) -> bytes | None:
    """The tools that may be called as JSON, or None without any. Raises `ApiError` 400 with param `tools`, or
    `tool_choice` where it allows one that is not there.

    takes_tools: the model's template has a place for them. Where it has none, only tools that must
    not be called may be left out.
    """
    try:
        tools = chat.template_tools(request.tools, takes_tools or request.tool_choice == "none")
    except chat.ChatError as error:
        raise bad_request(str(error), error.param, error.code) from None
    except msgspec.ValidationError as error:
        raise from_validation(str(error)) from None
    for index, tool in enumerate(request.tools or ()):
        parameters = msgspec.json.decode(msgspec.json.decode(tool, type=chat.Tool).function.parameters)
        if parameters is not None:
            check_schema(parameters, f"tools[{index}].function.parameters")
    if not takes_tools:
        return None
    if isinstance(request.tool_choice, ToolChoice) and request.tool_choice.allowed_tools is not None:
        return b"[" + b",".join(bytes(tool) for tool in allowed_tools(request)) + b"]"
    return tools


def allowed_tools(request: ChatCompletionRequest) -> list[msgspec.Raw]:
    """Those of the tools, which are checked, that may be called. Raises `ApiError` 400 with param
    `tool_choice`.
    """
    tools = {_name(tool): tool for tool in request.tools or ()}
    if not isinstance(request.tool_choice, ToolChoice) or (allowed := request.tool_choice.allowed_tools) is None:
        return list(tools.values())
    names = set()
    for place, tool in enumerate(allowed.tools):
        if tool.type != "function":
            raise bad_request(f"tool_choice: the type of tools[{place}] must be function.", "tool_choice")
        _check_named(tool.function.name, tools)
        names.add(tool.function.name)
    if not names:
        raise bad_request("tool_choice: tools must have at least one tool.", "tool_choice")
    return [tool for name, tool in tools.items() if name in names]


def _name(tool: msgspec.Raw) -> str:
    return msgspec.json.decode(tool, type=chat.Tool).function.name


def tool_use(request: ChatCompletionRequest) -> ToolUse:
    """What the request wants of its tools, which `template_tools` has checked. Raises `ApiError` 400
    with param `tool_choice`.
    """
    names = [_name(tool) for tool in allowed_tools(request)]
    mode, named = _mode(request.tool_choice)
    if named is not None:
        _check_named(named, names)
    if mode == "required" and not names:
        raise bad_request("tool_choice: needs tools.", "tool_choice")
    return ToolUse(
        names,
        forbidden=mode == "none",
        parallel=request.parallel_tool_calls is not False,
        required=mode == "required",
        named=named,
    )


def _mode(choice: str | ToolChoice | None) -> tuple[str | None, str | None]:
    """Whether tools are called (`none`, `auto`, `required`), or else the name of the one that is."""
    if not isinstance(choice, ToolChoice):
        if choice not in (None, "none", "auto", "required"):
            raise bad_request("tool_choice: must be none, auto, required, or name a tool.", "tool_choice")
        return choice, None
    if choice.type not in ("function", "allowed_tools"):
        raise bad_request("tool_choice.type: must be function or allowed_tools.", "tool_choice")
    given = choice.function if choice.type == "function" else choice.allowed_tools
    if given is None:
        raise bad_request(
            f"tool_choice.{choice.type}: required when type is {choice.type}.",
            "tool_choice",
            "missing_required_parameter",
        )
    if isinstance(given, NamedFunction):
        return None, given.name
    if given.mode not in ("auto", "required"):
        raise bad_request("tool_choice: mode must be auto or required.", "tool_choice")
    return given.mode, None


def _check_named(name: str, tools: Collection[str]) -> None:
    if name not in tools:
        raise bad_request(f"tool_choice: no tool is called {name[:64]!r}.", "tool_choice")


def template_kwargs(request: ChatCompletionRequest) -> bytes | None:
    """Further variables of the template. What the renderer itself sets, and Python's own names, are
    refused.
    """
    ours: dict[str, Any] = {} if request.documents is None else {"documents": request.documents}
    if request.reasoning_effort is not None:
        ours["reasoning_effort"] = request.reasoning_effort
    kwargs = request.chat_template_kwargs or {}
    for name in kwargs:
        if name in _RESERVED_KWARGS or name.startswith("_") or not name.isidentifier():
            raise bad_request(f"chat_template_kwargs: {name[:50]!r} cannot be set by clients.", "chat_template_kwargs")
    return msgspec.json.encode(ours | kwargs) if ours or kwargs else None
