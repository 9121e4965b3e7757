"""From the keys of a `config.json` to a `ModelConfig`, checked field by field.

A GGUF header is first renamed to the keys of `config.json`, so that both kinds of file go through
the same reading and the same checks; errors name the file and the field as that file spells it.
Only keys named here and in the families' files are ever read: nothing in a config file can choose
code.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from octavo.model_config import ModelConfig, ModelError, RopeConfig

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_POSITIONS = 1 << 27

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Fields:
    """Typed reading of one file's fields. `spelling` maps the keys of config.json to those of the
    file; others are named with `prefix` before them.
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


def read_decoder(fields: Fields, **own: Any) -> ModelConfig:
    """The fields that families share, as a plain pre-norm decoder has them.

    own: fields of `ModelConfig` that a family has read by itself, in place of these.
    """
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
    bias = fields.flag("attention_bias", False)
    vocab_size = fields.integer("vocab_size", high=1 << 24)
    shared: dict[str, Any] = dict(
        architecture=fields.get("architectures")[0],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.integer("max_position_embeddings", high=MAX_POSITIONS),
        rms_norm_eps=fields.number("rms_norm_eps", high=1.0),
        layer_windows=(0,) * num_layers,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        activation=_ACTIVATIONS[activation],
        attention_scale=head_dim**-0.5,
        bos_token_id=next(iter(fields.token_ids("bos_token_id", vocab_size)), None),
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        checkpoint_dtype=_read_dtype(fields),
    )
    if "rope" not in own:
        key = "rope_parameters" if fields.table("rope_parameters") else "rope_scaling"
        shared["rope"] = read_rope(fields, key, fields.table(key))
    return ModelConfig(**{**shared, **own})


def read_windows(fields: Fields, has_window: Callable[[int], bool]) -> tuple[int, ...]:
    """Per layer: `sliding_window` in tokens, or 0. `layer_types` says which where a file has it,
    else `has_window`.
    """
    num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    if fields.get("sliding_window") is None:
        return (0,) * num_layers
    window = fields.integer("sliding_window", high=MAX_POSITIONS)
    kinds = fields.get("layer_types")
    if kinds is None:
        return tuple(window if has_window(layer) else 0 for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error("layer_types", f"is not a list of {num_layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.error("layer_types", f"{kind!r} is neither full_attention nor sliding_attention")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def read_rope(fields: Fields, key: str, table: Mapping[str, Any]) -> RopeConfig:
    """The rotary settings in `table`, which the file has under `key`. Older files have `rope_theta`
    outside of it.
    """
    inner = Fields(fields.source, without_none(table), prefix=f"{key}.")
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


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that have a value: null stands for a key that is left out."""
    return {key: value for key, value in values.items() if value is not None}


def read_token_ids(value: Any, source: str, field: str, vocab_size: int) -> tuple[int, ...]:
    """One id, a list of ids or nothing, each inside the vocabulary."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
            raise ModelError(f"{source}: {field}: {item!r} is not a token id below {vocab_size}")
    return tuple(ids)


def _read_dtype(fields: Fields) -> str | None:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    dtype = fields.text(key, "")
    return dtype if dtype in ("float32", "float16", "bfloat16") else None
