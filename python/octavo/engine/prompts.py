"""What a user may pass as a prompt, and its way to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TypedDict, cast

from octavo import _core

MAX_TOKEN_ID = 2**32 - 1
"""What Rust can hold; the vocabulary's own limit is checked there."""


class TextPrompt(TypedDict, total=False):
    """A text, which may as well come without the dictionary."""

    prompt: str


class TokensPrompt(TextPrompt):
    """A prompt that is already tokenised; `prompt`, if given, is the text that its output shows."""

    prompt_token_ids: list[int]


PromptInput = str | TextPrompt | TokensPrompt

_EXPECTED = "expected text, {'prompt': text} or {'prompt_token_ids': [...]}"
_KEYS = {"prompt", "prompt_token_ids"}


def encode_prompt(
    prompt: PromptInput, tokenizer: _core.Tokenizer | None, *, add_special_tokens: bool = True
) -> _core.Prompt:
    """Token ids of a prompt, kept in Rust. Raises `ValueError` naming what is wrong with it."""
    if isinstance(prompt, dict):
        others = [key for key, value in prompt.items() if key not in _KEYS and value is not None]
        if others:
            raise ValueError(f"prompt: {others[0]!r} is not supported, {_EXPECTED}")
        if prompt.get("prompt_token_ids") is not None:
            return _core.Prompt(_checked(cast(TokensPrompt, prompt)["prompt_token_ids"]))
    text = prompt_text(prompt)
    if text is None:
        raise ValueError(f"prompt: {_EXPECTED}, got {type(prompt).__name__}")
    if tokenizer is None:
        raise ValueError("prompt: this model has no tokenizer; pass {'prompt_token_ids': [...]} instead of text")
    try:
        return tokenizer.encode_text(text, add_special_tokens)
    except UnicodeError:
        raise ValueError("prompt: the text is not valid Unicode (a lone surrogate)") from None


def prompt_text(prompt: PromptInput) -> str | None:
    """The text of a prompt, None where it came as token ids alone."""
    text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
    return text if isinstance(text, str) else None


def _checked(token_ids: Sequence[int]) -> Sequence[int]:
    """Token ids that Rust can take. Raises `ValueError` naming the first that is none."""
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, (str, bytes)):
        raise ValueError(f"prompt_token_ids is of type {type(token_ids).__name__}, but must be a list of token ids")
    # In C where all is well: prompts are long.
    if not token_ids or (set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) <= MAX_TOKEN_ID):
        return token_ids
    for position, token in enumerate(token_ids):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise ValueError(
                f"prompt_token_ids[{position}] is {repr(token)[:100]} of type {type(token).__name__}, "
                "but must be an integer"
            )
        if not 0 <= token <= MAX_TOKEN_ID:
            value = str(token) if -(2**256) < token < 2**256 else f"an integer of {int(token).bit_length()} bits"
            raise ValueError(f"prompt_token_ids[{position}] is {value}, but must be from 0 to {MAX_TOKEN_ID}")
    return token_ids  # numbers of other libraries
