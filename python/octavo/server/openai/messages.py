"""A chat request's way to the chat template, with errors as HTTP answers have them.

What a conversation may be stands in `octavo.chat`.
"""

from typing import Any

import msgspec

from octavo import chat
from octavo.answers import ToolUse
from octavo.server.body import from_validation
from octavo.server.errors import bad_request
from octavo.server.limits import Limits
from octavo.server.openai.schemas import ChatCompletionRequest, NamedTool
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


def template_tools(request: ChatCompletionRequest, takes_tools: bool) -> str | None:
    """The tools as JSON, or None without any. Raises `ApiError` 400 with param `tools`.

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
        parameters = msgspec.json.decode(tool)["function"].get("parameters")
        if parameters is not None:
            check_schema(parameters, f"tools[{index}].function.parameters")
    return tools if takes_tools else None


def tool_use(request: ChatCompletionRequest) -> ToolUse:
    """What the request wants of its tools, which `template_tools` has checked. Raises `ApiError` 400
    with param `tool_choice`.
    """
    names = [msgspec.json.decode(tool)["function"]["name"] for tool in request.tools or ()]
    choice = request.tool_choice
    if isinstance(choice, NamedTool):
        if choice.type != "function":
            raise bad_request("tool_choice.type: must be function.", "tool_choice")
        if choice.function.name not in names:
            raise bad_request(f"tool_choice: no tool is called {choice.function.name[:64]!r}.", "tool_choice")
    elif choice not in (None, "none", "auto", "required"):
        raise bad_request("tool_choice: must be none, auto, required, or name a tool.", "tool_choice")
    if choice == "required" and not names:
        raise bad_request("tool_choice: needs tools.", "tool_choice")
    return ToolUse(
        names,
        forbidden=choice == "none",
        parallel=request.parallel_tool_calls is not False,
        required=choice == "required",
        named=choice.function.name if isinstance(choice, NamedTool) else None,
    )


def template_kwargs(request: ChatCompletionRequest) -> str | None:
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
    return msgspec.json.encode(ours | kwargs).decode() if ours or kwargs else None
