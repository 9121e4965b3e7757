"""Which family runs which model, and the reading of configs, which is the family's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.model_config import ModelConfig, read_json
from octavo.models.config_reader import Fields, without_none
from octavo.models.decoder import Model
from octavo.models.gemma3 import Gemma3ForCausalLM
from octavo.models.llama import LlamaForCausalLM, MistralForCausalLM
from octavo.models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM

__all__ = ["GGUF_FAMILIES", "MODELS", "Model", "config_from_dict", "config_from_folder"]

FAMILIES: tuple[type[Model], ...] = (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Gemma3ForCausalLM,
)
# By `ModelConfig.architecture`.
MODELS = {name: family for family in FAMILIES for name in family.architectures}
# By GGUF's `general.architecture`.
GGUF_FAMILIES = {family.gguf_architecture: family for family in FAMILIES if family.gguf_architecture}


def config_from_folder(folder: Path) -> ModelConfig:
    """Reads `config.json` of a Hugging Face folder."""
    path = folder / "config.json"
    return config_from_dict(read_json(path), str(path))


def config_from_dict(values: Mapping[str, Any], source: str, spelling: Mapping[str, str] | None = None) -> ModelConfig:
    """Checks the keys of a `config.json`. `source` is the file's name in errors, `spelling` its
    names of our keys.

    Raises `ModelError`.
    """
    fields = Fields(source, values, spelling)
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise fields.error("architectures", f"{names!r} is not a list of one name")
    family = MODELS.get(names[0]) if isinstance(names[0], str) else None
    if family is None:
        raise fields.error("architectures", f"{names[0]!r} is not supported; supported are {', '.join(MODELS)}")
    if fields.get("auto_map") is not None:
        raise fields.error("auto_map", "the model asks for its own Python code, which Octavo never runs")
    if fields.get("quantization_config") is not None:
        raise fields.error(
            "quantization_config", "quantised safetensors are not supported; use full weights or a GGUF file"
        )
    text = values.get("text_config")  # of a checkpoint that has a vision part too
    known = without_none(values) | (without_none(text) if isinstance(text, dict) else {})
    return family.read_config(Fields(source, {**family.defaults, **known, "architectures": names}, spelling))
