"""What clients send: OpenAI's and vLLM's field names as msgspec structs, and their way to
`SamplingParams`.

Types are strict (no "5", 5.0 or true for a number) and every optional field may be null. Bounds
here are only those of the integers that Rust can hold; what a value may be is written in Rust,
once, and its refusals name the field.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import msgspec

from octavo.sampling_params import SamplingParams
from octavo.server import structured
from octavo.server.errors import bad_request

Count = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Long = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]

MAX_TOP_LOGPROBS = 20
MAX_PROMPT_ENTRIES = 2**22
"""Log probabilities of prompts in one answer: 48 MB as they are kept, some 250 MB as JSON."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "guided_decoding_backend": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_tokens_as_token_ids": (False,),
    "use_beam_search": (False,),
}

UNSUPPORTED_COMPLETION = {**_UNSUPPORTED, "documents": ([],)}
UNSUPPORTED_CHAT = {
    **_UNSUPPORTED,
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "return_token_strs": (False,),
    "web_search_options": (),
}
"""Fields that would change the answer, with the values under which ignoring them is right."""


_ABSENT = (b"", b"null")


def _given(raw: msgspec.Raw) -> msgspec.Raw | None:
    return None if bytes(raw) in _ABSENT else raw


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    """OpenAI's padding of events against listeners, which says nothing of the answer; there is none."""


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that both routes share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Long | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Long] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[Long, float] | None = None
    allowed_token_ids: list[Long] | None = None
    bad_words: list[str] | None = None
    thinking_token_budget: Long | None = None
    return_token_ids: bool | None = None
    spaces_between_special_tokens: bool | None = None
    """Never written, whatever it says: as in transformers, where it is of tokenizers without a
    `tokenizer.json` alone.
    """
    prompt_logprobs: Count | None = None
    priority: Count | None = None
    cache_salt: str | None = None
    deadline_ms: Count | None = None
    timing: bool | None = None
    """Whether the usage tells where the time went; a stream then has one."""
    truncate_prompt_tokens: Count | None = None
    response_format: msgspec.Raw = msgspec.Raw()
    structured_outputs: msgspec.Raw = msgspec.Raw()
    guided_json: msgspec.Raw = msgspec.Raw()
    guided_regex: msgspec.Raw = msgspec.Raw()
    guided_choice: msgspec.Raw = msgspec.Raw()
    guided_grammar: msgspec.Raw = msgspec.Raw()
    guided_whitespace_pattern: msgspec.Raw = msgspec.Raw()

    def wanted_structure(self) -> structured.Wanted:
        """What the answer must look like. Raises `ApiError` 400 that names the field."""
        guided = {name: value for name in structured.GUIDED if bytes(value := getattr(self, name)) not in _ABSENT}
        return structured.read(_given(self.response_format), _given(self.structured_outputs), guided)

    def sampling_params(self, defaults: Mapping[str, Any], logprobs: int | None, **ours: Any) -> SamplingParams:
        """The parameters as the engine has them; what the client leaves out comes from `defaults`,
        the model's; `ours` are those of the route.

        Raises `ValueError` that names a field.
        """
        names = ("n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                 "repetition_penalty", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output",
                 "skip_special_tokens", "logit_bias", "allowed_token_ids", "bad_words",
                 "thinking_token_budget")  # fmt: skip
        given: dict[str, Any] = ours | {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.output_limit is not None:
            given["max_tokens"] = self.output_limit
        return SamplingParams.with_defaults(
            {"max_tokens": None, **defaults},
            {"seed": self.seed, "logprobs": logprobs, "prompt_logprobs": self.prompt_logprobs, **given},
        )

    def check_stream_options(self) -> None:
        """`stream_options` makes sense in a stream only, and a stream has no place for
        `prompt_logprobs`.
        """
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options: only allowed when stream is true.", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise bad_request("prompt_logprobs: not available when stream is true.", "prompt_logprobs")

    def prompt_limit(self, max_model_len: int) -> int | None:
        """How many tokens are kept of a prompt, its last ones; None: it must fit as it is."""
        most = self.truncate_prompt_tokens
        if most is None or most == -1:
            return None if most is None else max_model_len
        if not 1 <= most <= max_model_len:
            raise bad_request(
                f"truncate_prompt_tokens = {most}: must be from 1 to {max_model_len}, or -1 for the model's length.",
                "truncate_prompt_tokens",
            )
        return most

    @property
    def output_limit(self) -> int | None:
        """The most tokens to put out, where the client says."""
        return self.max_tokens

    @property
    def output_limit_field(self) -> str:
        """The field that says so."""
        return "max_tokens"

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with an event that has the usage."""
        return bool(self.timing) or (self.stream_options is not None and bool(self.stream_options.include_usage))

    @property
    def continuous_usage(self) -> bool:
        """Whether every event carries the usage so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class CompletionRequest(_Request, frozen=True, kw_only=True):
    """`POST /v1/completions`, all but its `prompt`: that may be millions of token ids."""

    logprobs: Count | None = None
    echo: bool | None = None
    best_of: Long | None = None
    add_special_tokens: bool | None = None
    suffix: str | None = None

    def check(self) -> None:
        """What the struct cannot say. Raises `ApiError` 400."""
        if self.suffix:
            raise bad_request(
                "suffix: this server continues texts and fills none in; put what the model needs to see into prompt.",
                "suffix",
                "unsupported_parameter",
            )
        if self.return_token_ids and self.echo:
            raise bad_request("return_token_ids: not together with echo.", "return_token_ids")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise bad_request(f"best_of = {self.best_of}: must be at least n = {self.n or 1}.", "best_of")
        if self.makes_more and self.stream:
            raise bad_request("best_of: above n it is not available when stream is true.", "best_of")

    @property
    def makes_more(self) -> bool:
        """Whether more choices are made than are answered."""
        return self.best_of is not None and self.best_of > (self.n or 1)

    def to_sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Output is 16 tokens unless the client or the model's defaults say otherwise, as OpenAI
        has it.
        """
        given: dict[str, Any] = {} if self.output_limit is not None or "max_tokens" in defaults else {"max_tokens": 16}
        if self.echo and self.logprobs is not None:
            given["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        params = self.sampling_params(defaults, self.logprobs, **given)
        if not self.makes_more:
            return params
        return replace(params, n=self.best_of or 1, logprobs=self.logprobs or 0)  # by which the best are found

    @property
    def is_echo_alone(self) -> bool:
        """Whether nothing but the prompt is wanted."""
        return bool(self.echo) and self.max_tokens == 0

    @property
    def output_limit(self) -> int | None:
        """To compute the prompt is to draw a token."""
        return 1 if self.is_echo_alone else self.max_tokens


class NamedFunction(msgspec.Struct, frozen=True):
    """The function that `tool_choice` names."""

    name: str


class AllowedTool(msgspec.Struct, frozen=True):
    """One of the tools that may be called."""

    type: str
    function: NamedFunction


class AllowedTools(msgspec.Struct, frozen=True):
    """Which of a request's tools count, and whether one must be called."""

    mode: str
    tools: list[AllowedTool]


class ToolChoice(msgspec.Struct, frozen=True):
    """A `tool_choice` that names a tool, or those that may be called."""

    type: str
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None

    @classmethod
    def of(cls, name: str) -> "ToolChoice":
        """The one that names a function."""
        return cls("function", NamedFunction(name))


class ChatCompletionRequest(_Request, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[msgspec.Raw]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: list[msgspec.Raw] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def to_sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Output goes up to the model's length unless the client or the model's defaults say
        otherwise.
        """
        if self.top_logprobs is not None and self.top_logprobs != 0 and not self.logprobs:
            raise bad_request("top_logprobs: only allowed when logprobs is true.", "top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise bad_request(
                f"top_logprobs = {self.top_logprobs}: must be from 0 to {MAX_TOP_LOGPROBS}.", "top_logprobs"
            )
        return self.sampling_params(defaults, (self.top_logprobs or 0) if self.logprobs else None)

    @property
    def output_limit(self) -> int | None:
        """`max_completion_tokens` is its newer name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def output_limit_field(self) -> str:
        """The one that counts."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


def check_prompt_entries(num_tokens: int, params: SamplingParams) -> None:
    """Bounds the log probabilities of prompts, which are kept until the answer is whole.

    num_tokens: over all prompts of the call.
    """
    if params.prompt_logprobs is None:
        return
    entries = num_tokens * params.n * (1 + params.prompt_logprobs)
    if entries > MAX_PROMPT_ENTRIES:
        raise bad_request(
            f"prompt_logprobs: {num_tokens} prompt tokens times n = {params.n}, each with {params.prompt_logprobs} top "
            f"tokens, are {entries} log probabilities; at most {MAX_PROMPT_ENTRIES} are answered. Send fewer prompts "
            "in one call, or ask for fewer top tokens.",
            "prompt_logprobs",
        )
