"""Gemma 3, text part: norms before and after each block, norms on q and k, windowed and full layers mixed 5 to 1.

Gemma team 2025; tensor names of transformers' `Gemma3ForCausalLM`. Norm weights are kept minus one in its files
(`add_one`).
"""

import torch
from torch import Tensor

from octavo.layers.norm import RMSNorm
from octavo.model_config import ModelConfig
from octavo.models.decoder import DecoderLayer, Model


class Gemma3DecoderLayer(DecoderLayer):
    """h += norm(attention(norm(h))); h += norm(mlp(norm(h)))."""

    def __init__(
        self, name: str, config: ModelConfig, layer: int, *, kv_group: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(name, config, layer, kv_group=kv_group, dtype=dtype, device=device)

        def norm(suffix: str) -> RMSNorm:
            return RMSNorm(f"{name}.{suffix}", config.hidden_size, config.rms_norm_eps, dtype=dtype, add_one=True)

        self.input_norm = norm("input_layernorm")
        self.post_attention_norm = norm("post_attention_layernorm")
        self.pre_mlp_norm = norm("pre_feedforward_layernorm")
        self.post_mlp_norm = norm("post_feedforward_layernorm")

    def __call__(self, x: Tensor, residual: Tensor, positions: Tensor) -> Tensor:
        x = self.post_attention_norm(self.attention(x, positions))
        x = self.pre_mlp_norm.add(x, residual)
        return self.post_mlp_norm(self.mlp(x))


class Gemma3ForCausalLM(Model):
    """Embeddings scaled by sqrt(hidden_size), tied head; scales and windows are in the config."""

    decoder_layer = Gemma3DecoderLayer
    norm_add_one = True
