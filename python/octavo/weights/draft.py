"""Loading a model that drafts for another: `speculative_config`'s `draft_model` and `self`.

Every error names the key that brought it.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import torch

from octavo.config import EngineConfig
from octavo.model_config import ModelError
from octavo.speculation import SELF, SpeculativeConfig
from octavo.weights.load import LoadedModel, load_model

if TYPE_CHECKING:
    from octavo import _core

logger = logging.getLogger(__name__)

MOST_LEFT_OVER = 128
"""By how many tokens vocabularies may differ in size, as in llama.cpp: some for padding, or special
tokens that a finetune added.
"""


def load_draft(
    config: EngineConfig, speculation: SpeculativeConfig, target: LoadedModel, device: torch.device
) -> LoadedModel:
    """Loads what drafts for `target`. config: the engine's, for its device, with the length that is
    served. Raises `ModelError` that names the key.
    """
    if speculation.method == SELF:
        return _load_self(config, speculation, target, device)
    assert speculation.model is not None
    wanted = dataclasses.replace(
        _without_text(config),
        model=speculation.model,
        load_format="dummy" if config.load_format == "dummy" else "auto",
        quantization=speculation.quantization,
    )
    try:
        draft = load_model(wanted, device=device)
    except ValueError as error:
        raise ModelError(f"speculative_config: model: {error}") from None
    refuse_other_vocabulary(speculation.model, draft, target)
    assert config.max_model_len is not None
    for layer in draft.model.decoder_layers:  # texts that are too long for it make bad drafts, and no error
        layer.attention.take_positions(config.max_model_len)
    return draft


def _load_self(
    config: EngineConfig, speculation: SpeculativeConfig, target: LoadedModel, device: torch.device
) -> LoadedModel:
    """A copy of the target in few bits. What stays in 16 bits (embedding, head) is the target's own."""
    if config.quantization is not None or target.in_blocks:
        has = f"quantization = {config.quantization!r}" if config.quantization else "its file's blocks"
        raise ModelError(
            f"speculative_config: method = 'self': needs a target in 16 or 32 bits, which its own copy in few bits "
            f"drafts for, and this one has {has}: leave it plain, or draft with ngram, suffix or draft_model"
        )
    quantization = speculation.quantization or "int4"
    try:
        copy = load_model(dataclasses.replace(_without_text(config), quantization=quantization), device=device)
    except ValueError as error:
        raise ModelError(f"speculative_config: method = 'self': {error}") from None
    copy.model.embedding, copy.model.head = target.model.embedding, target.model.head
    return copy


def _without_text(config: EngineConfig) -> EngineConfig:
    """For a model of which no text is asked."""
    return dataclasses.replace(
        config,
        tokenizer=None,
        chat_template=None,
        generation_config="vllm",
        speculative_config=None,
        spec_method=None,
        spec_model=None,
        spec_tokens=None,
    )


def refuse_other_vocabulary(name: str, draft: LoadedModel, target: LoadedModel) -> None:
    """Raises `ModelError` where the two do not mean the same by a token id. Without tokenizers their
    vocabularies must be of one size; with them each id must be the same token, but for special ones,
    which finetunes rename.
    """
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours is None or theirs is None:
        if draft.config.vocab_size != target.config.vocab_size:
            raise ModelError(
                f"speculative_config: model = {name!r}: its vocabulary has {draft.config.vocab_size} tokens and the "
                f"target's {target.config.vocab_size}: a draft model must have the target's tokenizer"
            )
        return
    if abs(ours.vocab_size - theirs.vocab_size) > MOST_LEFT_OVER:
        raise ModelError(
            f"speculative_config: model = {name!r}: its tokenizer has {theirs.vocab_size} tokens and the target's "
            f"{ours.vocab_size}: a draft model must have the target's tokenizer"
        )
    other = _first_other_token(ours, theirs)
    if other is not None:
        raise ModelError(
            f"speculative_config: model = {name!r}: token {other} is {theirs.id_to_token(other)!r} to it and "
            f"{ours.id_to_token(other)!r} to the target: a draft model must have the target's tokenizer"
        )


def _first_other_token(ours: _core.Tokenizer, theirs: _core.Tokenizer) -> int | None:
    special = {*ours.special_tokens.values(), *theirs.special_tokens.values()}
    common = range(min(ours.vocab_size, theirs.vocab_size))
    differing = (token for token in common if ours.id_to_token(token) != theirs.id_to_token(token))
    return next((token for token in differing if token not in special), None)
