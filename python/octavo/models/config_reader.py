"""From the keys of a `config.json` to a `ModelConfig`, checked field by field.

A GGUF header is first renamed to the keys of `config.json`, so that both kinds of file go through
the same reading and the same checks; errors name the file and the field as that file spells it.
Only keys named here and in the families' files are ever read: nothing in a config file can choose
code. What nobody read is warned about (`Fields.unknown`), or refused where it is known to ask for
another computation (`known_keys.py`).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octavo.model_config import ModelConfig, ModelError, RopeConfig
from octavo.models.known_keys import HARMLESS, REFUSED

logger = logging.getLogger(__name__)

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_POSITIONS = 1 << 27

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Fields:
    """Typed reading of one object of a file, which remembers what was asked for.

    A key that the object lacks has its value of `defaults`; null is a value, that of nothing.
    """

    def __init__(
        self,
        source: str,
        values: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any] | None = None,
        spelling: Mapping[str, str] | None = None,
        prefix: str = "",
    ) -> None:
        """source: the file's name. spelling: maps keys of config.json to those of the file. prefix:
        of the keys of an object within the file.
        """
        self.source = source
        self.values = values
        self.defaults = defaults or {}
        self.spelling = spelling or {}
        self.prefix = prefix
        self._asked: set[str] = set()
        self._parts: list[Fields] = []

    def inside(self, key: str, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> "Fields":
        """Of an object under `key`."""
        part = Fields(self.source, values, defaults=defaults, spelling=self.spelling, prefix=f"{self.prefix}{key}.")
        self._parts.append(part)
        return part

    def unknown(self) -> list[str]:
        """Names of all keys that nobody has asked for and that are not known to be harmless."""
        own = [
            self.label(key)
            for key in self.values
            if key not in self._asked and key not in HARMLESS and key not in REFUSED and not key.startswith("_")
        ]
        return own + [name for part in self._parts for name in part.unknown()]

    def refuse_other_computations(self) -> None:
        """Raises `ModelError` for what `known_keys.REFUSED` names."""
        for key, (neutral, reason) in REFUSED.items():
            value = self.values.get(key)
            if (value and value != neutral) or (value is False and neutral is True):
                raise self.error(key, f"{shortened(value)} is not supported: {reason}")

    def error(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self.source}: {self.label(key)}: {problem}")

    def warn(self, key: str, what: str) -> None:
        logger.warning("%s: %s: %s", self.source, self.label(key), what)

    def label(self, key: str) -> str:
        return self.spelling.get(self.prefix + key, self.prefix + key)

    def get(self, key: str) -> Any:
        self._asked.add(key)
        return self.values[key] if key in self.values else self.defaults.get(key)

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_WIDTH) -> int:
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"{shortened(value)} is not an integer")
        if not low <= value <= high:
            raise self.error(key, f"{value} is outside {low}..{high}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0, high: float = math.inf) -> float:
        """A finite number above `low` and at most `high`."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "missing")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"{shortened(value)} is not a number")
        if not (low < value <= high and math.isfinite(value)):
            raise self.error(key, f"{value} must be a finite number above {low:g}")
        return float(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` finite numbers above 0."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(key, f"{shortened(value)} is not a list of {length} numbers")
        items = Fields(self.source, {str(i): item for i, item in enumerate(value)}, prefix=f"{self.label(key)}.")
        return tuple(items.number(str(i)) for i in range(length))

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"{shortened(value)} is not true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"{shortened(value)} is not a string")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        return read_token_ids(self.get(key), self.source, self.label(key), vocab_size)

    def table(self, key: str) -> Mapping[str, Any]:
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(key, f"{shortened(value)} is not an object")
        return value


def head_size(fields: Fields) -> int:
    """Elements of one head."""
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads", high=4096)
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.error("hidden_size", f"{hidden_size} is not a multiple of the {num_heads} attention heads")
    head_dim = fields.integer("head_dim", hidden_size // num_heads, high=1024)
    if head_dim % 2:
        raise fields.error("head_dim", f"{head_dim} is odd; rotary embedding needs pairs")
    return head_dim


def read_decoder(fields: Fields, *, activation: str = "hidden_act", **own: Any) -> ModelConfig:
    """The fields that families share, as a plain pre-norm decoder has them.

    activation: the key of the feed-forward part's function. own: fields of `ModelConfig` that a
    family knows or has read by itself; `architecture`, `rope` and `layer_windows` among them.
    """
    num_heads = fields.integer("num_attention_heads", high=4096)
    num_kv_heads = fields.integer("num_key_value_heads", num_heads, high=4096)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"{num_kv_heads} does not divide the {num_heads} attention heads")
    head_dim = head_size(fields)
    function = fields.text(activation, "")
    if function not in _ACTIVATIONS:
        raise fields.error(activation, f"{shortened(function)} is not one of {', '.join(_ACTIVATIONS)}")
    vocab_size = fields.integer("vocab_size", high=1 << 24)
    shared: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_longest_sequence(fields, own["rope"]),
        rms_norm_eps=fields.number("rms_norm_eps", high=1.0),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        activation=_ACTIVATIONS[function],
        attention_scale=head_dim**-0.5,
        bos_token_id=next(iter(fields.token_ids("bos_token_id", vocab_size)), None),
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        checkpoint_dtype=read_dtype(fields),
    )
    return ModelConfig(**{**shared, **own})


def _longest_sequence(fields: Fields, rope: RopeConfig) -> int:
    """Files that had YaRN added to them often keep the length of before."""
    longest = fields.integer("max_position_embeddings", high=MAX_POSITIONS)
    if rope.scaling == "yarn":
        longest = max(longest, int(min(rope.original_max_position * rope.factor, MAX_POSITIONS)))
    return longest


def read_windows(fields: Fields, window: int, has_window: Callable[[int], bool]) -> tuple[int, ...]:
    """Per layer: `window` in tokens, or 0. `layer_types` says which where a file has it, else
    `has_window`. window: 0 where the file has none.
    """
    num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    kinds = fields.get("layer_types")
    if kinds is None:
        return tuple(window if has_window(layer) else 0 for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error("layer_types", f"is not a list of {num_layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.error("layer_types", f"{shortened(kind)} is neither full_attention nor sliding_attention")
    if "sliding_attention" in kinds and not window:
        raise fields.error("sliding_window", "missing, but layer_types has sliding_attention")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def warn_unknown(source: str, keys: Sequence[str]) -> None:
    """Names keys that a file has and nobody reads."""
    if keys:
        some = ", ".join(shortened(key).strip("'") for key in keys[:20])
        more = f" and {len(keys) - 20} more" if len(keys) > 20 else ""
        logger.warning("%s: unknown keys, which have no effect: %s%s", source, some, more)


def shortened(value: Any) -> str:
    """As Python writes it, but no longer than a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]} ..."


def read_token_ids(value: Any, source: str, field: str, vocab_size: int) -> tuple[int, ...]:
    """One id, a list of ids or nothing, each inside the vocabulary."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
            raise ModelError(f"{source}: {field}: {shortened(item)} is not a token id below {vocab_size}")
    return tuple(ids)


def read_dtype(fields: Fields) -> str | None:
    """The checkpoint's type, where the config says one that weights can be held in; float64 is held
    as float32.
    """
    name = fields.text("dtype", fields.text("torch_dtype", ""))
    return {"float64": "float32"}.get(name, name if name in ("float32", "float16", "bfloat16") else None)
