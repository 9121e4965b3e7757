"""What fewer bits cost, looked at while a model is loaded: each layer against itself in 16 bits.

The first tokens of the prose that ships go through the model as two streams. One passes every layer as
the checkpoint has it; from there each layer is tried with its weights in few bits, and with keys and
values in few bits, and loses the share of what it adds to the stream that comes out otherwise. A layer
that loses too much stays in 16 bits. The other stream passes what will be served; at the end the
distributions of the next token behind both are compared. So no more than one layer is in memory in both
forms, and nothing is loaded twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo import _core
from octavo.config import EngineConfig
from octavo.engine.kv_layout import DTYPES
from octavo.kernels.attention.kv_block import FORMAT_NAMES
from octavo.layers.embedding import Embedding
from octavo.layers.schemes.online import OnlineScheme
from octavo.layers.weight import Layer
from octavo.model_config import ModelConfig
from octavo.models.alone import run_alone
from octavo.models.decoder import DecoderLayer
from octavo.models.registry import Model
from octavo.quantizations import ONLINE
from octavo.texts import EVALUATION, read_text

NUM_TOKENS = {"cuda": 256, "cpu": 128}
"""That go through the model: enough to tell a layer that fails, few enough for a start."""

CHARACTERS = 2048  # of prose, which are surely more than so many tokens

LIMITS = {"int8": 0.1, "fp8": 0.2, "int4": 0.45}
"""What a layer may lose, as a share of what it adds to the stream. Layers of SmolLM2 lose up to 0.03,
0.08 and 0.30; with all of a group's small weights rounded to zero, 0.5 and more.
"""

LOGITS_AT_ONCE = 64  # positions


@dataclass(frozen=True)
class Part:
    """What the gate found of the weights of all layers, or of their keys and values."""

    key: str  # "weights" or "kv_cache"
    name: str  # for people: "int4 weights"
    kept: dict[int, float]  # layers that stay in 16 bits, and what they would lose


@dataclass(frozen=True)
class Verdict:
    """What the gate found of a model."""

    num_layers: int
    num_tokens: int = 0  # 0: nothing was measured
    divergence: float = 0.0  # mean of the Kullback-Leibler divergence, in nats
    parts: tuple[Part, ...] = ()

    def lines(self) -> list[str]:
        """For the start-up report."""
        if not self.num_tokens:
            return ["not measured: random weights have none"]
        named = " and ".join(part.name for part in self.parts)
        lines = [f"{named} cost {self.divergence:.4f} nats a token (KL divergence, {self.num_tokens} tokens)"]
        for part in self.parts:
            if part.kept:
                which = ", ".join(f"{number} (would lose {loss:.0%})" for number, loss in part.kept.items())
                lines.append(f"not {part.name} but 16 bits in {len(part.kept)} of {self.num_layers} layers: {which}")
        return lines


class Gate:
    """Judges a model while it is loaded (`weights.load.Judge`)."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        self._wanted = config
        self._device = device
        kv_dtype = DTYPES.get(config.kv_cache_dtype)
        self._kv_dtype = kv_dtype if kv_dtype in FORMAT_NAMES else None
        self._weights: dict[int, float] = {}  # layer -> what it loses
        self._kv: dict[int, float] = {}
        self._began = self._online = False
        self._number = 0
        self._ids: Tensor | None = None  # [tokens]
        self._plain: Tensor  # [1, tokens, hidden_size], behind the layers so far
        self._served: Tensor

    @staticmethod
    def is_for(config: EngineConfig) -> bool:
        """Whether the configuration may ask for fewer bits than a checkpoint has, and wants that looked
        at.
        """
        if config.max_quality_loss == math.inf:
            return False
        return config.quantization in ONLINE or DTYPES.get(config.kv_cache_dtype) in FORMAT_NAMES

    # ---- while the model is loaded ---------------------------------------------------------------

    def begin(self, config: ModelConfig, dtype: torch.dtype, tokenizer: _core.Tokenizer | None, online: bool) -> None:
        """As `Judge.begin`."""
        self._began, self._online, self._dtype = True, online, dtype
        if online or self._kv_dtype is not None:
            count = min(NUM_TOKENS[self._device.type], config.max_position_embeddings)
            self._ids = torch.tensor(text_ids(tokenizer, config.vocab_size, count), device=self._device)

    @torch.inference_mode()
    def finished(self, layer: Layer) -> None:
        """As `Judge.finished`."""
        if self._ids is None:
            return
        if isinstance(layer, Embedding):
            self._plain = layer(self._ids).unsqueeze(0).clone()
            self._served = self._plain.clone()
        elif isinstance(layer, DecoderLayer):
            self._judge(layer)
            self._number += 1

    def _judge(self, layer: DecoderLayer) -> None:
        before = self._plain
        after, added = self._through(layer, before, self._dtype)
        kv_dtype = self._dtype
        if self._kv_dtype is not None:
            loss = lost(self._through(layer, before, self._kv_dtype)[1], added)
            self._kv[self._number] = loss
            kv_dtype = self._dtype if too_much(loss, FORMAT_NAMES[self._kv_dtype]) else self._kv_dtype
        if self._online:
            matrices = [part for part in layer.layers() if isinstance(part, OnlineScheme)]
            for matrix in matrices:
                matrix.quantise()
            loss = lost(self._through(layer, before, self._dtype)[1], added)
            self._weights[self._number] = loss
            keep = too_much(loss, str(self._wanted.quantization))
            for matrix in matrices:
                matrix.settle(keep=keep)
        self._plain = after
        self._served, _ = self._through(layer, self._served, kv_dtype)

    def _through(self, layer: DecoderLayer, before: Tensor, kv_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The stream behind a layer, and what it adds in float32: both [1, tokens, hidden_size]."""
        stream = before.clone()
        last = run_alone(layer, stream, kv_dtype)
        added = (stream.float() - before.float()) + last.float()  # so that 16-bit sums hide little of it
        return stream.add_(last), added

    # ---- when it is ------------------------------------------------------------------------------

    @property
    def layers_with_plain_kv(self) -> frozenset[int]:
        """Those that lose too much with keys and values in few bits."""
        return frozenset(self._kept(self._kv, self._wanted.kv_cache_dtype))

    def conclude(self, model: Model) -> Verdict | None:
        """The verdict on the whole model; None if none of it is in few bits by this engine's doing.

        Raises `ValueError` if it loses more than `max_quality_loss`.
        """
        if self._ids is None:
            return None if self._began else Verdict(model.config.num_layers)
        parts = []
        if self._online:
            form = str(self._wanted.quantization)
            parts.append(Part("weights", f"{form} weights", self._kept(self._weights, form)))
        if self._kv_dtype is not None:
            form = self._wanted.kv_cache_dtype
            parts.append(Part("kv_cache", f"{form} keys and values", self._kept(self._kv, form)))
        divergence, limit = self._divergence(model), self._wanted.max_quality_loss
        verdict = Verdict(model.config.num_layers, len(self._ids), divergence, tuple(parts))
        if not divergence <= limit:
            raise ValueError(
                f"max_quality_loss = {limit:g}: {'; '.join(verdict.lines())}: use more bits, or raise "
                "--max-quality-loss"
            )
        del self._plain, self._served
        return verdict

    def _kept(self, losses: dict[int, float], form: str) -> dict[int, float]:
        return {number: loss for number, loss in losses.items() if too_much(loss, form)}

    @torch.inference_mode()
    def _divergence(self, model: Model) -> float:
        total = 0.0
        for start in range(0, self._plain.shape[1], LOGITS_AT_ONCE):
            expected, found = (
                model.compute_logits(model.norm(stream[0, start : start + LOGITS_AT_ONCE])).log_softmax(-1)
                for stream in (self._plain, self._served)
            )
            total += float((expected.exp() * (expected - found)).sum())
        return max(0.0, total / self._plain.shape[1])


def lost(found: Tensor, added: Tensor) -> float:
    """The mean over all tokens of |found - added| / |added|. Both [.., hidden_size] float32."""
    error, size = (found - added).norm(dim=-1), added.norm(dim=-1)
    return float((error / size.clamp(min=torch.finfo(torch.float32).tiny)).mean())


def too_much(loss: float, form: str) -> bool:
    """Whether a layer loses too much in that form. NaN is."""
    return not loss <= LIMITS[form.removesuffix("_e4m3")]


def text_ids(tokenizer: _core.Tokenizer | None, vocab_size: int, count: int) -> list[int]:
    """The first tokens of the prose; without a tokenizer any, always the same."""
    if tokenizer is None:
        return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    text = read_text(EVALUATION, "text")[:CHARACTERS]
    ids = tokenizer.encode_text(text, add_special_tokens=True).token_ids
    return [token for token in ids if token < vocab_size][:count]
