"""What clients send to `/v1/responses`, as a msgspec struct, its translation to a chat of OpenAI's, and
what a response says of it.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from octavo.sampling_params import SamplingParams
from octavo.server.errors import bad_request
from octavo.server.openai.schemas import AllowedTool, AllowedTools, ChatCompletionRequest, Count, Long, NamedFunction
from octavo.server.openai.schemas import ToolChoice as ChatToolChoice
from octavo.server.responses.items import Item, messages_of

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "prompt": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
NAMES = {
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "prompt": "input",
}
"""What a request calls the fields of the chat that is made of it."""
_STORED = "nothing is stored here; send the earlier items in input."
_SHARED = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
           "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos", "include_stop_str_in_output",
           "skip_special_tokens", "logit_bias", "allowed_token_ids", "bad_words",
           "thinking_token_budget", "parallel_tool_calls")  # fmt: skip


class Reasoning(msgspec.Struct, frozen=True):
    """How much the model is to reason."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class Text(msgspec.Struct, frozen=True):
    """What the answer must look like."""

    format: msgspec.Raw = msgspec.Raw()
    verbosity: str | None = None


class StreamOptions(msgspec.Struct, frozen=True):
    """Of a stream's events, which are not padded."""

    include_obfuscation: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """A function that the client runs."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: msgspec.Raw = msgspec.Raw(b"null")
    strict: bool | None = None


class Chosen(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function, by its name."""

    type: str
    name: str | None = None


class ToolChoice(Chosen, frozen=True, omit_defaults=True):
    """The function that must be called, or those that may be."""

    mode: str | None = None
    tools: list[Chosen] | None = None


INNER: Mapping[str, type[msgspec.Struct]] = {
    "reasoning": Reasoning,
    "text": Text,
    "stream_options": StreamOptions,
    "tool_choice": ToolChoice,
}
"""Fields that are objects, whose own fields are known as well."""


class InputRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/responses/input_tokens`, and what is of it in a request for a response."""

    input: str | list[Item] | None = None
    model: str | None = None
    instructions: str | None = None
    tools: list[Tool] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def as_chat(self, **fields: Any) -> ChatCompletionRequest:
        """The same as a chat of OpenAI's. Raises `ApiError` 400 that names the field."""
        if self.previous_response_id is not None:
            raise bad_request(f"previous_response_id: {_STORED}", "previous_response_id", "unsupported_parameter")
        if self.conversation is not None:
            raise bad_request(f"conversation: {_STORED}", "conversation", "unsupported_parameter")
        if self.input is None:
            raise bad_request("input: this field is required.", "input", "missing_required_parameter")
        messages = messages_of(self.input, self.instructions)
        return ChatCompletionRequest(
            messages=[msgspec.Raw(msgspec.json.encode(message)) for message in messages],
            tools=None if self.tools is None else [_tool(tool, place) for place, tool in enumerate(self.tools)],
            tool_choice=self._choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self._response_format(),
            chat_template_kwargs=self._template_kwargs(),
            **fields,
        )

    def _choice(self) -> str | ChatToolChoice | None:
        choice = self.tool_choice
        if not isinstance(choice, ToolChoice):
            return choice
        if choice.type != "allowed_tools":
            return ChatToolChoice.of(_chosen(choice, "tool_choice", "function and allowed_tools are"))
        for field in ("mode", "tools"):
            if getattr(choice, field) is None:
                raise bad_request(
                    f"tool_choice.{field}: required when type is allowed_tools.",
                    "tool_choice",
                    "missing_required_parameter",
                )
        names = [
            _chosen(tool, f"tool_choice.tools[{place}]", "function is") for place, tool in enumerate(choice.tools or ())
        ]
        tools = [AllowedTool("function", NamedFunction(name)) for name in names]
        return ChatToolChoice("allowed_tools", allowed_tools=AllowedTools(choice.mode or "", tools))

    def _response_format(self) -> msgspec.Raw:
        """`text.format`, whose schema stands beside its type and not below it."""
        given = msgspec.Raw() if self.text is None else self.text.format
        if bytes(memoryview(given)[:1]) != b"{":
            return given
        fields = msgspec.json.decode(given, type=dict[str, msgspec.Raw])
        if bytes(fields.get("type", b"")) != b'"json_schema"' or "json_schema" in fields or "value" in fields:
            return given
        if "schema" not in fields:
            raise bad_request("text.format.schema: is missing.", "text.format.schema")
        kind = fields.pop("type")
        return msgspec.Raw(msgspec.json.encode({"type": kind, "json_schema": fields}))

    def _template_kwargs(self) -> dict[str, Any] | None:
        """How templates that know of reasoning call it."""
        effort = None if self.reasoning is None else self.reasoning.effort
        if effort is None:
            return self.chat_template_kwargs
        if effort not in EFFORTS:
            raise bad_request(f"reasoning.effort: must be one of {', '.join(EFFORTS)}.", "reasoning")
        ours = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return ours | (self.chat_template_kwargs or {})


class ResponsesRequest(InputRequest, frozen=True, kw_only=True):
    """`POST /v1/responses`."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: Count | None = None
    max_tool_calls: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    top_k: Count | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Long | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Long] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[Long, float] | None = None
    allowed_token_ids: list[Long] | None = None
    bad_words: list[str] | None = None
    thinking_token_budget: Long | None = None
    priority: Count | None = None
    cache_salt: str | None = None
    deadline_ms: Count | None = None
    timing: bool | None = None

    def to_chat(self) -> ChatCompletionRequest:
        """The same as a chat of OpenAI's. Raises `ApiError` 400 that names the field."""
        for place, name in enumerate(self.include or ()):
            if name != "reasoning.encrypted_content":  # there is none, since nothing is hidden
                raise bad_request(
                    f"include[{place}]: {name[:100]!r} is not supported here.", "include", "unsupported_parameter"
                )
        shared = {name: getattr(self, name) for name in _SHARED if name not in InputRequest.__struct_fields__}
        return self.as_chat(max_tokens=self.max_output_tokens, **shared)

    def told(self, params: SamplingParams) -> str:
        """What a response says of its request, as the JSON of an object. params: as they were used."""
        text: dict[str, Any] = {"format": {"type": "text"}}
        if self.text is not None and bytes(self.text.format) not in (b"", b"null"):
            text["format"] = self.text.format
        if self.text is not None and self.text.verbosity is not None:
            text["verbosity"] = self.text.verbosity
        reasoning = self.reasoning or Reasoning()
        choice = self.tool_choice
        fields = {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary or reasoning.generate_summary},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": text,
            "tool_choice": "auto" if choice is None else choice,
            "tools": self.tools or [],
            "top_logprobs": 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "user": self.user,
        }
        return msgspec.json.encode(fields).decode()


def _chosen(choice: Chosen, where: str, supported: str) -> str:
    """The name of a function. Raises `ApiError` 400 where it is something else."""
    if choice.type != "function":
        raise bad_request(
            f"{where}.type: {choice.type[:50]!r} is not supported here; {supported}.",
            "tool_choice",
            "unsupported_parameter",
        )
    if choice.name is None:
        raise bad_request(f"{where}.name: required when type is function.", "tool_choice")
    return choice.name


def _tool(tool: Tool, place: int) -> msgspec.Raw:
    """A tool as chats have it: what describes the function stands in an object of its own."""
    if tool.type != "function":
        raise bad_request(
            f"tools[{place}].type: {tool.type[:50]!r} is not supported here; only functions are.",
            "tools",
            "unsupported_parameter",
        )
    if tool.name is None:
        raise bad_request(f"tools[{place}].name: this field is required.", "tools", "missing_required_parameter")
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters
    if tool.strict is not None:
        function["strict"] = tool.strict
    return msgspec.Raw(msgspec.json.encode({"type": "function", "function": function}))
