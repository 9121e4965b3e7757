"""What a model is: one frozen `ModelConfig`, read from `config.json` or from GGUF metadata and checked field by field.

Knows no tensors and no torch. A GGUF header is first renamed to the keys of `config.json`, so that both kinds of file
go through the same reading and the same checks; errors name the file and the field as that file spells it. Only the
keys named here are ever read: nothing in a config file can choose code.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_POSITIONS = 1 << 27


class ModelError(ValueError):
    """A model's files cannot be used. The message is one line that names the file, the field and what is wrong."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer. `factors` divides each frequency (GGUF's `rope_freqs.weight`)."""

    theta: float
    scaling: str = "default"  # "default", "linear", "llama3" or "factors"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and options of one decoder-only model. Lengths are in tokens, sizes in elements."""

    architecture: str  # "llama", "mistral", "qwen2", "qwen3" or "gemma3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int  # the longest sequence the model was trained for
    rms_norm_eps: float
    rope: RopeConfig
    layer_windows: tuple[int, ...]  # per layer; 0 = full attention
    local_rope: RopeConfig | None = None  # of the layers with a window, where it differs (Gemma 3)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_add_one: bool = False  # files keep the weights of norms minus one (Gemma)
    activation: str = "silu"  # "silu" or "gelu_tanh"
    attention_scale: float = 1.0
    logit_soft_cap: float = 0.0
    embedding_scale: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    checkpoint_dtype: str | None = None  # "float32", "float16", "bfloat16", or None where the file does not say

    def num_parameters(self) -> int:
        """Weights of the linear layers and embeddings, norms left out."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)


@dataclass(frozen=True)
class KvGroup:
    """Layers that share a block table. `layers[j]` keeps its keys and values in pool tensor j."""

    window: int  # 0 = full attention
    layers: list[int]


def kv_groups(config: ModelConfig) -> list[KvGroup]:
    """Cuts the layers into groups of equal size, one window a group (DESIGN.md, "one pool").

    The size is the number of layers of the rarest kind, as in vLLM's hybrid allocator; when kinds are nearly as
    frequent, the largest, since a few unused places cost less than twice as many block tables.
    """
    kinds: dict[int, list[int]] = {}
    for layer, window in enumerate(config.layer_windows):
        kinds.setdefault(window, []).append(layer)
    counts = [len(layers) for layers in kinds.values()]
    size = max(counts) if max(counts) <= 1.25 * min(counts) else min(counts)
    return [
        KvGroup(window, layers[start : start + size])
        for window, layers in sorted(kinds.items())
        for start in range(0, len(layers), size)
    ]


class _Fields:
    """Typed reading of one file's fields. `spelling` maps the keys of config.json to those of the file; others are
    named with `prefix` before them.
    """

    def __init__(
        self, source: str, values: Mapping[str, Any], spelling: Mapping[str, str] | None = None, prefix: str = ""
    ) -> None:
        self.prefix = prefix
        self.source = source
        self.values = values
        self.spelling = spelling or {}

    def error(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self.source}: {self.label(key)}: {problem}")

    def label(self, key: str) -> str:
        return self.spelling.get(key, self.prefix + key)

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_WIDTH) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"{value!r} is not an integer")
        if not low <= value <= high:
            raise self.error(key, f"{value} is outside {low}..{high}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0, high: float = math.inf) -> float:
        """A finite number above `low` and at most `high`."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "missing")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"{value!r} is not a number")
        if not (low < value <= high and math.isfinite(value)):
            raise self.error(key, f"{value} must be a finite number above {low:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"{value!r} is not true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"{value!r} is not a string")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        return read_token_ids(self.values.get(key), self.source, self.label(key), vocab_size)

    def table(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(key, f"{value!r} is not an object")
        return value


ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",  # its text part
}

# What transformers takes where a config.json leaves a field out. Gemma 3's published files leave out nearly everything.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072},
    "qwen2": {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    "qwen3": {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128},
    "gemma3": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ModelError` where it is missing, unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def config_from_folder(folder: Path) -> ModelConfig:
    """Reads `config.json` of a Hugging Face folder."""
    path = folder / "config.json"
    return config_from_dict(read_json(path), str(path))


def config_from_dict(values: Mapping[str, Any], source: str, spelling: Mapping[str, str] | None = None) -> ModelConfig:
    """Checks the keys of a `config.json`. `source` is the file's name in errors, `spelling` its names of our keys."""
    fields = _Fields(source, values, spelling)
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise fields.error("architectures", f"{names!r} is not a list of one name")
    architecture = ARCHITECTURES.get(names[0]) if isinstance(names[0], str) else None
    if architecture is None:
        raise fields.error("architectures", f"{names[0]!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    if fields.get("auto_map") is not None:
        raise fields.error("auto_map", "the model asks for its own Python code, which Octavo never runs")
    if fields.get("quantization_config") is not None:
        raise fields.error(
            "quantization_config", "quantised safetensors are not supported; use full weights or a GGUF file"
        )
    outer = values
    if isinstance(values.get("text_config"), dict):
        outer = {**values, **{key: item for key, item in values["text_config"].items() if item is not None}}
    return _build(architecture, _Fields(source, {**_DEFAULTS[architecture], **_without_none(outer)}, spelling))


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _build(architecture: str, fields: _Fields) -> ModelConfig:
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    num_heads = fields.integer("num_attention_heads", high=4096)
    num_kv_heads = fields.integer("num_key_value_heads", num_heads, high=4096)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"{num_kv_heads} does not divide the {num_heads} attention heads")
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.error("hidden_size", f"{hidden_size} is not a multiple of the {num_heads} attention heads")
    head_dim = fields.integer("head_dim", hidden_size // num_heads, high=1024)
    if head_dim % 2:
        raise fields.error("head_dim", f"{head_dim} is odd; rotary embedding needs pairs")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "only 1 is supported")
    activation_key = "hidden_activation" if fields.get("hidden_activation") is not None else "hidden_act"
    activation = fields.text(activation_key, "silu")
    if activation not in _ACTIVATIONS:
        raise fields.error(activation_key, f"{activation!r} is not one of {', '.join(_ACTIVATIONS)}")
    gemma = architecture == "gemma3"
    bias = fields.flag("attention_bias", False)
    rope, local_rope = _read_rope(architecture, fields)
    vocab_size = fields.integer("vocab_size", high=1 << 24)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.integer("max_position_embeddings", high=MAX_POSITIONS),
        rms_norm_eps=fields.number("rms_norm_eps", high=1.0),
        rope=rope,
        local_rope=local_rope,
        layer_windows=_read_windows(architecture, fields, num_layers),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=architecture == "qwen2" or bias,
        output_bias=architecture != "qwen2" and bias,
        mlp_bias=fields.flag("mlp_bias", False),
        qk_norm=architecture in ("qwen3", "gemma3"),
        norm_add_one=gemma,
        activation=_ACTIVATIONS[activation],
        attention_scale=(fields.number("query_pre_attn_scalar") if gemma else head_dim) ** -0.5,
        logit_soft_cap=fields.number("final_logit_softcapping", 0.0) if gemma else 0.0,
        embedding_scale=hidden_size**0.5 if gemma else 1.0,
        bos_token_id=next(iter(fields.token_ids("bos_token_id", vocab_size)), None),
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        checkpoint_dtype=_read_dtype(fields),
    )


def read_token_ids(value: Any, source: str, field: str, vocab_size: int) -> tuple[int, ...]:
    """One id, a list of ids or nothing, each inside the vocabulary."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
            raise ModelError(f"{source}: {field}: {item!r} is not a token id below {vocab_size}")
    return tuple(ids)


def _read_dtype(fields: _Fields) -> str | None:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    dtype = fields.text(key, "")
    return dtype if dtype in ("float32", "float16", "bfloat16") else None


def _read_windows(architecture: str, fields: _Fields, num_layers: int) -> tuple[int, ...]:
    """Per layer: the sliding window in tokens, or 0. `layer_types` rules where a file has it."""
    if architecture == "llama" or (architecture in ("qwen2", "qwen3") and not fields.flag("use_sliding_window", False)):
        return (0,) * num_layers
    if fields.get("sliding_window") is None:
        return (0,) * num_layers
    window = fields.integer("sliding_window", high=MAX_POSITIONS)
    kinds = fields.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise fields.error("layer_types", f"is not a list of {num_layers} layers")
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise fields.error("layer_types", f"{kind!r} is neither full_attention nor sliding_attention")
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if architecture == "gemma3":
        pattern = fields.integer("sliding_window_pattern", high=MAX_LAYERS)
        return tuple(0 if (layer + 1) % pattern == 0 else window for layer in range(num_layers))
    if architecture in ("qwen2", "qwen3"):
        first = fields.integer("max_window_layers", 28, low=0, high=MAX_LAYERS)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    return (window,) * num_layers


def _read_rope(architecture: str, fields: _Fields) -> tuple[RopeConfig, RopeConfig | None]:
    """Rotary settings of the full layers and, for Gemma 3, of the window layers.

    transformers 5 writes `rope_parameters` (Gemma 3: one table a layer type); older files have `rope_theta`,
    `rope_scaling` and `rope_local_base_freq`.
    """
    parameters = fields.table("rope_parameters")
    if architecture == "gemma3":
        if "full_attention" in parameters:
            full = _rope_from_table(fields, "rope_parameters", _subtable(fields, parameters, "full_attention"))
            local = _rope_from_table(fields, "rope_parameters", _subtable(fields, parameters, "sliding_attention"))
            return full, local
        return (
            _rope_from_table(fields, "rope_scaling", fields.table("rope_scaling")),
            RopeConfig(theta=fields.number("rope_local_base_freq")),
        )
    key = "rope_parameters" if parameters else "rope_scaling"
    return _rope_from_table(fields, key, parameters or fields.table("rope_scaling")), None


def _subtable(fields: _Fields, parameters: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    table = parameters.get(kind)
    if not isinstance(table, dict):
        raise fields.error(f"rope_parameters.{kind}", "missing or not an object")
    return table


def _rope_from_table(fields: _Fields, key: str, table: Mapping[str, Any]) -> RopeConfig:
    inner = _Fields(fields.source, _without_none(table), prefix=f"{key}.")
    theta = inner.number("rope_theta") if "rope_theta" in inner.values else fields.number("rope_theta")
    kind = inner.text("rope_type", inner.text("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", inner.number("factor"))
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if low >= high:
            raise inner.error("low_freq_factor", f"{low:g} is not below high_freq_factor {high:g}")
        original = inner.integer("original_max_position_embeddings", high=MAX_POSITIONS)
        return RopeConfig(theta, "llama3", inner.number("factor"), low, high, original)
    if kind == "factors":
        return RopeConfig(theta, "factors", factors=tuple(table["factors"]))
    raise fields.error(f"{key}.rope_type", f"{kind!r} is not supported; supported are default, linear and llama3")
