"""The configs of AutoGPTQ and GPTQModel."""

from octavo.layers.schemes.formats.gptq import GptqFormat
from octavo.layers.schemes.formats.stored import Format
from octavo.models.config_reader import Fields
from octavo.weights.quantization.recipe import Pattern, Recipe, one_of, read_group_size, spellings

HEAD = "lm_head"


def read_gptq(fields: Fields) -> Recipe:
    """Raises `ModelError` that names the field."""
    key = "checkpoint_format" if fields.get("checkpoint_format") is not None else "format"
    version = one_of(fields, key, ("gptq", "gptq_v2"), "gptq")
    if fields.flag("is_marlin_format", False):
        raise fields.error("is_marlin_format", "true is not supported; supported: GPTQ's own layout")
    whole = _read_format(fields, version)
    head = fields.flag(HEAD, False)
    rules: list[tuple[Pattern, Format | None]] = []
    for pattern, changes in fields.table("dynamic").items():
        label = f"dynamic.{pattern}"
        compiled = Pattern(fields, label, pattern[2:] if pattern[:2] in ("+:", "-:") else pattern)
        if pattern.startswith("-:"):
            rules.append((compiled, None))
            continue
        if not isinstance(changes, dict):
            raise fields.error(label, f"{changes!r} is not an object")
        own = fields.inside(label, changes, defaults=fields.values)
        rules.append((compiled, _read_format(own, version)))

    def format_of(name: str) -> Format | None:
        for pattern, form in rules:
            if any(pattern.begins(spelling) for spelling in spellings(name)):
                return form
        return whole if name != HEAD or head else None

    return Recipe("gptq", format_of, (whole, *(form for _, form in rules if form is not None)))


def _read_format(fields: Fields, version: str) -> GptqFormat:
    bits = one_of(fields, "bits", (4, 8))
    fields.flag("sym", True)  # zeros are in the file either way
    act_order = fields.flag("desc_act", False)
    return GptqFormat(bits, read_group_size(fields), act_order, zeros_less_one=version == "gptq")
