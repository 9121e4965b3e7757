"""The configs of AutoAWQ."""

from octavo.layers.schemes.formats.awq import AwqFormat
from octavo.layers.schemes.formats.stored import Format
from octavo.models.config_reader import Fields
from octavo.weights.quantization.recipe import Names, Recipe, one_of, read_group_size


def read_awq(fields: Fields) -> Recipe:
    """Raises `ModelError` that names the field."""
    one_of(fields, "bits" if fields.get("w_bit") is None else "w_bit", (4,))
    one_of(fields, "zero_point", (True, False), True)  # False: the zeros stand in the file all the same, at the middle
    version = fields.text("version", "gemm")
    if version.lower() != "gemm":
        raise fields.error("version", f"{version!r} is not supported; supported: gemm")
    group = read_group_size(fields, "group_size" if fields.get("q_group_size") is None else "q_group_size")
    form = AwqFormat(4, group)
    plain = Names(fields, "modules_to_not_convert", parts=True)

    def format_of(name: str) -> Format | None:
        return None if name == "lm_head" or plain.have(name) else form  # AutoAWQ leaves the head alone

    return Recipe("awq", format_of, (form,))
