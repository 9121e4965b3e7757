"""From the model argument to a model in memory with its tokenizer and chat template.

The argument is a folder, a `.gguf` file, a hub id, a preset's name (with dummy weights) or the default model. The
Rust core is imported only where text or GGUF needs it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo.config import DEFAULT_MODEL, EngineConfig
from octavo.model_config import ModelConfig, ModelError, config_from_folder, read_json, read_token_ids
from octavo.models.presets import PRESETS, preset_config
from octavo.models.registry import MODELS, Model
from octavo.weights import hub
from octavo.weights.default_model import default_model_path
from octavo.weights.dummy import fill_with_random
from octavo.weights.gguf import GgufSource, config_from_gguf
from octavo.weights.safetensors import SafetensorsSource
from octavo.weights.source import Source, fill_model

if TYPE_CHECKING:
    from octavo import _core

GENERATION_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and the text side that belongs to it."""

    model: Model
    config: ModelConfig
    dtype: torch.dtype
    tokenizer: _core.Tokenizer | None
    chat_template: _core.ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    generation_defaults: dict[str, float]  # those of GENERATION_FIELDS that generation_config.json sets


def load_model(config: EngineConfig, *, device: torch.device) -> LoadedModel:
    """Loads what `config` names, weights straight to `device`. Raises `ModelError` with file and field."""
    place = resolve(config.model, config.load_format)
    if place is None:
        loaded = _load(preset_config(config.model), None, config, device)
    elif place.suffix == ".gguf":
        loaded = _load_gguf(place, config, device)
    else:
        loaded = _load_folder(place, config, device)
    if config.tokenizer is not None:
        tokenizer, template = read_text_side(Path(config.tokenizer).expanduser())
        loaded = dataclasses.replace(loaded, tokenizer=tokenizer, chat_template=template or loaded.chat_template)
    if config.chat_template is not None:
        loaded = dataclasses.replace(loaded, chat_template=_own_template(config.chat_template, loaded.tokenizer))
    return loaded


def resolve(model: str, load_format: str) -> Path | None:
    """The folder or `.gguf` file that a model argument means; None for a preset. May download."""
    path = Path(model).expanduser()
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
    model_config = config_from_folder(folder)
    model_config, generation = _read_generation(folder, model_config)
    source = None if config.load_format == "dummy" else SafetensorsSource(folder)
    if source is not None and model_config.checkpoint_dtype is None:
        model_config = dataclasses.replace(model_config, checkpoint_dtype=source.dtype())
    loaded = _load(model_config, source, config, device)
    tokenizer, template = _folder_text(folder)
    return dataclasses.replace(loaded, tokenizer=tokenizer, chat_template=template, generation_defaults=generation)


def _load_gguf(path: Path, config: EngineConfig, device: torch.device) -> LoadedModel:
    from octavo import _core

    if config.load_format == "safetensors":
        raise ModelError(f"{path}: load_format safetensors needs a folder, not a .gguf file")
    try:
        header = _core.GgufFile(str(path))
    except _core.GgufError as error:
        raise ModelError(str(error)) from None
    model_config = config_from_gguf(header)
    source = None if config.load_format == "dummy" else GgufSource(header, model_config)
    loaded = _load(model_config, source, config, device)
    tokenizer, template = _gguf_text(header)
    return dataclasses.replace(loaded, tokenizer=tokenizer, chat_template=template)


def read_text_side(path: Path) -> tuple[_core.Tokenizer, _core.ChatTemplate | None]:
    """Tokenizer, and chat template where there is one, of a folder, a `tokenizer.json` or a `.gguf` file."""
    from octavo import _core

    if path.suffix == ".gguf" and path.is_file():
        try:
            return _gguf_text(_core.GgufFile(str(path)))
        except _core.GgufError as error:
            raise ModelError(str(error)) from None
    folder = path.parent if path.name == "tokenizer.json" else path
    tokenizer, template = _folder_text(folder)
    if tokenizer is None:
        raise ModelError(f"tokenizer {path}: not a folder with a tokenizer.json, a tokenizer.json or a .gguf file")
    return tokenizer, template


def _gguf_text(header: _core.GgufFile) -> tuple[_core.Tokenizer, _core.ChatTemplate | None]:
    from octavo import _core

    tokenizer = _core.Tokenizer.from_gguf(header)
    text = header.metadata().get("tokenizer.chat_template")
    return tokenizer, _template_for(text, tokenizer) if isinstance(text, str) else None


def _own_template(given: str, tokenizer: _core.Tokenizer | None) -> _core.ChatTemplate:
    """The user's chat template: the text itself, or the path of a file that holds it."""
    if "{{" in given or "{%" in given:
        return _template_for(given, tokenizer)
    try:
        return _template_for(Path(given).expanduser().read_text(encoding="utf-8"), tokenizer)
    except OSError as error:
        raise ModelError(
            f"chat_template {given!r}: neither a template nor a readable file ({error.strerror})"
        ) from None


def _template_for(text: str, tokenizer: _core.Tokenizer | None) -> _core.ChatTemplate:
    from octavo import _core

    bos = None if tokenizer is None else tokenizer.bos_token_id
    eos = None if tokenizer is None else tokenizer.eos_token_id
    return _core.ChatTemplate(text, bos_token=_token_text(tokenizer, bos), eos_token=_token_text(tokenizer, eos))


def _token_text(tokenizer: _core.Tokenizer | None, token_id: int | None) -> str:
    return "" if tokenizer is None or token_id is None else tokenizer.id_to_token(token_id) or ""


def _load(config: ModelConfig, source: Source | None, wanted: EngineConfig, device: torch.device) -> LoadedModel:
    """The model alone; `source` None means random weights."""
    dtype = pick_dtype(wanted.dtype, config.checkpoint_dtype)
    shorter = wanted.max_model_len
    if shorter is not None and 0 < shorter < config.max_position_embeddings:
        config = dataclasses.replace(config, max_position_embeddings=shorter)  # the rotary table need not be longer
    model = MODELS[config.architecture](config, dtype=dtype, device=device)
    if source is None:
        fill_with_random(model, device, wanted.seed)
    else:
        fill_model(model, source, device)
    return LoadedModel(model, config, dtype, None, None, config.eos_token_ids, {})


def pick_dtype(wanted: str, checkpoint: str | None) -> torch.dtype:
    """`auto` is the checkpoint's; files that do not say (GGUF) run in bfloat16."""
    name = checkpoint or "bfloat16" if wanted == "auto" else wanted
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def _read_generation(folder: Path, config: ModelConfig) -> tuple[ModelConfig, dict[str, float]]:
    """`generation_config.json`, where there is one: more end tokens, and the author's sampling defaults."""
    path = folder / "generation_config.json"
    if not path.exists():
        return config, {}
    values = read_json(path)
    ids = read_token_ids(values.get("eos_token_id"), str(path), "eos_token_id", config.vocab_size)
    config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + ids)))
    defaults = {}
    for key in GENERATION_FIELDS:
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ModelError(f"{path}: {key}: {value!r} is not a number")
        if value is not None:
            defaults[key] = value
    return config, defaults


def _folder_text(folder: Path) -> tuple[_core.Tokenizer | None, _core.ChatTemplate | None]:
    """Tokenizer and chat template of a Hugging Face folder; None where the folder has none."""
    if not (folder / "tokenizer.json").exists():
        return None, None
    from octavo import _core

    tokenizer = _core.Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").exists():
        settings = read_json(folder / "tokenizer_config.json")
    text = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(text, list):  # several named templates
        text = next((item.get("template") for item in text if item.get("name") == "default"), None)
    if not isinstance(text, str):
        return tokenizer, None
    bos, eos = (_special(settings.get(key)) for key in ("bos_token", "eos_token"))
    return tokenizer, _core.ChatTemplate(text, bos_token=bos, eos_token=eos)


def _special(value: Any) -> str:
    """A special token of tokenizer_config.json: text, or an object with its text in `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
