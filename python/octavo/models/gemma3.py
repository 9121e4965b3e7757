"""Gemma 3, text part: norms before and after each block, norms on q and k, windowed and full layers mixed 5 to 1.

Gemma team 2025; tensor names of transformers' `Gemma3ForCausalLM`. Norm weights are kept minus one in its files
(`add_one`).
"""

from typing import Any

from torch import Tensor

from octavo.layers.schemes.choice import Schemes
from octavo.model_config import ModelConfig
from octavo.models.decoder import DecoderLayer, Model, hidden_norm


class Gemma3DecoderLayer(DecoderLayer):
    """h += norm(attention(norm(h))); h += norm(mlp(norm(h)))."""

    def __init__(self, name: str, config: ModelConfig, layer: int, *, kv_group: int, schemes: Schemes) -> None:
        super().__init__(name, config, layer, kv_group=kv_group, schemes=schemes)
        self.post_attention_norm = hidden_norm(f"{name}.post_attention_layernorm", config, schemes)
        self.pre_mlp_norm = hidden_norm(
            f"{name}.pre_feedforward_layernorm", config, schemes, self.mlp.gate_up.input_form
        )
        self.post_mlp_norm = hidden_norm(f"{name}.post_feedforward_layernorm", config, schemes)

    def __call__(self, x: Any, residual: Tensor, positions: Tensor) -> Tensor:
        x = self.post_attention_norm(self.attention(x, positions))
        x = self.pre_mlp_norm.add(x, residual)
        out: Tensor = self.post_mlp_norm(self.mlp(x))
        return out


class Gemma3ForCausalLM(Model):
    """Embeddings scaled by sqrt(hidden_size), tied head; scales and windows are in the config."""

    decoder_layer = Gemma3DecoderLayer
