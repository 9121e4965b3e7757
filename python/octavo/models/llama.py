"""Llama 2 and 3, SmolLM2 and Mistral: the plain pre-norm decoder; Mistral may have a window.

Touvron et al. 2023; tensor names of transformers' `LlamaForCausalLM`.
"""

from typing import ClassVar

from octavo.model_config import ModelConfig
from octavo.models.config_reader import Fields, read_decoder, read_windows
from octavo.models.decoder import Model


class LlamaForCausalLM(Model):
    """Pre-norm blocks with rotary attention and a gated feed-forward part."""

    architectures = ("LlamaForCausalLM",)
    defaults: ClassVar = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    gguf_architecture = "llama"  # of Mistral's GGUF files too
    gguf_interleaves_heads = True


class MistralForCausalLM(Model):
    """Llama with a sliding window in all layers, where its config has one."""

    architectures = ("MistralForCausalLM",)
    defaults: ClassVar = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072}

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        return read_decoder(fields, layer_windows=read_windows(fields, lambda layer: True))
