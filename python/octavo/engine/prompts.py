"""What a user may pass as a prompt, and its way to token ids."""

from __future__ import annotations

from typing import TypedDict

from octavo import _core


class TokensPrompt(TypedDict):
    """A prompt that is already tokenised."""

    prompt_token_ids: list[int]


PromptInput = str | TokensPrompt


def encode_prompt(prompt: PromptInput, tokenizer: _core.Tokenizer | None) -> _core.Prompt:
    """Token ids of a prompt, kept in Rust. Raises `ValueError` naming what is wrong with it."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("prompt: this model has no tokenizer; pass {'prompt_token_ids': [...]} instead of text")
        return tokenizer.encode_text(prompt, True)
    if isinstance(prompt, dict) and "prompt_token_ids" in prompt:
        return _core.Prompt(prompt["prompt_token_ids"])
    raise ValueError(f"prompt: expected text or {{'prompt_token_ids': [...]}}, got {type(prompt).__name__}")
