"""Perplexity of a model on a text, and how far its distributions are from another's.

The text is cut into windows, each a prompt of its own whose log probabilities the engine is asked
for: what is measured is the engine's own forward pass over its own pages. For the distance to another
model both engines read a window before either reads the next, so no more than the distributions of
one window are kept, whole and in float32, on the device where they were made.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo import _core
from octavo.config import AUTO_LENGTH, EngineConfig
from octavo.engine.engine import Engine

KV_BYTES = 1 << 30
"""KV memory of an engine that reads one window at a time."""


@dataclass
class Quality:
    """What was measured, position by position."""

    nll: list[float] = field(default_factory=list)
    """Of each token but the first of its window: minus its log probability (natural logarithm)."""
    divergence: list[float] = field(default_factory=list)
    """Kullback-Leibler divergence of the distribution from the other model's, in nats."""
    same_best: int = 0
    """Positions whose likeliest token is the other model's."""

    @property
    def perplexity(self) -> float:
        """exp of the mean of `nll`."""
        return math.exp(sum(self.nll) / len(self.nll))

    @property
    def mean_divergence(self) -> float:
        """Nats a position."""
        return sum(self.divergence) / len(self.divergence)

    @property
    def divergence_99(self) -> float:
        """99th percentile of `divergence`, interpolated."""
        return float(torch.tensor(self.divergence, dtype=torch.float64).quantile(0.99))

    @property
    def agreement(self) -> float:
        """Share of the positions whose likeliest token is the other model's."""
        return self.same_best / len(self.divergence)


class Reader:
    """An engine that reads windows, each as a prompt of its own. Close it."""

    def __init__(self, config: EngineConfig, window: int) -> None:
        self.engine = Engine.from_config(
            dataclasses.replace(
                config,
                max_model_len=AUTO_LENGTH,
                max_num_seqs=1,
                max_num_batched_tokens=window,
                kv_cache_memory=config.kv_cache_memory or KV_BYTES,
                enable_prefix_caching=False,
                enforce_eager=True,
                max_quality_loss=sys.float_info.max,  # it is to be measured, not refused
            )
        )
        longest = self.engine.parts.max_model_len - 1  # a token is drawn behind each window
        if window > longest:
            self.engine.close()
            raise ValueError(f"window = {window}: {config.model_name} takes at most {longest} tokens at a time")

    def close(self) -> None:
        """Gives the model's memory back."""
        self.engine.close()

    def read(self, window: list[int], see: Callable[[Tensor], None] | None = None) -> list[float]:
        """Log probabilities of the window's tokens but the first.

        see: is shown the logits behind each token but the last, [n, vocab] float32, piece by piece.
        """
        core, runner = self.engine.core, self.engine.runner
        params = _core.SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, prompt_logprobs=0)
        reply = core.add_call([_core.Prompt(window)], params, now=time.monotonic())
        runner.see_prompt_logits = see
        told: list[float] | None = None
        try:
            while self.engine.step():
                for _ in core.take_news():
                    delta = core.take(reply)
                    if delta is None:
                        continue
                    if delta.error is not None:
                        raise RuntimeError(f"a window could not be read: {delta.error}")
                    for choice in delta.choices:
                        if choice.prompt_logprobs is not None:
                            told = [position[0][1] for position in choice.prompt_logprobs]
        finally:
            runner.see_prompt_logits = None
        if told is None:
            raise RuntimeError("the engine has told no log probabilities of a window")
        return told


def tokens_of(reader: Reader, text: str) -> tuple[list[int], list[int]]:
    """What the model's prompts begin with, and the text's tokens. Raises `ValueError` without a
    tokenizer.
    """
    tokenizer = reader.engine.parts.tokenizer
    if tokenizer is None:
        raise ValueError(f"model: {reader.engine.parts.model_name} has no tokenizer; name one with --tokenizer")
    return tokenizer.encode_text("", True).token_ids[:1], tokenizer.encode_text(text, False).token_ids


def windows(prefix: list[int], tokens: list[int], size: int) -> Iterator[list[int]]:
    """The tokens in pieces of `size` with the prefix before each; a rest of one token alone is left
    out.
    """
    step = size - len(prefix)
    for start in range(0, len(tokens), step):
        window = [*prefix, *tokens[start : start + step]]
        if len(window) > 1:
            yield window


def check_comparable(model: Reader, other: Reader, text: str) -> None:
    """Raises `ValueError` where the two do not speak of the same tokens."""
    sizes = [reader.engine.runner.vocab_size for reader in (model, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"against: {other.engine.parts.model_name} has a vocabulary of {sizes[1]:,} tokens, "
            f"{model.engine.parts.model_name} one of {sizes[0]:,}; their distributions cannot be compared"
        )
    if tokens_of(model, text) != tokens_of(other, text):
        raise ValueError(
            f"against: {other.engine.parts.model_name} makes other tokens of the text than "
            f"{model.engine.parts.model_name}; compare models with one tokenizer"
        )


class Comparison:
    """Adds up how far one engine's distributions are from another's, a window at a time."""

    def __init__(self, quality: Quality) -> None:
        self._quality = quality
        self._kept: list[Tensor] = []

    def keep(self, logits: Tensor) -> None:
        """The other model's, of the window's next positions."""
        self._kept.append(logits.float().log_softmax(dim=1))

    def compare(self, logits: Tensor) -> None:
        """The model's, of the same positions in pieces of the same sizes."""
        expected = self._kept.pop(0)
        found = logits.float().log_softmax(dim=1).to(expected.device)
        divergence = (expected.exp() * (expected - found).nan_to_num(nan=0.0)).sum(dim=1)
        self._quality.divergence += divergence.clamp(min=0.0).tolist()
        self._quality.same_best += int((expected.argmax(dim=1) == found.argmax(dim=1)).sum())


def measure(model: Reader, other: Reader | None, pieces: Iterator[list[int]]) -> Iterator[tuple[Quality, Quality]]:
    """Reads window by window; yields the model's quality so far and the other's, of which without an
    other one nothing is known.
    """
    quality, others = Quality(), Quality()
    for window in pieces:
        see = None
        if other is not None:
            comparison = Comparison(quality)
            others.nll += [-value for value in other.read(window, comparison.keep)]
            see = comparison.compare
        quality.nll += [-value for value in model.read(window, see)]
        yield quality, others
