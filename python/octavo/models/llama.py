"""Llama 2 and 3, SmolLM2 and Mistral: the plain pre-norm decoder; Mistral may have a window.

Touvron et al. 2023; tensor names of transformers' `LlamaForCausalLM`.
"""

from typing import Any, ClassVar

from octavo.model_config import ModelConfig
from octavo.models.config_reader import MAX_POSITIONS, Fields, read_decoder, read_windows
from octavo.models.decoder import Model
from octavo.models.rope_reader import read_rope


class LlamaForCausalLM(Model):
    """Pre-norm blocks with rotary attention and a gated feed-forward part."""

    architectures = ("LlamaForCausalLM",)
    headless_architectures = ("LlamaModel",)
    model_type = "llama"
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 10000.0,
    }
    gguf_architecture = "llama"  # of Mistral's GGUF files too
    gguf_interleaves_heads = True
    gguf_rope_factors = True

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        if fields.get("sliding_window") is not None:  # transformers forgets old keys then, but only as it generates
            raise fields.error("sliding_window", "not supported with LlamaForCausalLM, which attends to everything")
        bias = fields.flag("attention_bias", False)
        return read_decoder(
            fields,
            architecture=cls.architectures[0],
            rope=read_rope(fields),
            layer_windows=read_windows(fields, 0, lambda layer: False),
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=fields.flag("mlp_bias", False),
        )


class MistralForCausalLM(Model):
    """Llama with a sliding window in all layers, where its config has one."""

    architectures = ("MistralForCausalLM",)
    headless_architectures = ("MistralModel",)
    model_type = "mistral"
    defaults: ClassVar[dict[str, Any]] = {
        **LlamaForCausalLM.defaults,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        window = fields.integer("sliding_window", 0, high=MAX_POSITIONS)
        windows = read_windows(fields, window, lambda layer: True)
        if window and 0 in windows:
            raise fields.error("layer_types", "full_attention beside sliding_window is not supported with Mistral")
        return read_decoder(fields, architecture=cls.architectures[0], rope=read_rope(fields), layer_windows=windows)
