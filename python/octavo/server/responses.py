"""Answers that are built in Python: whole bodies, and the chunks of a stream over several prompts.

The usual stream is not built here: its frames come as bytes from Rust.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import msgspec

from octavo import _core

Position = list[tuple[int, float, int]]
"""One output token: (token id, logprob, rank) of the drawn one, then of the likeliest."""

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


@dataclass
class Choice:
    """What one choice has put out so far."""

    index: int
    texts: list[str] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, delta: _core.ChoiceDelta) -> None:
        """Takes in what is new."""
        self.texts.append(delta.text)
        if delta.logprobs is not None:
            self.positions.extend(delta.logprobs)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)


@dataclass
class Usage:
    """Token counts of a call, over its prompts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add(self, last: _core.RequestDelta) -> None:
        """Adds one prompt's counts, from its last delta."""
        self.prompt_tokens += last.num_prompt_tokens
        self.completion_tokens += last.num_output_tokens
        self.cached_tokens += last.num_cached_tokens

    def body(self) -> dict[str, Any]:
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def completion_choice(
    choice: Choice, tokenizer: _core.Tokenizer | None, logprobs: int | None, text_offset: int = 0
) -> dict[str, Any]:
    """One entry of `choices` of a text completion, whole or of a chunk that begins at character `text_offset`."""
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": None if logprobs is None else _completion_logprobs(choice.positions, tokenizer, text_offset),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def chat_choice(choice: Choice, tokenizer: _core.Tokenizer | None, logprobs: int | None) -> dict[str, Any]:
    """One entry of `choices` of a chat completion."""
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text},
        "logprobs": None if logprobs is None else _chat_logprobs(choice.positions, tokenizer),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }


def body(head: dict[str, Any], choices: list[dict[str, Any]], usage: Usage | None) -> bytes:
    """The JSON of an answer or of a chunk; `head` has id, object, created and model."""
    return msgspec.json.encode({**head, "choices": choices, "usage": None if usage is None else usage.body()})


def _completion_logprobs(
    positions: list[Position], tokenizer: _core.Tokenizer | None, text_offset: int
) -> dict[str, Any]:
    tokens: list[str] = []
    offsets: list[int] = []
    for position in positions:
        tokens.append(token_text(position[0][0], tokenizer))
        offsets.append(text_offset)
        text_offset += len(tokens[-1])
    return {
        "text_offset": offsets,
        "token_logprobs": [_finite(position[0][1]) for position in positions],
        "tokens": tokens,
        "top_logprobs": [_by_text(position, tokenizer) for position in positions],
    }


def _by_text(position: Position, tokenizer: _core.Tokenizer | None) -> dict[str, float]:
    """The drawn token comes first, so that it is there also when it is not among the likeliest."""
    entries: dict[str, float] = {}
    for token, logprob, _ in position:
        entries.setdefault(token_text(token, tokenizer), _finite(logprob))
    return entries


def _chat_logprobs(positions: list[Position], tokenizer: _core.Tokenizer | None) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = None if tokenizer is None else list(tokenizer.token_bytes(token))
        return {"token": token_text(token, tokenizer), "logprob": _finite(logprob), "bytes": raw}

    content = []
    for drawn, *likeliest in positions:
        top = [entry(token, logprob) for token, logprob, _ in likeliest]
        content.append({**entry(drawn[0], drawn[1]), "top_logprobs": top})
    return {"content": content}


def token_text(token: int, tokenizer: _core.Tokenizer | None) -> str:
    """A token by itself, as the frames of Rust write it: U+FFFD where it is only a part of a character."""
    if tokenizer is None:
        return f"token_id:{token}"
    return tokenizer.token_bytes(token).decode(errors="replace")


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB
