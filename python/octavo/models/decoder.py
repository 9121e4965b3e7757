"""What the engine needs of every family: layers and their KV groups, `forward`, `compute_logits`.

Knows no files and no steps: weights come through slots, pages and metadata through the step's context.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from octavo.layers.attention import Attention
from octavo.layers.embedding import Embedding, LogitsHead
from octavo.layers.mlp import GatedMLP
from octavo.layers.norm import RMSNorm
from octavo.layers.weight import Layer
from octavo.model_config import KvGroup, ModelConfig, kv_groups


class DecoderLayer(Layer):
    """h += attention(norm(h)); h += mlp(norm(h)). The addition is left to the norm that follows it."""

    def __init__(
        self, name: str, config: ModelConfig, layer: int, *, kv_group: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(f"{name}.input_layernorm", size, eps, dtype=dtype)
        self.attention = Attention(f"{name}.self_attn", config, layer, kv_group=kv_group, dtype=dtype, device=device)
        self.post_attention_norm = RMSNorm(f"{name}.post_attention_layernorm", size, eps, dtype=dtype)
        self.mlp = GatedMLP(f"{name}.mlp", config, dtype=dtype)

    def __call__(self, x: Tensor, residual: Tensor, positions: Tensor) -> Tensor:
        """x: this layer's normed input; residual: the stream, changed in place.

        Returns what is still to be added to it.
        """
        x = self.attention(x, positions)
        x = self.post_attention_norm.add(x, residual)
        return self.mlp(x)


class Model(Layer):
    """A decoder-only language model. A family is a subclass that names its decoder layer."""

    decoder_layer: ClassVar[type[DecoderLayer]] = DecoderLayer
    norm_add_one: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        """Takes no memory for weights: all of them are on the `meta` device until a loader places them."""
        self.config = config
        self.kv_groups: list[KvGroup] = kv_groups(config)
        group_of = {layer: index for index, group in enumerate(self.kv_groups) for layer in group.layers}
        self.embedding = Embedding(
            "model.embed_tokens", config.vocab_size, config.hidden_size, dtype=dtype, scale=config.embedding_scale
        )
        self.decoder_layers = [
            self.decoder_layer(f"model.layers.{i}", config, i, kv_group=group_of[i], dtype=dtype, device=device)
            for i in range(config.num_layers)
        ]
        self.norm = RMSNorm(
            "model.norm", config.hidden_size, config.rms_norm_eps, dtype=dtype, add_one=self.norm_add_one
        )
        self.head = LogitsHead(
            "lm_head", self.embedding, tied=config.tie_word_embeddings, soft_cap=config.logit_soft_cap
        )

    def bind_kv_caches(self, pool: Sequence[Tensor]) -> None:
        """Layer j of every KV group reads and writes pool[j] [num_blocks, 2, num_kv_heads, block_size, head_dim]."""
        for group in self.kv_groups:
            for place, layer in enumerate(group.layers):
                self.decoder_layers[layer].attention.kv_cache = pool[place]

    def weight_bytes(self) -> int:
        """Memory of all weights, packed forms as they are."""
        return sum(layer.own_bytes() for layer in self.layers())

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids [num_tokens], positions [num_tokens] int64 -> hidden states [num_tokens, hidden_size], normed."""
        residual = self.embedding(input_ids)
        x = self.decoder_layers[0].input_norm(residual)
        x = self.decoder_layers[0](x, residual, positions)
        for layer in self.decoder_layers[1:]:
            x = layer(layer.input_norm.add(x, residual), residual, positions)
        return self.norm.add(x, residual)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden_size] -> [n, vocab_size] float32."""
        return self.head(hidden)
