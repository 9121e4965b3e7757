"""Qwen2 and Qwen3: Llama with biases on q, k and v, or with norms on the heads of q and k.

Qwen team 2024 and 2025; tensor names of transformers' `Qwen2ForCausalLM` and `Qwen3ForCausalLM`.
"""

from typing import Any, ClassVar

from octavo.model_config import ModelConfig
from octavo.models.config_reader import MAX_LAYERS, MAX_POSITIONS, Fields, read_decoder, read_windows
from octavo.models.decoder import Model
from octavo.models.rope_reader import read_rope


def windows(fields: Fields) -> tuple[int, ...]:
    """Of each layer; without `layer_types` the first `max_window_layers` have none."""
    window = fields.integer("sliding_window", 0, low=0, high=MAX_POSITIONS)
    without = fields.integer("max_window_layers", 0, low=0, high=MAX_LAYERS)
    if not fields.flag("use_sliding_window", False):
        window = 0
    return read_windows(fields, window, lambda layer: layer >= without)


class Qwen2ForCausalLM(Model):
    """Biases on q, k and v alone."""

    architectures = ("Qwen2ForCausalLM",)
    headless_architectures = ("Qwen2Model",)
    model_type = "qwen2"
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "rope_theta": 10000.0,
    }
    gguf_architecture = "qwen2"

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        return read_decoder(
            fields,
            architecture=cls.architectures[0],
            rope=read_rope(fields),
            layer_windows=windows(fields),
            qkv_bias=True,
        )


class Qwen3ForCausalLM(Model):
    """Norms on the heads of q and k."""

    architectures = ("Qwen3ForCausalLM",)
    headless_architectures = ("Qwen3Model",)
    model_type = "qwen3"
    defaults: ClassVar[dict[str, Any]] = {**Qwen2ForCausalLM.defaults, "head_dim": 128}
    gguf_architecture = "qwen3"

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        bias = fields.flag("attention_bias", False)
        return read_decoder(
            fields,
            architecture=cls.architectures[0],
            rope=read_rope(fields),
            layer_windows=windows(fields),
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=True,
        )
