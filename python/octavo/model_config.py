"""What a model is: one frozen `ModelConfig`. Knows no tensors, no torch and no family of models.

How a `config.json` becomes one is `models/config_reader.py` and the families' own files.
"""

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_ERROR_BYTES = 2048
"""Of a `ModelError`: what a file holds goes into the message, and a file may hold anything."""


class ModelError(ValueError):
    """A model's files cannot be used. The message is one line that names the file, the field and
    what is wrong; what is beyond `MAX_ERROR_BYTES` is cut.
    """

    def __init__(self, message: str) -> None:
        line = "".join(letter if letter.isprintable() else " " for letter in message)
        encoded = line.encode("utf-8", "replace")
        if len(encoded) > MAX_ERROR_BYTES:
            line = encoded[: MAX_ERROR_BYTES - 4].decode("utf-8", "ignore") + " ..."
        super().__init__(line)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer. `layers/rotary.py` says what each scaling computes."""

    theta: float
    scaling: str = "default"  # "default", "linear", "llama3", "yarn", "longrope" or "proportional"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    original_max_position: int = 8192  # llama3, yarn, longrope: the length before it was extended
    beta_fast: float = 32.0  # yarn: rotations within that length from which a frequency is kept
    beta_slow: float = 1.0  # and up to which it is divided by `factor`
    truncate: bool = True  # yarn: the ramp between the two begins and ends at whole dimensions
    rotated_part: float = 1.0  # proportional: of the dimensions of a head; the others stay as they are
    factors: tuple[float, ...] = ()  # each divides its frequency; of longrope the short ones
    long_factors: tuple[float, ...] = ()  # longrope: in their place where more than the original length is served
    attention_factor: float = 1.0  # multiplies cosines and sines


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and options of one decoder-only model. Lengths are in tokens, sizes in elements."""

    architecture: str  # as config.json names it: "LlamaForCausalLM"
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
    has_head: bool = True  # it was saved with one, so that it can generate
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
    checkpoint_dtype: str | None = None  # "float32", "float16", "bfloat16", or None where the config does not say

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
    """Cuts the layers into groups of equal size, one window a group. DESIGN.md says why.

    The size is the number of layers of the rarest kind, as in vLLM's hybrid allocator; when kinds
    are nearly as frequent, the largest, since a few unused places cost less than twice as many
    block tables.
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ModelError` where it is missing, unreadable or not an
    object.
    """
    try:
        refuse_special_file(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def refuse_special_file(path: Path) -> None:
    """Reading a pipe or a device may wait or go on for ever. Raises `ModelError`, or the `OSError`
    of a file that is not there.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ModelError(f"{path}: not a regular file")
