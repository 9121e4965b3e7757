"""From a model's folder and `--quantization` to a `Recipe`.

A checkpoint says what it is: `quantization_config` in `config.json`, else `quantize_config.json`
(AutoGPTQ) or `quant_config.json` (AutoAWQ). The flag then only confirms it. Of other models it asks
for quantising while they are loaded.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from octavo.layers.schemes.formats.online import OnlineFormat
from octavo.layers.schemes.formats.stored import Format
from octavo.model_config import ModelError, read_json
from octavo.models.config_reader import Fields, warn_unknown
from octavo.quantizations import CONFIRMING, ONLINE
from octavo.weights.quantization.awq import read_awq
from octavo.weights.quantization.compressed_tensors import read_compressed_tensors
from octavo.weights.quantization.fp8 import read_fp8
from octavo.weights.quantization.gptq import read_gptq
from octavo.weights.quantization.recipe import Recipe

_READERS: dict[str, Callable[[Fields], Recipe]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
}
_MAKING = """
act_group_aware adapter batch_size block_name_to_quantize cache_block_outputs damp_auto_increment damp_percent dataset
format gptaq group_by_length hyb_act max_input_length meta method model_file_base_name model_name_or_path model_seqlen
module_name_preceding_first_block modules_in_block_to_quantize modules_to_convert mse observer observer_kwargs
quantization_status quantizer static_groups tokenizer true_sequential version
"""
_KERNELS = """
backend cuda_fp16 disable_exllama do_fuse exllama_config fuse_max_seq_len modules_to_fuse pack_dtype use_cuda_fp16
use_exllama
"""
_NO_PART = """
block_structure dequantize dynamic expert_dtype global_compression_ratio group_size kv_cache_scheme
moe_sparsity_config output_activations scale_dtype scale_fmt zp_dtype
"""
_HARMLESS = frozenset((_MAKING + _KERNELS + _NO_PART).split())
"""Keys of which the weights' numbers tell nothing: how they were made, which kernels another program
takes, and what has no part in products. That of a cache of keys and values in 8 bits is told by its
scales (`source.KV_SCALES`).
"""

OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files beside config.json, and the method of those that do not say."""


def pick_recipe(folder: Path | None, wanted: str | None) -> Recipe | None:
    """folder: of a checkpoint in safetensors; None for what is never quantised. wanted:
    `EngineConfig.quantization`.

    Returns None where all weights are plain. Raises `ModelError` that names file and field, or the
    flag where it contradicts the file.
    """
    recipe = None if folder is None else read_recipe(folder)
    if wanted is None:
        return recipe
    if recipe is not None:
        if CONFIRMING.get(wanted) != recipe.method:
            raise ModelError(
                f"quantization = {wanted!r}: the weights of {folder} are quantised already, by {recipe.method}; "
                "leave --quantization out"
            )
        return recipe
    if wanted not in ONLINE:
        raise ModelError(
            f"quantization = {wanted!r}: the model does not say that its weights are quantised; leave --quantization "
            f"out, or quantise while loading with {', '.join(ONLINE)}"
        )
    return online(wanted)


def online(kind: str) -> Recipe:
    """All matrices of the layers; the head stays plain."""
    form = OnlineFormat(kind)

    def format_of(name: str) -> Format | None:
        return None if name == "lm_head" else form

    return Recipe(kind, format_of, (form,), online=True)


def read_recipe(folder: Path) -> Recipe | None:
    """What the files of a folder say. Raises `ModelError`."""
    path = folder / "config.json"
    values = read_json(path)
    config = values.get("quantization_config")
    text = values.get("text_config")
    if config is None and isinstance(text, dict):
        config = text.get("quantization_config")
    if config is not None:
        if not isinstance(config, dict):
            raise ModelError(f"{path}: quantization_config: {config!r} is not an object")
        return recipe_from(config, str(path))
    for name, method in OWN_FILES.items():
        if (folder / name).exists():
            return recipe_from(read_json(folder / name), str(folder / name), prefix="", method=method)
    return None


def recipe_from(
    config: Mapping[str, Any], source: str, *, prefix: str = "quantization_config.", method: str = ""
) -> Recipe:
    """What a config says. prefix: of its keys within the file `source`; method: where it does not say.

    Raises `ModelError`.
    """
    fields = Fields(source, config, prefix=prefix)
    method = fields.text("quant_method", method).lower()
    if method not in _READERS:
        raise fields.error("quant_method", f"{method!r} is not supported; supported: {', '.join(_READERS)}")
    recipe = _READERS[method](fields)
    warn_unknown(source, [key for key in fields.unknown() if key.rpartition(".")[2] not in _HARMLESS])
    return recipe
