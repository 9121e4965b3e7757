"""Token embedding, and the head that turns hidden states into logits (its own matrix or the
embedding's).
"""

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.layers.schemes.blocks import BlockScheme
from octavo.layers.schemes.choice import Schemes
from octavo.layers.schemes.dense import PlainScheme
from octavo.layers.schemes.scheme import Scheme
from octavo.layers.weight import Layer, WeightPart


class Embedding(Layer):
    """A table of one row a token id; `scale` multiplies what is looked up (Gemma)."""

    def __init__(self, name: str, vocab_size: int, size: int, *, schemes: Schemes, scale: float = 1.0) -> None:
        self.name = name
        # Rounded to the weights' dtype first, as the models were trained.
        self.scale = torch.tensor(scale).to(schemes.dtype).item()
        self.activation_dtype = schemes.activation_dtype
        self.table = schemes.table(name, vocab_size, size)
        if self.table is None:
            self.weight = torch.empty(vocab_size, size, dtype=schemes.dtype, device="meta")

    def own_parts(self) -> Iterable[WeightPart]:
        if self.table is None:
            yield WeightPart(f"{self.name}.weight", self, "weight", tuple(self.weight.shape))

    def __call__(self, input_ids: Tensor) -> Any:
        """input_ids [num_tokens] -> [num_tokens, size] of `activation_dtype`, which all hidden
        states have.
        """
        if self.table is not None:
            return self.table(input_ids, self.scale)
        hidden = F.embedding(input_ids, self.weight).to(self.activation_dtype)
        return hidden if self.scale == 1.0 else hidden * self.scale


class LogitsHead(Layer):
    """Logits of the real vocabulary in float32."""

    def __init__(self, scheme: Scheme, *, soft_cap: float = 0.0) -> None:
        """scheme: of the matrix [vocab_size, size]. soft_cap: logits stay between -soft_cap and
        soft_cap; 0: any.
        """
        self.scheme = scheme
        self.soft_cap = soft_cap

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [n, size], plain because a step picks rows of it first -> [n, vocab_size] float32."""
        logits = self.scheme(self.scheme.input_form.from_plain(hidden)).float()
        if self.soft_cap:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits


class TiedHead(LogitsHead):
    """Multiplies by the embedding's table."""

    scheme: PlainScheme | BlockScheme

    def __init__(self, embedding: Embedding, scheme: PlainScheme | BlockScheme, *, soft_cap: float = 0.0) -> None:
        super().__init__(scheme, soft_cap=soft_cap)
        self.embedding = embedding

    def children(self) -> Iterator[Layer]:
        return iter(())  # the embedding belongs to the model, and the scheme is filled with the embedding's table

    def finish(self) -> None:
        if isinstance(self.scheme, BlockScheme):
            assert self.embedding.table is not None
            self.scheme.hold("lm_head", self.embedding.table.blocks)
        else:
            # In packed form it is a second copy of the table, which a CPU's largest product repays:
            # SmolLM2's takes 3.1 ms instead of 6.2 for one row and 4.0 instead of 23 for four (bf16,
            # one core).
            self.scheme.weight = self.embedding.weight
        self.scheme.finish()

    def own_bytes(self) -> int:
        if isinstance(self.scheme, BlockScheme):
            return 0
        shared = getattr(self.scheme, "weight", None) is self.embedding.weight
        return 0 if shared else self.scheme.own_bytes()

    def rehearse(self, done: set[Hashable]) -> None:
        self.scheme.rehearse(done)
