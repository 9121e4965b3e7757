"""What a user may pass as a prompt, and its way to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TypedDict

from octavo import _core

MAX_TOKEN_ID = 2**32 - 1
"""What Rust can hold; the vocabulary's own limit is checked there."""


class TokensPrompt(TypedDict):
    """A prompt that is already tokenised."""

    prompt_token_ids: list[int]


PromptInput = str | TokensPrompt


def encode_prompt(prompt: PromptInput, tokenizer: _core.Tokenizer | None) -> _core.Prompt:
    """Token ids of a prompt, kept in Rust. Raises `ValueError` naming what is wrong with it."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("prompt: this model has no tokenizer; pass {'prompt_token_ids': [...]} instead of text")
        try:
            return tokenizer.encode_text(prompt, True)
        except UnicodeError:
            raise ValueError("prompt: the text is not valid Unicode (a lone surrogate)") from None
    if isinstance(prompt, dict) and "prompt_token_ids" in prompt:
        return _core.Prompt(_checked(prompt["prompt_token_ids"]))
    raise ValueError(f"prompt: expected text or {{'prompt_token_ids': [...]}}, got {type(prompt).__name__}")


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
