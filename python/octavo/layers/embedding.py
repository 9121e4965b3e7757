"""Token embedding, and the head that turns hidden states into logits (its own matrix or the embedding's)."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.layers.cpu_linear import activation_dtype
from octavo.layers.linear import DenseMethod, LinearMethod, linear_method
from octavo.layers.weight import Layer, Slot


class Embedding(Layer):
    """A table of one row a token id; `scale` multiplies what is looked up (Gemma). Its dtype is that of all hidden
    states.
    """

    def __init__(self, name: str, vocab_size: int, size: int, *, dtype: torch.dtype, scale: float = 1.0) -> None:
        self.name = name
        # Rounded to the weights' dtype first, as the models were trained.
        self.scale = torch.tensor(scale).to(dtype).item()
        self.weight = torch.empty(vocab_size, size, dtype=dtype, device="meta")

    def own_slots(self) -> Iterable[Slot]:
        yield Slot(f"{self.name}.weight", self, "weight", 0, tuple(self.weight.shape))

    def finish(self) -> None:
        self.activation_dtype = activation_dtype(self.weight)

    def __call__(self, input_ids: Tensor) -> Tensor:  # input_ids [num_tokens] -> [num_tokens, size]
        hidden = F.embedding(input_ids, self.weight).to(self.activation_dtype)
        return hidden if self.scale == 1.0 else hidden * self.scale


class LogitsHead(Layer):
    """Logits of the real vocabulary in float32. Without a table of its own it multiplies by the embedding's."""

    method: LinearMethod

    def __init__(self, name: str, embedding: Embedding, *, tied: bool, soft_cap: float = 0.0) -> None:
        self.name = name
        self.tied = tied
        self.embedding = embedding
        self.soft_cap = soft_cap
        self.weight = None if tied else torch.empty(embedding.weight.shape, dtype=embedding.weight.dtype, device="meta")

    def own_slots(self) -> Iterable[Slot]:
        if self.weight is not None:
            yield Slot(f"{self.name}.weight", self, "weight", 0, tuple(self.weight.shape))

    def own_bytes(self) -> int:
        shared = isinstance(self.method, DenseMethod) and self.method.weight is self.embedding.weight
        return 0 if shared else self.method.num_bytes

    def children(self) -> Iterator[Layer]:
        return iter(())  # the embedding belongs to the model

    def finish(self) -> None:
        # A tied head in packed form is a second copy of the table, which a CPU's largest product repays: SmolLM2's
        # takes 3.1 ms instead of 6.2 for one row and 4.0 instead of 23 for four (bf16, one core).
        self.method = linear_method(self.embedding.weight if self.weight is None else self.weight, None)
        self.weight = None

    def __call__(self, hidden: Tensor) -> Tensor:  # hidden [n, size] -> [n, vocab_size] float32
        logits = self.method(hidden).float()
        if self.soft_cap:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits
