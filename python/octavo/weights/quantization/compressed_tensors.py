"""The configs of compressed-tensors (llm-compressor): groups of modules, each with its own numbers."""

from typing import Any

import torch

from octavo.layers.schemes.formats.eight_bit import EightBitFormat
from octavo.layers.schemes.formats.packed import PackedFormat
from octavo.layers.schemes.formats.stored import Format
from octavo.models.config_reader import Fields
from octavo.weights.quantization.recipe import Names, Recipe, one_of, read_group_size

_METHOD = "compressed-tensors"
_PACKED = "pack-quantized"
_BYTES = ("int-quantized", "float-quantized", "naive-quantized")
_MIXED = "mixed-precision"
_BY_ACTIVATION, _AS_EVER = ("group", "dynamic"), ("weight", "static")  # orders of inputs; the latter leave no trace


def read_compressed_tensors(fields: Fields) -> Recipe:
    """Raises `ModelError` that names the field."""
    one_of(fields, "format", (_PACKED, *_BYTES, _MIXED))
    sparsity = fields.table("sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise fields.error("sparsity_config.format", f"{sparsity['format']!r} is not supported; supported: dense")
    if fields.table("transform_config").get("config_groups"):
        raise fields.error("transform_config", "transforms of weights and activations are not supported")
    ignored = Names(fields, "ignore", parts=False)
    groups: list[tuple[Names, Format | None]] = []
    for name, group in fields.table("config_groups").items():
        if not isinstance(group, dict):
            raise fields.error(f"config_groups.{name}", f"{group!r} is not an object")
        inner = fields.inside(f"config_groups.{name}", group)
        groups.append((Names(inner, "targets", parts=False), _read_group(inner, fields.get("format"))))
    if not groups:
        raise fields.error("config_groups", "missing or empty")

    def format_of(name: str) -> Format | None:
        if ignored.have(name) or ignored.have_class("Linear"):
            return None
        for targets, form in groups:  # what names a module goes before what names its class
            if targets.have(name):
                return form
        return next((form for targets, form in groups if targets.have_class("Linear")), None)

    return Recipe(_METHOD, format_of, tuple(form for _, form in groups if form is not None))


def _read_group(fields: Fields, whole: Any) -> Format | None:
    weights = fields.table("weights")
    if not weights:
        return None
    layout = fields.get("format") or whole
    if layout not in (_PACKED, *_BYTES):
        shown = ", ".join((_PACKED, *_BYTES))
        raise fields.error("format", f"{layout!r} is not supported; supported: {shown}")
    numbers = fields.inside("weights", weights)
    inputs = fields.table("input_activations")
    if layout == _PACKED:
        if inputs:
            raise fields.error("input_activations", f"are not supported with {_PACKED} weights")
        return _read_packed(numbers)
    return _read_bytes(numbers, fields.inside("input_activations", inputs))


def _read_packed(weights: Fields) -> PackedFormat:
    one_of(weights, "type", ("int",), "int")
    bits = one_of(weights, "num_bits", (4, 8), 8)
    group = read_group_size(weights, default=-1)
    strategy = one_of(weights, "strategy", ("group", "channel"), "group" if group > 0 else "channel")
    order = weights.get("actorder")
    if order not in (None, True, False, *_BY_ACTIVATION, *_AS_EVER):
        raise weights.error("actorder", f"{order!r} is not one of {', '.join(_BY_ACTIVATION + _AS_EVER)}")
    act_order = order is True or order in _BY_ACTIVATION
    return PackedFormat(bits, group if strategy == "group" else -1, weights.flag("symmetric", True), act_order)


def _read_bytes(weights: Fields, inputs: Fields) -> EightBitFormat:
    kind = one_of(weights, "type", ("int", "float"), "int")
    one_of(weights, "num_bits", (8,), 8)
    one_of(weights, "symmetric", (True,), True)
    one_of(weights, "strategy", ("tensor", "channel"), "tensor")
    dtype = torch.int8 if kind == "int" else torch.float8_e4m3fn
    if not inputs.values:
        return EightBitFormat(_METHOD, dtype, rounds_input=False)
    one_of(inputs, "type", (kind,), "int")
    one_of(inputs, "num_bits", (8,), 8)
    one_of(inputs, "symmetric", (True,), True)
    one_of(inputs, "strategy", ("tensor", "token"), "tensor")
    static = not one_of(inputs, "dynamic", (True, False), False)
    return EightBitFormat(_METHOD, dtype, rounds_input=True, static_input=static)
