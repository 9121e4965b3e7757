"""From the model argument to a model in memory with its tokenizer and chat template.

The argument is a folder, a `.gguf` file, a hub id, a preset's name (with dummy weights) or the
default model. The Rust core is imported only where text or GGUF needs it.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from octavo.config import DEFAULT_MODEL, GENERATION_AUTO, GENERATION_NEUTRAL, EngineConfig
from octavo.layers.schemes.choice import Schemes
from octavo.model_config import ModelConfig, ModelError, read_json, refuse_special_file
from octavo.models.config_reader import read_token_ids
from octavo.models.presets import PRESETS, preset_config
from octavo.models.registry import MODELS, Model, config_from_folder
from octavo.sampling_params import SamplingParams
from octavo.weights import hub
from octavo.weights.default_model import default_model_path
from octavo.weights.dummy import fill_with_random
from octavo.weights.gguf import GgufSource
from octavo.weights.gguf_config import config_from_gguf
from octavo.weights.gguf_split import open_other_parts
from octavo.weights.safetensors import SafetensorsSource
from octavo.weights.source import Source, fill_model
from octavo.weights.text import open_gguf, read_text
from octavo.weights.tied import settle_head

if TYPE_CHECKING:
    from octavo import _core

logger = logging.getLogger(__name__)

GENERATION_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Fields of generation_config.json that are sampling defaults, and their names in `SamplingParams`;
vLLM's choice.
"""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and the text side that belongs to it."""

    model: Model
    config: ModelConfig
    dtype: torch.dtype
    dtype_reason: str  # in words, for the report
    tokenizer: _core.Tokenizer | None
    chat_template: _core.ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    generation_defaults: dict[str, Any]  # fields of `SamplingParams` where a request does not give them


def load_model(config: EngineConfig, *, device: torch.device) -> LoadedModel:
    """Loads what `config` names, weights straight to `device`. Raises `ModelError` with file and
    field.
    """
    place = resolve(config.model, config.load_format)
    if place is None:
        return _load(preset_config(config.model), None, None, config, device, None)
    try:
        return _load_gguf(place, config, device) if place.suffix == ".gguf" else _load_folder(place, config, device)
    except OSError as error:  # of whichever file: unreadable, gone in between, on a broken disk
        raise ModelError(f"{error.filename or place}: {error.strerror or error}") from None


def resolve(model: str, load_format: str) -> Path | None:
    """The folder or `.gguf` file that a model argument means; None for a preset. May download."""
    path = Path(model).expanduser()
    if path.exists():
        refuse_special_file(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: a model file must be a .gguf file; for safetensors give the folder")
        return path
    if path.is_dir():
        return path
    if load_format == "dummy" and model in PRESETS:
        return None
    if model == DEFAULT_MODEL:
        return default_model_path()
    if model in PRESETS:
        raise ModelError(
            f"model {model!r}: a preset has a shape but no weights; add --load-format dummy, or give a folder"
        )
    if hub.is_hub_id(model) and not model.endswith(".gguf"):
        return hub.download(model)
    raise ModelError(f"model {model!r}: no such folder or .gguf file")


def _load_folder(folder: Path, config: EngineConfig, device: torch.device) -> LoadedModel:
    if config.load_format == "gguf":
        raise ModelError(f"{folder}: load_format gguf needs a .gguf file, not a folder")
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors") and path.exists():
            refuse_special_file(path)
    model_config = config_from_folder(folder)
    source = None if config.load_format == "dummy" else SafetensorsSource(folder)
    if source is not None:
        model_config = settle_head(model_config, source)
        if model_config.checkpoint_dtype is None:
            model_config = dataclasses.replace(model_config, checkpoint_dtype=source.dtype())
    return _load(model_config, source, folder, config, device, folder)


def _load_gguf(path: Path, config: EngineConfig, device: torch.device) -> LoadedModel:
    if config.load_format == "safetensors":
        raise ModelError(f"{path}: load_format safetensors needs a folder, not a .gguf file")
    header = open_gguf(path)
    other_parts = open_other_parts(path, header)
    model_config = config_from_gguf(header, other_parts)
    source = None if config.load_format == "dummy" else GgufSource(header, model_config, other_parts)
    return _load(model_config, source, path, config, device, None)


def _load(
    config: ModelConfig,
    source: Source | None,
    place: Path | None,
    wanted: EngineConfig,
    device: torch.device,
    generation_folder: Path | None,
) -> LoadedModel:
    """Text, then weights; `source` None means random weights, `place` None a preset,
    `generation_folder` None a model that brings no generation_config.json.
    """
    config, defaults = _read_generation(config, wanted.generation_config, generation_folder)
    text = read_text(place, wanted.tokenizer, wanted.chat_template)
    if text.tokenizer is not None and text.tokenizer.vocab_size > config.vocab_size:
        # Published models do this (Gemma 3 text has an image token, finetunes add one for padding):
        # never drawn, and a prompt that holds such an id is refused by the core like any other id
        # out of range.
        logger.warning(
            "%s: the tokenizer has %d tokens, but the model's vocab_size is %d: prompts that contain the others are "
            "refused",
            wanted.tokenizer or place,
            text.tokenizer.vocab_size,
            config.vocab_size,
        )
    if text.tokenizer is None and place is not None:
        logger.warning(
            "%s: no tokenizer.json: requests with text will be refused, only token ids are served; name a tokenizer "
            "with --tokenizer",
            place,
        )
    ends = tuple(dict.fromkeys(config.eos_token_ids + text.end_token_ids))
    dtype, dtype_reason = pick_dtype(wanted.dtype, config.checkpoint_dtype, device)
    shorter = wanted.max_model_len
    if shorter is not None and 0 < shorter < config.max_position_embeddings:
        config = dataclasses.replace(config, max_position_embeddings=shorter)  # the rotary table need not be longer
    _tell_rope_factors(config, place)
    model = MODELS[config.architecture](config, Schemes(dtype, device))
    if source is None:
        fill_with_random(model, device, wanted.seed)
    else:
        fill_model(model, source, device)
    return LoadedModel(
        model, config, dtype, dtype_reason, text.tokenizer, text.chat_template, ends, generation_defaults=defaults
    )


def pick_dtype(wanted: str, checkpoint: str | None, device: torch.device) -> tuple[torch.dtype, str]:
    """The type of weights and activations, and why. `auto` is the checkpoint's, but on a GPU
    float32 runs in bfloat16, as in vLLM, and so do files that have no such type (quantised GGUF).
    """
    if wanted != "auto":
        name, reason = wanted, "as asked for"
    elif checkpoint is None:
        name, reason = "bfloat16", "its weights are quantised or have no type"
    elif checkpoint == "float32" and device.type == "cuda":
        name, reason = "bfloat16", "the checkpoint's is float32; --dtype float32 keeps it"
    else:
        name, reason = checkpoint, "the checkpoint's"
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name], reason


def _tell_rope_factors(config: ModelConfig, place: Path | None) -> None:
    """LongRoPE's choice holds for all sequences, also those that another length would serve
    otherwise.
    """
    rope, longest = config.rope, config.max_position_embeddings
    if rope.long_factors:
        kind = "long" if longest > rope.original_max_position else "short"
        logger.info(
            "%s: the %s factors of longrope for all lengths up to %d; --max-model-len over or up to %d chooses",
            place,
            kind,
            longest,
            rope.original_max_position,
        )


def _read_generation(config: ModelConfig, wanted: str, own: Path | None) -> tuple[ModelConfig, dict[str, Any]]:
    """What `generation_config.json` adds: end tokens, and the author's sampling defaults.

    wanted: `EngineConfig.generation_config`; own: the model's folder, None where it has none. With
    neutral defaults the model's end tokens still count.
    """
    folder = own
    if wanted not in (GENERATION_AUTO, GENERATION_NEUTRAL):
        folder = Path(wanted).expanduser()
        if not (folder / "generation_config.json").is_file():
            raise ModelError(
                f"generation_config = {wanted!r}: must be auto, vllm or a folder with a generation_config.json"
            )
    if folder is None or not (folder / "generation_config.json").exists():
        return config, {}
    path = folder / "generation_config.json"
    values = read_json(path)
    ids = read_token_ids(values.get("eos_token_id"), str(path), "eos_token_id", config.vocab_size)
    config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + ids)))
    if wanted == GENERATION_NEUTRAL:
        return config, {}
    defaults = {}
    for key, name in GENERATION_FIELDS.items():
        value = values.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelError(f"{path}: {key}: {value!r} is not a number")
        try:
            SamplingParams(**cast(dict[str, Any], {name: value}))
        except (ValueError, TypeError, OverflowError) as error:
            raise ModelError(f"{path}: {key} = {value!r} cannot be a default: {error}") from None
        defaults[name] = value
    return config, defaults
