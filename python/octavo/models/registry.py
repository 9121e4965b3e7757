"""Which family runs which model, and the reading of configs, which is the family's."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo.model_config import ModelConfig, read_json
from octavo.models.config_reader import Fields, shortened, warn_unknown
from octavo.models.decoder import Model
from octavo.models.gemma3 import Gemma3ForCausalLM, Gemma3ForConditionalGeneration
from octavo.models.llama import LlamaForCausalLM, MistralForCausalLM
from octavo.models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM

__all__ = ["GGUF_FAMILIES", "MODELS", "Model", "config_from_dict", "config_from_folder"]

FAMILIES: tuple[type[Model], ...] = (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
)
# By `ModelConfig.architecture`.
MODELS = {name: family for family in FAMILIES for name in family.architectures}
# Of files that were saved without a head, which make embeddings alone.
HEADLESS = {name: family for family in FAMILIES for name in family.headless_architectures}
# By `model_type` of config.json.
MODEL_TYPES = {family.model_type: family for family in FAMILIES}
# By GGUF's `general.architecture`.
GGUF_FAMILIES = {family.gguf_architecture: family for family in FAMILIES if family.gguf_architecture}


def config_from_folder(folder: Path) -> ModelConfig:
    """Reads `config.json` of a Hugging Face folder."""
    path = folder / "config.json"
    return config_from_dict(read_json(path), str(path))


def config_from_dict(
    values: Mapping[str, Any],
    source: str,
    *,
    spelling: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Checks the keys of a `config.json`; warns of those that have no meaning here.

    source: the file's name in errors. spelling: its names of our keys. defaults: in place of the
    family's.
    Raises `ModelError`.
    """
    fields = Fields(source, values, spelling=spelling)
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise fields.error("architectures", f"{shortened(names)} is not a list of one name")
    family = (MODELS | HEADLESS).get(names[0]) if isinstance(names[0], str) else None
    if family is None:
        raise fields.error(
            "architectures", f"{shortened(names[0])} is not supported; supported are {', '.join(MODELS | HEADLESS)}"
        )
    if fields.get("auto_map") is not None:
        raise fields.error("auto_map", "the model asks for its own Python code, which Octavo never runs")
    family = _by_model_type(fields, family)
    fields = Fields(source, values, defaults=family.defaults if defaults is None else defaults, spelling=spelling)
    fields.refuse_other_computations()
    config = family.read_config(fields)
    if names[0] in HEADLESS:
        config = replace(config, has_head=False, tie_word_embeddings=True)
    warn_unknown(source, fields.unknown())
    return config


def _by_model_type(fields: Fields, family: type[Model]) -> type[Model]:
    """transformers chooses by `model_type` and leaves `architectures` aside."""
    kind = fields.text("model_type", family.model_type)
    if kind not in MODEL_TYPES:
        raise fields.error("model_type", f"{shortened(kind)} is not supported; supported are {', '.join(MODEL_TYPES)}")
    if MODEL_TYPES[kind] is not family:
        fields.warn(
            "model_type", f"{kind!r} decides, as in transformers; architectures names {family.architectures[0]}"
        )
    return MODEL_TYPES[kind]
