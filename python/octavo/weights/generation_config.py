"""`generation_config.json`: the end tokens and sampling defaults that a model's author gave it.

Every key of transformers' `GenerationConfig` is here: honoured, harmless, or one that would change
the output and cannot be had, of which a warning tells. `tests/models/test_generation_config.py`
holds that against transformers.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from octavo.config import GENERATION_AUTO, GENERATION_NEUTRAL
from octavo.model_config import ModelConfig, ModelError, read_json
from octavo.models.config_reader import read_token_ids
from octavo.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

NUMBERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
"""Keys whose numbers are sampling defaults, and their names in `SamplingParams`."""

HONOURED = frozenset(NUMBERS) | {"eos_token_id", "do_sample", "stop_strings", "suppress_tokens", "bad_words_ids"}

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": ([],),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window"),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_decoder_ids": (),
    "forced_eos_token_id": (),
    "constraints": (),
    "guidance_scale": (1,),
    "max_length": (),  # but for the model's own length, see `_Defaults`
    "max_time": (),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "sequence_bias": ({}, []),
    "token_healing": (False,),
    "top_h": (1,),
    "typical_p": (1,),
    "watermarking_config": (),
}
"""Keys that would change the output and cannot be honoured, with the values, besides null, under
which they change nothing.
"""

HARMLESS = frozenset(
    (
        # Of beams, without which they mean nothing.
        "early_stopping",
        "length_penalty",
        "low_memory",
        # Of tokens that only batches of unequal length, encoders and decoders need.
        "bos_token_id",
        "decoder_start_token_id",
        "pad_token_id",
        # Of what `generate` returns, and of the order of its steps.
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "renormalize_logits",
        "return_dict_in_generate",
        # Of caches and compilation.
        "cache_config",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "max_cache_len",
        "prefill_chunk_size",
        "return_legacy_cache",
        "use_cache",
        # Of drafts, which somebody must ask for.
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "is_assistant",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "prompt_lookup_num_tokens",
        "speculation_type",
        "target_lookbehind",
        "use_mtp",
        # Of the file.
        "transformers_version",
        "trust_remote_code",
        "use_model_defaults",
    )
)

SUPPRESSED = -100.0
"""Bias of a token that must not be drawn."""


def read_generation(config: ModelConfig, wanted: str, own: Path | None) -> tuple[ModelConfig, dict[str, Any]]:
    """The model with the end tokens that `generation_config.json` adds, and the author's sampling
    defaults as fields of `SamplingParams`.

    wanted: `EngineConfig.generation_config`; own: the model's folder, None where it has none. With
    neutral defaults the model's end tokens still count. Raises `ModelError` naming file and key.
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
    values = {key: value for key, value in read_json(path).items() if value is not None}
    ids = read_token_ids(values.get("eos_token_id"), str(path), "eos_token_id", config.vocab_size)
    config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + ids)))
    if wanted == GENERATION_NEUTRAL:
        return config, {}
    return config, _Defaults(path, values, config).read()


class _Defaults:
    """The sampling defaults of one file, of which no value is null."""

    def __init__(self, path: Path, values: dict[str, Any], config: ModelConfig) -> None:
        self._path = path
        self._values = values
        self._config = config
        self._defaults: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """All of them; warns of what cannot be honoured."""
        for key, name in NUMBERS.items():
            if key in self._values:
                value = self._values[key]
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise self._wrong(key, "a number")
                self._set(key, name, value)
        sample = self._values.get("do_sample", True)
        if not isinstance(sample, bool):
            raise self._wrong("do_sample", "true or false")
        if not sample:
            self._set("do_sample", "temperature", 0.0)
        self._read_stop_strings()
        self._read_suppressed()
        self._warn()
        return self._defaults

    def _set(self, key: str, name: str, value: Any) -> None:
        try:
            SamplingParams(**{"max_tokens": None, **self._defaults, name: value})
        except (ValueError, TypeError, OverflowError) as error:
            raise ModelError(f"{self._path}: {key} = {self._shown(key)} cannot be a default: {error}") from None
        self._defaults[name] = value

    def _read_stop_strings(self) -> None:
        given = self._values.get("stop_strings", [])
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self._wrong("stop_strings", "a string or a list of strings")
        if texts:
            self._set("stop_strings", "stop", texts)

    def _read_suppressed(self) -> None:
        """Tokens that are never drawn, as a bias. Of `bad_words_ids` those are, which are one token
        long and end nothing.
        """
        vocab_size, ends = self._config.vocab_size, self._config.eos_token_ids
        suppressed = self._values.get("suppress_tokens", [])
        words = self._values.get("bad_words_ids", [])
        if not _are_ids(suppressed):
            raise self._wrong("suppress_tokens", "a list of token ids")
        if not isinstance(words, list) or not all(_are_ids(word) for word in words):
            raise self._wrong("bad_words_ids", "a list of lists of token ids")
        banned = [word[0] for word in words if len(word) == 1 and word[0] not in ends]
        bias = {token: SUPPRESSED for token in (*suppressed, *banned) if token < vocab_size}
        if bias:
            self._set("suppress_tokens" if suppressed else "bad_words_ids", "logit_bias", bias)
        if any(len(word) > 1 for word in words):
            self._ignored("bad_words_ids", "words of more than one token are not kept from the output")

    def _warn(self) -> None:
        for key in sorted(self._values.keys() - HONOURED - HARMLESS):
            value = self._values[key]
            if key == "max_length":
                longest = self._config.max_position_embeddings
                if not isinstance(value, (int, float)) or value < longest:
                    self._ignored(key, f"ignored, the length is the model's {longest} unless max_new_tokens is there")
            elif key in NEUTRAL:
                if not any(value == neutral for neutral in NEUTRAL[key]):
                    self._ignored(key, "not supported, and ignored")
            elif not key.startswith("_"):
                self._ignored(key, "not known, and ignored")

    def _ignored(self, key: str, why: str) -> None:
        logger.warning("%s: %s = %s: %s", self._path, key, self._shown(key), why)

    def _wrong(self, key: str, wanted: str) -> ModelError:
        return ModelError(f"{self._path}: {key}: {self._shown(key)} is not {wanted}")

    def _shown(self, key: str) -> str:
        text = repr(self._values[key])
        return text if len(text) <= 100 else text[:100] + "..."


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)
