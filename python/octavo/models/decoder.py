"""What the engine needs of every family: layers and their KV groups, `forward`, `compute_logits`;
and what reading its files takes.

Opens no files and knows no steps: weights come through parts, pages and metadata through the step's
context.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from octavo.layers.attention import Attention
from octavo.layers.embedding import Embedding, LogitsHead, TiedHead
from octavo.layers.mlp import GatedMLP
from octavo.layers.norm import RMSNorm
from octavo.layers.schemes.choice import Schemes
from octavo.layers.schemes.scheme import InputForm, Matrix
from octavo.layers.weight import Layer
from octavo.model_config import KvGroup, ModelConfig, kv_groups
from octavo.models.config_reader import Fields


def hidden_norm(name: str, config: ModelConfig, schemes: Schemes, form: InputForm) -> RMSNorm:
    """A norm over whole hidden states. form: as `RMSNorm` has it."""
    return RMSNorm(
        name, config.hidden_size, config.rms_norm_eps, schemes=schemes, form=form, add_one=config.norm_add_one
    )


class DecoderLayer(Layer):
    """h += attention(norm(h)); h += mlp(norm(h)). The addition is left to the norm that follows it."""

    def __init__(self, name: str, config: ModelConfig, layer: int, *, kv_group: int, schemes: Schemes) -> None:
        attention = Attention(f"{name}.self_attn", config, layer, kv_group=kv_group, schemes=schemes)
        mlp = GatedMLP(f"{name}.mlp", config, schemes=schemes)
        self.input_norm = hidden_norm(f"{name}.input_layernorm", config, schemes, attention.qkv.input_form)
        self.attention = attention
        self.post_attention_norm = hidden_norm(
            f"{name}.post_attention_layernorm", config, schemes, mlp.gate_up.input_form
        )
        self.mlp = mlp

    @property
    def mlp_norm(self) -> RMSNorm:
        """The norm that `mlp` reads."""
        return self.post_attention_norm

    def __call__(self, x: Any, residual: Tensor, positions: Tensor) -> Tensor:
        """x: this layer's normed input; residual: the stream, changed in place.

        Returns what is still to be added to it.
        """
        x = self.attention(x, positions)
        x = self.post_attention_norm.add(x, residual)
        return self.mlp(x)


class Model(Layer):
    """A decoder-only language model. A family is a subclass that says what is its own."""

    architectures: ClassVar[tuple[str, ...]]  # its names in config.json
    headless_architectures: ClassVar[tuple[str, ...]] = ()  # the same, of files that were saved without a head
    model_type: ClassVar[str]  # its kind of config.json, by which transformers chooses
    defaults: ClassVar[dict[str, Any]]  # what transformers takes where a config.json leaves a key out
    gguf_architecture: ClassVar[str] = ""  # its name in GGUF files, where it has one of its own
    gguf_blocks: ClassVar[Mapping[str, str]] = {}  # GGUF's tensors of a block -> ours, where it differs from others
    gguf_interleaves_heads: ClassVar[bool] = False  # GGUF files have the rotary halves of q and k interleaved
    gguf_rope_factors: ClassVar[bool] = False  # GGUF files may divide each rotary frequency by a factor of its own
    decoder_layer: ClassVar[type[DecoderLayer]] = DecoderLayer

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        """The family's config out of a file's fields. Raises `ModelError`."""
        raise NotImplementedError

    @classmethod
    def complete_gguf(cls, values: dict[str, Any], header: Fields) -> None:
        """Adds to a GGUF header, under config.json's keys, what is the family's own or what
        llama.cpp has in its code instead. header: by metadata keys without the architecture.
        """

    def __init__(self, config: ModelConfig, schemes: Schemes) -> None:
        """Takes no memory for weights: all of them are on the `meta` device until a loader places
        them.
        """
        self.config = config
        self.kv_groups: list[KvGroup] = kv_groups(config)
        group_of = {layer: index for index, group in enumerate(self.kv_groups) for layer in group.layers}
        vocab_size, size, soft_cap = config.vocab_size, config.hidden_size, config.logit_soft_cap
        self.embedding = Embedding(
            "model.embed_tokens", vocab_size, size, schemes=schemes, scale=config.embedding_scale
        )
        self.decoder_layers = [
            self.decoder_layer(f"model.layers.{i}", config, i, kv_group=group_of[i], schemes=schemes)
            for i in range(config.num_layers)
        ]
        head = Matrix({"lm_head": vocab_size}, size, makes_logits=True)
        self.head = (
            TiedHead(self.embedding, schemes.tied(head), soft_cap=soft_cap)
            if config.tie_word_embeddings
            else LogitsHead(schemes.linear(head), soft_cap=soft_cap)
        )
        self.norm = hidden_norm("model.norm", config, schemes, schemes.leaving)

    def bind_kv_caches(self, pages: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Layer j of every KV group reads and writes pages[j]: (`Attention.kv_cache`,
        `Attention.kv_scales`).
        """
        for group in self.kv_groups:
            for place, layer in enumerate(group.layers):
                self.decoder_layers[layer].attention.bind(*pages[place])

    def weight_bytes(self) -> int:
        """Memory of all weights, packed forms as they are."""
        return sum(layer.own_bytes() for layer in self.layers())

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids [num_tokens], positions [num_tokens] int64 -> hidden states [num_tokens,
        hidden_size], normed.
        """
        residual = self.embedding(input_ids)
        x = self.decoder_layers[0].input_norm(residual)
        x = self.decoder_layers[0](x, residual, positions)
        for layer in self.decoder_layers[1:]:
            x = layer(layer.input_norm.add(x, residual), residual, positions)
        hidden: Tensor = self.norm.add(x, residual)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden_size] -> [n, vocab_size] float32."""
        return self.head(hidden)
