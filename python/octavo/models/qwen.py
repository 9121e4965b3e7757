"""Qwen2 and Qwen3: Llama with biases on q, k and v, or with norms on the heads of q and k.

Qwen team 2024 and 2025; tensor names of transformers' `Qwen2ForCausalLM` and `Qwen3ForCausalLM`.
"""

from typing import ClassVar

from octavo.model_config import ModelConfig
from octavo.models.config_reader import MAX_LAYERS, Fields, read_decoder, read_windows
from octavo.models.decoder import Model


def windows(fields: Fields) -> tuple[int, ...]:
    """Of each layer; without `layer_types` the first `max_window_layers` have none."""
    if not fields.flag("use_sliding_window", False):
        return (0,) * fields.integer("num_hidden_layers", high=MAX_LAYERS)
    return read_windows(fields, lambda layer: layer >= fields.integer("max_window_layers", 28, low=0, high=MAX_LAYERS))


class Qwen2ForCausalLM(Model):
    """Biases on q, k and v alone."""

    architectures = ("Qwen2ForCausalLM",)
    defaults: ClassVar = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
    gguf_architecture = "qwen2"

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        return read_decoder(fields, layer_windows=windows(fields), qkv_bias=True, output_bias=False)


class Qwen3ForCausalLM(Model):
    """Norms on the heads of q and k."""

    architectures = ("Qwen3ForCausalLM",)
    defaults: ClassVar = {
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "head_dim": 128,
    }
    gguf_architecture = "qwen3"

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        return read_decoder(fields, layer_windows=windows(fields), qk_norm=True)
