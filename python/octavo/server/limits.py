"""How much a request may ask for, and how long a client may take: the server's options of that kind,
and the checks of a body's fields, before any work is done for them.

What no server takes stands in Rust, once (`rust/request.rs`); these limits are at most as wide.
"""

import dataclasses
from typing import Any

from octavo.options import option, parse_bytes, parse_count
from octavo.server.errors import bad_request


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of requests and connections. `ValueError` names the field, its value and the limit."""

    max_body_size: int = option(16 * 2**20, "Largest request body in bytes, after decompression.", parse=parse_bytes)
    max_header_size: int = option(8190, "Longest request line, and longest header, in bytes.", parse=parse_bytes)
    max_headers: int = option(100, "Headers of a request.", parse=parse_count)
    header_timeout: float = option(10.0, "Seconds in which a request's headers must have come.", parse=float)
    body_timeout: float = option(30.0, "Seconds in which a request's body must have come.", parse=float)
    keep_alive_timeout: float = option(75.0, "Seconds after which an idle connection is closed.", parse=float)
    write_timeout: float = option(
        60.0, "Seconds after which a client is given up that does not read its stream.", parse=float
    )
    max_json_depth: int = option(64, "Brackets within brackets of a body.", parse=parse_count)
    max_prompts: int = option(1024, "Prompts of a completion, inputs of embeddings.", parse=parse_count)
    max_messages: int = option(2048, "Messages of a chat.", parse=parse_count)
    max_message_parts: int = option(256, "Parts of a message's content.", parse=parse_count)
    max_tools: int = option(256, "Tools of a chat.", parse=parse_count)
    max_n: int = option(128, "Choices of a prompt (n).", parse=parse_count)
    max_choices: int = option(1024, "Choices of a call: prompts times n.", parse=parse_count)
    max_stop: int = option(32, "Stop strings.", parse=parse_count)
    max_stop_length: int = option(1024, "Longest stop string in bytes.", parse=parse_bytes)
    max_stop_token_ids: int = option(128, "Stop tokens (stop_token_ids).", parse=parse_count)
    max_logprobs: int = option(20, "Top log probabilities of a token.", parse=parse_count)
    max_logit_bias: int = option(1024, "Entries of logit_bias.", parse=parse_count)
    max_bad_words: int = option(256, "Entries of bad_words.", parse=parse_count)
    max_schema_size: int = option(
        256 * 1024, "Longest schema, expression or grammar of an answer, and any field but the prompt, in bytes.",
        parse=parse_bytes,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for field, (low, high) in _RANGES.items():
            value = getattr(self, field)
            if not low <= value <= high:
                raise ValueError(f"{field} = {value}: must be from {low} to {high}")

    def check_fields(self, request: Any, *, num_prompts: int = 1) -> None:
        """Bounds lists and numbers of a request before any work. Raises `ApiError` 400 that names the
        field, how much it has, and the flag that bounds it.

        request: a struct with fields of OpenAI's names.
        """
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or ()
        amounts = (
            ("n", request.n or 1, "max_n"),
            ("best_of", getattr(request, "best_of", None) or 1, "max_n"),
            ("stop", len(stop), "max_stop"),
            ("stop", max((len(text.encode()) for text in stop), default=0), "max_stop_length"),
            ("stop_token_ids", len(request.stop_token_ids or ()), "max_stop_token_ids"),
            ("logit_bias", len(request.logit_bias or ()), "max_logit_bias"),
            ("bad_words", len(request.bad_words or ()), "max_bad_words"),
            ("logprobs", int(request.logprobs or 0), "max_logprobs"),
            ("top_logprobs", getattr(request, "top_logprobs", None) or 0, "max_logprobs"),
            ("prompt_logprobs", request.prompt_logprobs or 0, "max_logprobs"),
        )
        for field, amount, limit in amounts:
            most = getattr(self, limit)
            if amount > most:
                raise bad_request(f"{field}: {amount} {_WHAT[limit]}, at most {most} are allowed ({limit}).", field)
        for field in ("n", "best_of"):
            each = getattr(request, field, None) or 1
            if num_prompts * each > self.max_choices:
                raise bad_request(
                    f"{field} = {each}: {num_prompts} prompts times {field} must be at most {self.max_choices} "
                    "(max_choices).",
                    field,
                )

    def check_chat(self, messages: int, tools: int) -> None:
        """The same of a conversation."""
        if messages > self.max_messages:
            raise bad_request(
                f"messages: {messages} messages, at most {self.max_messages} are allowed (max_messages).", "messages"
            )
        if tools > self.max_tools:
            raise bad_request(f"tools: {tools} tools, at most {self.max_tools} are allowed (max_tools).", "tools")


_RANGES: dict[str, tuple[float, float]] = {
    "max_body_size": (1024, 2**31),
    "max_header_size": (256, 2**20),
    "max_headers": (8, 1024),
    "header_timeout": (0.01, 3600.0),
    "body_timeout": (0.01, 86400.0),
    "keep_alive_timeout": (0.0, 86400.0),
    "write_timeout": (0.01, 86400.0),
    "max_json_depth": (8, 64),
    "max_prompts": (1, 1024),
    "max_messages": (1, 2048),
    "max_message_parts": (1, 256),
    "max_tools": (0, 256),
    "max_n": (1, 128),
    "max_choices": (1, 1024),
    "max_stop": (0, 32),
    "max_stop_length": (1, 4096),
    "max_stop_token_ids": (0, 128),
    "max_logprobs": (0, 20),
    "max_logit_bias": (0, 1024),
    "max_bad_words": (0, 256),
    "max_schema_size": (1024, 256 * 1024),
}
_WHAT = {
    "max_n": "choices",
    "max_stop": "strings",
    "max_stop_length": "bytes in a string",
    "max_stop_token_ids": "tokens",
    "max_logit_bias": "entries",
    "max_bad_words": "words",
    "max_logprobs": "log probabilities",
}
