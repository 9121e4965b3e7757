"""Rotary settings out of a config: old files have `rope_scaling` beside `rope_theta`, transformers 5
writes `rope_parameters`.

Read as transformers' `modeling_rope_utils.py` reads them: `rope_scaling` wins over
`rope_parameters`, what a table leaves out is looked for beside it. What transformers would ignore
although it was surely meant is refused.
"""

import math
from typing import Any

from octavo.model_config import RopeConfig
from octavo.models.config_reader import MAX_POSITIONS, Fields, head_size

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
REFUSED_ROPE_KINDS = {
    "dynamic": "its frequencies change as a sequence grows, under keys that are cached already",
    "axial": "it rotates by the places of an image",
}


def read_rope(fields: Fields) -> RopeConfig:
    """Of a model whose layers are all of one kind."""
    scaling, parameters = fields.table("rope_scaling"), fields.table("rope_parameters")
    if scaling and parameters:
        fields.warn("rope_parameters", "not read: rope_scaling beside it wins, as in transformers")
    table = fields.inside("rope_scaling" if scaling else "rope_parameters", scaling or parameters)
    return read_table(fields, table, fields.number("rope_theta"))


def read_table(fields: Fields, table: Fields, theta: float, *, of_layer_type: bool = False) -> RopeConfig:
    """One table of rotary settings.

    fields: the config around it. theta: where the table has none. of_layer_type: the table holds
    for one type of layers, and there is another for the others.
    """
    for key, value in table.values.items():
        if isinstance(value, dict):
            raise table.error(key, "an object is not expected here")
    theta = table.number("rope_theta", theta)
    kind = table.text("rope_type", table.text("type", "default"))
    if table.text("type", kind) != kind:
        raise table.error("type", f"{table.get('type')!r} beside rope_type {kind!r}")
    if kind not in ROPE_KINDS:
        reason = REFUSED_ROPE_KINDS.get(kind)
        raise table.error("rope_type", f"{kind!r} is not supported{f': {reason}' if reason else ''}")
    part = table.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0), high=1.0)
    if part != 1.0 and kind != "proportional":
        raise table.error("partial_rotary_factor", f"only 1 is supported with rope_type {kind!r}")
    options: dict[str, Any] = {}
    if kind in ("linear", "llama3", "yarn"):
        options["factor"] = table.number("factor")
    if kind in ("llama3", "yarn", "longrope"):
        options["original_max_position"] = _original_length(fields, table, of_layer_type)
    if kind == "llama3":
        options |= _llama3(table)
    elif kind == "yarn":
        options |= _yarn(table, theta, options["factor"], of_layer_type)
    elif kind == "longrope":
        options |= _longrope(fields, table, options["original_max_position"])
    elif kind == "proportional":
        options |= {"factor": table.number("factor", 1.0), "rotated_part": part}
    return RopeConfig(theta, kind, **options)


def _original_length(fields: Fields, table: Fields, of_layer_type: bool) -> int:
    """The length before it was extended. Beside the table it goes before the table's own, unless
    there are several tables.
    """
    if not of_layer_type and fields.get("original_max_position_embeddings") is not None:
        return fields.integer("original_max_position_embeddings", low=2, high=MAX_POSITIONS)
    longest = fields.integer("max_position_embeddings", high=MAX_POSITIONS)
    return table.integer("original_max_position_embeddings", longest, low=2, high=MAX_POSITIONS)


def _llama3(table: Fields) -> dict[str, Any]:
    low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
    if low >= high:
        raise table.error("low_freq_factor", f"{low:g} is not below high_freq_factor {high:g}")
    return {"low_freq_factor": low, "high_freq_factor": high}


def _yarn(table: Fields, theta: float, factor: float, of_layer_type: bool) -> dict[str, Any]:
    if theta <= 1.0:
        raise table.error("rope_theta", f"{theta:g} must be above 1 with rope_type 'yarn'")
    truncate = table.flag("truncate", True)
    if of_layer_type and not truncate:
        raise table.error("truncate", "false is not supported here; transformers does not read it from this place")
    scale, scale_all = table.number("mscale", 0.0), table.number("mscale_all_dim", 0.0)
    attention = _yarn_scale(factor, scale) / _yarn_scale(factor, scale_all) if scale and scale_all else None
    return {
        "beta_fast": table.number("beta_fast", 32.0),
        "beta_slow": table.number("beta_slow", 1.0),
        "truncate": truncate,
        "attention_factor": table.number("attention_factor", attention or _yarn_scale(factor, 1.0)),
    }


def _yarn_scale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(fields: Fields, table: Fields, original: int) -> dict[str, Any]:
    half = head_size(fields) // 2
    ratio = fields.integer("max_position_embeddings", high=MAX_POSITIONS) / original
    factor = table.number("factor", ratio)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "factors": table.numbers("short_factor", half),
        "long_factors": table.numbers("long_factor", half),
        "attention_factor": table.number("attention_factor", attention),
    }
