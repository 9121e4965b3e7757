"""Shapes of well-known models by name, for `--load-format dummy`: benchmarks that need no files."""

from typing import Any

from octavo.model_config import ModelConfig, ModelError
from octavo.models.registry import config_from_dict

_LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
_LLAMA2 = {**_LLAMA, "vocab_size": 32000, "max_position_embeddings": 4096}
_TINY = {**_LLAMA2, "vocab_size": 512, "tie_word_embeddings": True, "dtype": "float32"}
_LLAMA3 = {**_LLAMA, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}


def _shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


# tiny-64 and tiny-128: one layer with one head of so many components.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {**_TINY, **_shape(64, 192, 2, 4, 2)},
    "tiny-64": {**_TINY, **_shape(64, 192, 1, 1, 1)},
    "tiny-128": {**_TINY, **_shape(128, 384, 1, 1, 1)},
    "smollm2-135m": {
        **_LLAMA,
        **_shape(576, 1536, 30, 9, 3),
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "llama2-7b": {**_LLAMA2, **_shape(4096, 11008, 32, 32, 32)},
    "llama2-13b": {**_LLAMA2, **_shape(5120, 13824, 40, 40, 40)},
    "llama2-70b": {**_LLAMA2, **_shape(8192, 28672, 80, 64, 8)},
    "llama3-8b": {**_LLAMA3, **_shape(4096, 14336, 32, 32, 8)},
    "llama3-70b": {**_LLAMA3, **_shape(8192, 28672, 80, 64, 8)},
}


def preset_config(name: str) -> ModelConfig:
    """The preset's config. Raises `ModelError` that lists the names."""
    if name not in PRESETS:
        raise ModelError(f"model {name!r}: no such preset; presets are {', '.join(PRESETS)}")
    return config_from_dict(PRESETS[name], f"preset {name}")
