"""The header of a GGUF file as a config, as llama.cpp reads it (`llama-model.cpp`, `load_hparams`).

Renamed to the keys of `config.json`, it goes through the same checks. What llama.cpp takes where a
header leaves a key out differs from transformers, and stands here.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from octavo.model_config import ModelConfig, ModelError, RopeConfig
from octavo.models.config_reader import Fields, shortened, warn_unknown
from octavo.models.registry import GGUF_FAMILIES, config_from_dict
from octavo.weights.gguf import GgufHeader, GgufSource
from octavo.weights.names import GGUF_KEYS, GGUF_OWN_KEYS

DEFAULTS = {
    "rope_theta": 1e4,
    "rope_local_base_freq": 1e4,
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window_pattern": 6,
}

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "expert_count": ((0,), "mixtures of experts are not supported"),
    "nextn_predict_layers": ((0,), "layers that predict further tokens are not supported"),
    "attention.causal": ((True,), "attention to later tokens is not supported"),
    "attention.clamp_kqv": ((0,), "clamped queries, keys and values are not supported"),
    "attention.max_alibi_bias": ((0,), "ALiBi is not supported"),
    "attention.scale": ((0,), "a scale of attention other than the heads' is not supported"),
    "attention.output_scale": ((0, 1), "scaled outputs of attention are not supported"),
    "attention.shared_kv_layers": ((0,), "layers that share keys and values are not supported"),
    "attention.temperature_length": ((0,), "attention of another temperature is not supported"),
    "attention.temperature_scale": ((0,), "attention of another temperature is not supported"),
    "attn_logit_softcapping": ((0,), "a soft cap of attention is not supported"),
    "embedding_scale": ((0, 1), "scaled embeddings are not supported"),
    "logit_scale": ((0, 1), "scaled logits are not supported"),
    "residual_scale": ((0, 1), "a scaled residual stream is not supported"),
    "use_parallel_residual": ((False,), "parallel blocks are not supported"),
    "rope.dimension_sections": ((0,), "rotary positions of several dimensions are not supported"),
    "rope.scaling.alpha": ((0,), "this scaling of rotary frequencies is not supported"),
    "rope.scaling.yarn_attn_factor": ((1,), "only 1 is supported"),
    "rope.scaling.yarn_beta_fast": ((32,), "only 32 is supported"),
    "rope.scaling.yarn_beta_slow": ((1,), "only 1 is supported"),
    "rope.scaling.yarn_ext_factor": ((1, -1), "only 1 is supported"),
    "rope.scaling.yarn_log_multiplier": ((0,), "only 0 is supported"),
}
"""Key without the architecture -> values that change nothing, and why no other can be."""

FREQUENCIES = "rope_freqs.weight"  # divides each rotary frequency by a factor
LONGROPE = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}

HARMLESS = (
    "attention.layer_norm_epsilon",
    "expert_used_count",
    "pooling_type",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "vocab_size",
)


def config_from_gguf(header: GgufHeader, other_parts: Sequence[GgufHeader] = ()) -> ModelConfig:
    """Renames the metadata to the keys of `config.json` and checks them there; warns of keys that
    have no meaning here. Raises `ModelError`.
    """
    fields, values, factors = _read(header, other_parts)
    prefix = f"{header.architecture}."
    spelling = {key: prefix + suffix for key, suffix in (GGUF_KEYS | GGUF_OWN_KEYS).items()}
    spelling |= {key: f"tokenizer.ggml.{key}" for key in ("bos_token_id", "eos_token_id")}
    spelling |= {f"rope_parameters.{key}": name for key, name in LONGROPE.items()}
    config = config_from_dict(values, header.path, spelling=spelling, defaults=DEFAULTS)
    _check_head_sizes(fields, config.head_dim)
    scale = fields.number("rope.scaling.attn_factor", 1.0)
    unknown = [name for name in fields.unknown() if name.removeprefix(prefix) not in HARMLESS]
    warn_unknown(header.path, unknown)
    rope = config.rope
    if FREQUENCIES in factors:
        rope = _divided(rope, header, config.head_dim, factors[FREQUENCIES])
    return replace(
        config,
        rope=_scaled(rope, scale),
        local_rope=config.local_rope and _scaled(config.local_rope, scale),
        checkpoint_dtype=_dtype((header, *other_parts)),
    )


def values_from_gguf(header: GgufHeader, other_parts: Sequence[GgufHeader] = ()) -> dict[str, Any]:
    """The header as a `config.json`. Raises `ModelError` for what such a file has no key for."""
    fields, values, factors = _read(header, other_parts)
    if FREQUENCIES in factors:
        raise ModelError(f"{header.path}: {FREQUENCIES}: config.json has no key for such factors")
    if fields.number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise fields.error("rope.scaling.attn_factor", "config.json has no key for it")
    family = GGUF_FAMILIES[header.architecture]
    defaults = {key: value for key, value in DEFAULTS.items() if key in family.defaults}
    table = values.pop("rope_parameters")
    if "sliding_attention" in table:  # a table a kind of layer
        values["rope_local_base_freq"] = table["sliding_attention"]["rope_theta"] or defaults["rope_local_base_freq"]
        table = table["full_attention"]
    return {"model_type": family.model_type, **defaults, **values, "rope_scaling": table or None}


def _read(
    header: GgufHeader, other_parts: Sequence[GgufHeader]
) -> tuple[Fields, dict[str, Any], dict[str, list[float]]]:
    """The architecture's metadata, the same under the keys of `config.json`, and the tensors that
    divide rotary frequencies.
    """
    family = GGUF_FAMILIES.get(header.architecture)
    if family is None:
        raise ModelError(
            f"{header.path}: general.architecture: {shortened(header.architecture)} is not supported; supported are "
            f"{', '.join(GGUF_FAMILIES)}"
        )
    prefix, metadata = f"{header.architecture}.", header.metadata()
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    fields = Fields(header.path, own, prefix=prefix)
    for key, (neutral, reason) in REFUSED.items():
        if fields.get(key) not in (None, *neutral):
            raise fields.error(key, f"{shortened(fields.get(key))} is not supported: {reason}")
    shapes = {name: shape for part in (header, *other_parts) for name, _, shape, _, _ in part.tensors()}
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise ModelError(f"{header.path}: token_embd.weight: missing or not a matrix")
    # More end tokens are found by their text (see `weights/text.py`).
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    values = {key: value for key, suffix in GGUF_KEYS.items() if (value := fields.get(suffix)) is not None}
    values |= {
        "architectures": [family.architectures[0]],
        "vocab_size": embedding[0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [token for token in ends if token is not None],
    }
    table = values["rope_parameters"] = _rope_table(fields)
    if "blk.0.attn_output.bias" in shapes:
        values["attention_bias"] = True
    factors = _rope_factors(header, other_parts, shapes)
    allowed = LONGROPE.values() if table.get("rope_type") == "longrope" else [FREQUENCIES]
    for name in factors:
        if not family.gguf_rope_factors or name not in allowed:
            raise ModelError(f"{header.path}: {name}: not part of a {header.architecture} model with such a header")
    table |= {key: factors[name] for key, name in LONGROPE.items() if name in factors}
    family.complete_gguf(values, fields)
    return fields, values, factors


def _rope_table(fields: Fields) -> dict[str, Any]:
    """The scaling of rotary frequencies as `rope_parameters` has it. A factor without a type is
    linear; 0 is none.
    """
    kind = fields.text("rope.scaling.type", "linear")
    factor = fields.get("rope.scaling.factor")
    old = fields.get("rope.scale_linear")
    factor = old if factor is None else factor
    original = fields.get("rope.scaling.original_context_length") or None
    if kind in ("linear", "yarn"):
        table = {"rope_type": kind, "factor": factor} if factor else {}
        return {**table, "original_max_position_embeddings": original} if table and kind == "yarn" else table
    if kind == "none":
        return {}
    if kind == "longrope" and factor:
        raise fields.error("rope.scaling.factor", f"{factor} is not supported beside longrope")
    return {"rope_type": kind, "original_max_position_embeddings": original, "attention_factor": 1.0}


def _rope_factors(
    header: GgufHeader, other_parts: Sequence[GgufHeader], shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[float]]:
    """The tensors that divide rotary frequencies, by name."""
    names = [name for name in (FREQUENCIES, *LONGROPE.values()) if name in shapes]
    if not names:
        return {}
    source = GgufSource(header, other_parts=other_parts)
    factors = {}
    for name in names:
        if len(shapes[name]) != 1:
            raise ModelError(f"{header.path}: {name}: shape {list(shapes[name])}, but must have one dimension")
        values = torch.empty(shapes[name][0])
        source.fill(name, values)
        if not (values > 0).all():
            raise ModelError(f"{header.path}: {name}: holds factors that are not above 0")
        factors[name] = values.tolist()
    return factors


def _divided(rope: RopeConfig, header: GgufHeader, head_dim: int, factors: list[float]) -> RopeConfig:
    """With factors of `rope_freqs.weight`, on top of its scaling."""
    if len(factors) != head_dim // 2:
        raise ModelError(
            f"{header.path}: {FREQUENCIES}: has {len(factors)} factors, but must have {head_dim // 2}, half the head "
            f"size {head_dim}"
        )
    return replace(rope, factors=tuple(factors))


def _check_head_sizes(fields: Fields, head_dim: int) -> None:
    for key in (
        "rope.dimension_count",
        "rope.dimension_count_swa",
        "attention.value_length",
        "attention.key_length_swa",
        "attention.value_length_swa",
    ):
        if fields.get(key) not in (None, head_dim):
            raise fields.error(key, f"{shortened(fields.get(key))} is not the head size {head_dim}")


def _scaled(rope: RopeConfig, scale: float) -> RopeConfig:
    return replace(rope, attention_factor=rope.attention_factor * scale)


def _dtype(parts: Iterable[GgufHeader]) -> str | None:
    """The type of most matrix elements, or None where any are in quantised blocks."""
    elements: Counter[str] = Counter()
    for part in parts:
        for _, kind, shape, _, _ in part.tensors():
            if len(shape) > 1:
                elements[kind] += math.prod(shape)
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return None if elements.keys() - plain else plain[elements.most_common(1)[0][0]]
