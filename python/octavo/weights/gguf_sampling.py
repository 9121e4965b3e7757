"""`general.sampling.*` of a GGUF header: the sampling defaults that a model's author gave it, as
llama.cpp takes them (`common_init_sampler_from_model`).
"""

import logging
from collections.abc import Mapping
from typing import Any

from octavo.config import GENERATION_AUTO
from octavo.model_config import ModelError
from octavo.models.config_reader import shortened
from octavo.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

PREFIX = "general.sampling."
NUMBERS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Keys that are sampling defaults, and their names in `SamplingParams`."""

DEPENDENT = {
    "penalty_last_n": ("penalty_repeat", 1.0),
    "xtc_threshold": ("xtc_probability", 0.0),
    "mirostat_tau": ("mirostat", 0.0),
    "mirostat_eta": ("mirostat", 0.0),
}
"""Keys that change nothing where another key has this value or is not there."""

NEUTRAL = {"penalty_last_n": -1.0, "xtc_probability": 0.0, "mirostat": 0.0}
"""The values of other keys under which they change nothing. `penalty_last_n` -1 is all tokens."""


def read_gguf_sampling(metadata: Mapping[str, Any], path: str, wanted: str) -> dict[str, Any]:
    """The defaults as fields of `SamplingParams`, none where `wanted`, the engine's
    `generation_config`, asks for others. Warns of what cannot be honoured.

    Raises `ModelError` naming file and key for what cannot be a default.
    """
    if wanted != GENERATION_AUTO:
        return {}
    values = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    defaults: dict[str, Any] = {}
    for key, name in NUMBERS.items():
        if key not in values:
            continue
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelError(f"{path}: {PREFIX}{key}: {shortened(value)} is not a number")
        if key in ("temp", "top_k"):
            value = max(value, 0)  # below it llama.cpp draws greedily, or from all tokens
        # The file has float32: 0.95 and not 0.949999988.
        defaults[name] = float(f"{value:.7g}") if isinstance(value, float) else value
        try:
            SamplingParams(**{"max_tokens": None, **defaults})
        except (ValueError, TypeError, OverflowError) as error:
            raise ModelError(f"{path}: {PREFIX}{key} = {shortened(value)} cannot be a default: {error}") from None
    if values.get("penalty_last_n") == 0:
        defaults.pop("repetition_penalty", None)  # of no tokens
        del values["penalty_last_n"]
    for key in sorted(values.keys() - NUMBERS.keys()):
        other, without = DEPENDENT.get(key, ("", None))
        means_nothing = key in DEPENDENT and values.get(other, without) == without
        if not means_nothing and values[key] != NEUTRAL.get(key):
            logger.warning("%s: %s%s = %s: not supported, and ignored", path, PREFIX, key, shortened(values[key]))
    return defaults
