"""The configs of FP8 checkpoints, as transformers and AutoFP8 write them."""

import torch

from octavo.layers.schemes.formats.eight_bit import EightBitFormat
from octavo.layers.schemes.formats.stored import Format
from octavo.models.config_reader import Fields
from octavo.weights.quantization.recipe import Names, Recipe, one_of


def read_fp8(fields: Fields) -> Recipe:
    """Raises `ModelError` that names the field."""
    if fields.get("weight_block_size") is not None:
        raise fields.error(
            "weight_block_size",
            f"{fields.get('weight_block_size')!r}: block-wise scales are not supported; supported: null, one scale a "
            "tensor or a row",
        )
    one_of(fields, "fmt", ("e4m3",), "e4m3")
    static = one_of(fields, "activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    form = EightBitFormat("FP8", torch.float8_e4m3fn, rounds_input=True, static_input=static)
    plain = [Names(fields, key, parts=True) for key in ("modules_to_not_convert", "ignored_layers")]

    def format_of(name: str) -> Format | None:
        return None if name == "lm_head" or any(names.have(name) for names in plain) else form

    return Recipe("fp8", format_of, (form,))
