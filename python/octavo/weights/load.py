"""From the model argument to a model in memory with its tokenizer and chat template.

The argument is a folder, a `.gguf` file, a hub id, a preset's name (with dummy weights) or the
default model. The Rust core is imported only where text or GGUF needs it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from octavo.config import DEFAULT_MODEL, EngineConfig
from octavo.layers.attention import most_rows
from octavo.layers.schemes.choice import BlockSchemes, QuantisedSchemes, Schemes
from octavo.layers.weight import Layer
from octavo.model_config import ModelConfig, ModelError, refuse_special_file
from octavo.models.presets import PRESETS, preset_config
from octavo.models.registry import MODELS, Model, config_from_folder
from octavo.pooling import Embeddings, HfOverrides, PoolerConfig
from octavo.weights import hub
from octavo.weights.default_model import default_model_path, sampling_defaults
from octavo.weights.dummy import fill_with_random
from octavo.weights.generation_config import read_generation
from octavo.weights.gguf import GgufSource
from octavo.weights.gguf_config import config_from_gguf
from octavo.weights.gguf_sampling import read_gguf_sampling
from octavo.weights.gguf_split import open_other_parts
from octavo.weights.pooling import ModelPooling, read_folder, read_gguf, settle
from octavo.weights.quantization.config import pick_recipe
from octavo.weights.quantization.recipe import Recipe
from octavo.weights.safetensors import SafetensorsSource
from octavo.weights.source import KV_SCALES, Source, check_layers, fill_model
from octavo.weights.text import open_gguf, read_text
from octavo.weights.tied import settle_head

if TYPE_CHECKING:
    from octavo import _core

logger = logging.getLogger(__name__)

Check = Callable[[ModelConfig, torch.dtype], object]


class Judge(Protocol):
    """Looks on while a model's weights are read, and says which of them stay in 16 bits."""

    def begin(self, config: ModelConfig, dtype: torch.dtype, tokenizer: _core.Tokenizer | None, online: bool) -> None:
        """Before the first layer. dtype: of plain weights. online: weights are quantised while they
        are read, and wait for its word (`OnlineScheme.settle`).
        """

    def finished(self, layer: Layer) -> None:
        """A layer is in memory, after those that it is made of; the next one is not."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and the text side that belongs to it."""

    model: Model
    config: ModelConfig
    dtype: torch.dtype
    dtype_reason: str  # in words, for the report
    in_blocks: bool  # weights are the file's own blocks; `dtype` is that of keys and values
    tokenizer: _core.Tokenizer | None
    chat_template: _core.ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    generation_defaults: dict[str, Any]  # fields of `SamplingParams` where a request does not give them
    embeddings: Embeddings | None  # what they are made of; None: it is only to generate
    generates: bool  # it is not only for embeddings


def load_model(
    config: EngineConfig, *, device: torch.device, check: Check | None = None, judge: Judge | None = None
) -> LoadedModel:
    """Loads what `config` names, weights straight to `device`. Raises `ModelError` with file and
    field.

    check: called with the model's config and dtype before its weights are read; raises for what
    cannot be served with them. judge: of weights from files; random ones are not shown to it.
    """
    place = resolve(config.model, config.load_format)
    if place is None:
        preset = preset_config(config.model)
        if config.max_model_len is not None:  # no weights, so no positions that were never trained
            longest = max(config.max_model_len, preset.max_position_embeddings)
            preset = dataclasses.replace(preset, max_position_embeddings=longest)
        return _load(preset, None, None, config, device, check, judge, ModelPooling())
    try:
        load = _load_gguf if place.suffix == ".gguf" else _load_folder
        return load(place, config, device, check, judge)
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


def _load_folder(
    folder: Path, config: EngineConfig, device: torch.device, check: Check | None, judge: Judge | None
) -> LoadedModel:
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
    files = ModelPooling()
    if config.wanted_runner != "generate":
        files = read_folder(folder, model_config.hidden_size)
    return _load(model_config, source, folder, config, device, check, judge, files, generation_folder=folder)


def _load_gguf(
    path: Path, config: EngineConfig, device: torch.device, check: Check | None, judge: Judge | None
) -> LoadedModel:
    if config.load_format == "safetensors":
        raise ModelError(f"{path}: load_format safetensors needs a folder, not a .gguf file")
    header = open_gguf(path)
    other_parts = open_other_parts(path, header)
    model_config = config_from_gguf(header, other_parts)
    source = None if config.load_format == "dummy" else GgufSource(header, model_config, other_parts)
    if config.quantization == "gguf":
        config = dataclasses.replace(config, quantization=None)  # which the file is
    metadata = header.metadata()
    sampling = read_gguf_sampling(metadata, str(path), config.generation_config)
    files = read_gguf(metadata, str(path)) if config.wanted_runner != "generate" else ModelPooling()
    loaded = _load(model_config, source, path, config, device, check, judge, files)
    parts = (header, *other_parts)
    packed = sorted({kind for part in parts for _, kind, *_ in part.tensors()} - {"F32", "F16", "BF16"})
    if source is not None and packed:
        kinds, file_gib = ", ".join(packed), sum(Path(part.path).stat().st_size for part in parts) / 2**30
        if loaded.in_blocks:
            logger.info("%s: its %s blocks are used as they are: %.2f GiB in the file", path, kinds, file_gib)
        else:
            held_gib = loaded.model.weight_bytes() / 2**30
            logger.info(
                "%s: its %s blocks are expanded: %.2f GiB in the file, %.2f GiB in memory",
                path,
                kinds,
                file_gib,
                held_gib,
            )
    defaults = loaded.generation_defaults | sampling_defaults(path, config.generation_config) | sampling
    return dataclasses.replace(loaded, generation_defaults=defaults)


def check_rows(max_num_seqs: int | None, num_kv_heads: int, device: torch.device) -> None:
    """Raises `ModelError`, before anything is loaded, for more rows than a GPU's attention can take
    in a step.
    """
    most = most_rows(num_kv_heads, device)
    if most is not None and max_num_seqs is not None and max_num_seqs > most:
        raise ModelError(
            f"max_num_seqs = {max_num_seqs}: with the model's {num_kv_heads} KV heads a GPU takes at most {most} "
            "(--max-num-seqs)"
        )


def _load(
    config: ModelConfig,
    source: Source | None,
    place: Path | None,
    wanted: EngineConfig,
    device: torch.device,
    check: Check | None,
    judge: Judge | None,
    pooling: ModelPooling,
    generation_folder: Path | None = None,
) -> LoadedModel:
    """Text, then weights; `source` None means random weights, `place` None a preset,
    `generation_folder` None a model that brings no generation_config.json. pooling: what its files
    say of embeddings.
    """
    runner = wanted.wanted_runner
    if runner == "generate" and not config.has_head:
        raise ModelError(f"{place}: the model was saved without a head, so it cannot generate: --runner pooling")
    embeddings = settle(
        pooling,
        config.hidden_size,
        runner,
        PoolerConfig.read(wanted.pooler_config),
        HfOverrides.read(wanted.hf_overrides),
    )
    check_rows(wanted.max_num_seqs, config.num_kv_heads, device)
    config, defaults = read_generation(config, wanted.generation_config, generation_folder)
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
    if check is not None:
        check(config, dtype)
    in_blocks = stays_in_blocks(wanted, source, config, device)
    if in_blocks:
        dtype_reason = "keys and values; its quantised weights stay in their blocks, activations are float32"
    shorter = wanted.max_model_len
    if shorter is not None and 0 < shorter < config.max_position_embeddings:
        config = dataclasses.replace(config, max_position_embeddings=shorter)  # the rotary table need not be longer
    _tell_rope_factors(config, place)
    judge = None if source is None else judge
    recipe = None if in_blocks else pick_recipe(generation_folder, wanted.quantization)
    schemes = BlockSchemes() if in_blocks else _schemes(recipe, source, dtype, device, judged=judge is not None)
    model = MODELS[config.architecture](config, schemes)
    if source is None:
        check_layers(model, wanted.model)
        fill_with_random(model, device, wanted.seed)
    elif judge is None:
        fill_model(model, source, device)
    else:
        judge.begin(config, dtype, text.tokenizer, recipe is not None and recipe.online)
        fill_model(model, source, device, judge.finished)
    return LoadedModel(
        model,
        config,
        dtype,
        dtype_reason,
        in_blocks,
        text.tokenizer,
        text.chat_template,
        ends,
        generation_defaults=defaults,
        embeddings=embeddings,
        generates=runner == "generate" or (runner == "auto" and config.has_head and not pooling.is_embedder),
    )


def stays_in_blocks(wanted: EngineConfig, source: Source | None, config: ModelConfig, device: torch.device) -> bool:
    """Whether weights stay in the blocks of their file: those of a quantised GGUF file on a CPU,
    unless the user asks for a type.
    """
    quantised = isinstance(source, GgufSource) and config.checkpoint_dtype is None
    return quantised and device.type == "cpu" and wanted.dtype == "auto" and wanted.quantization is None


def _schemes(
    recipe: Recipe | None, source: Source | None, dtype: torch.dtype, device: torch.device, *, judged: bool
) -> Schemes:
    """How matrices are held: as they are, or in 4 or 8 bits where the files or `--quantization` say
    so.
    """
    if recipe is None:
        return Schemes(dtype, device)
    logger.info("quantised weights: %s", recipe)
    shapes = {} if source is None else source.shapes()
    if any(name.endswith(KV_SCALES) for name in shapes):
        logger.warning("scales of keys and values are in the files, but keys and values stay in %s", dtype)
    return QuantisedSchemes(dtype, device, recipe.format_of, shapes.get, judged=judged)


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
