"""Speculative decoding as a user asks for it: vLLM's `speculative_config` and its keys.

Knows keys and limits; what of a text's past is drafted and how many drafts pay is the core's affair
(`rust/speculation`), and how a model drafts the runner's (`octavo/engine/drafting.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from typing import Any

from octavo.quantizations import ONLINE, QUANTIZATIONS

TEXT_METHODS = ("ngram", "suffix")
"""Draft from what has been said, for nothing."""
DRAFT_MODEL, SELF = "draft_model", "self"
METHODS = (*TEXT_METHODS, DRAFT_MODEL, SELF)
HEADS = ("eagle", "eagle3", "medusa", "mtp", "mlp_speculator")
"""vLLM's methods that draft by heads which were trained for one target."""

MOST_TOKENS = 16
DEFAULT_TOKENS = {DRAFT_MODEL: 5, SELF: 5}
_IGNORED = frozenset(
    {
        "disable_padded_drafter_batch",
        "disable_logprobs",
        "draft_tensor_parallel_size",
        "enforce_eager",
        "max_model_len",
    }
)
"""Keys of vLLM that tune machinery which is not here."""


@dataclasses.dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are foretold, to be verified several at a time. `ValueError` names the key.

    method: `ngram` repeats what came after the latest place in a request's own text that reads as
        its end (prompt lookup); `suffix` goes on as most such places do, in its own text and in
        earlier outputs of the same `cache_salt` (suffix decoding, Oliaro et al. 2024); `draft_model`
        asks `model`, a smaller one with the same tokenizer; `self` asks a copy of the target itself
        whose weights are quantised while it loads, and which needs no KV cache of its own.
    num_speculative_tokens: drafts that a step verifies of one request, at most (by default 7 where
        they cost nothing, 5 by a model). How many it does is found out while it runs: as many as make
        it faster, down to none.
    model: of `draft_model`: a folder, a .gguf file, a hub id; or a preset with dummy weights.
    quantization: of a draft model, as `EngineConfig.quantization`; of `self` what the copy becomes,
        int4 unless another is given.
    prompt_lookup_min, prompt_lookup_max: tokens that must be the same, and that are compared.
    suffix_decoding_*: vLLM's; the tree's depth is the most tokens that are compared.
    adaptive: False has all drafts verified, whether it pays or not: for comparisons.
    """

    method: str
    num_speculative_tokens: int = 7
    model: str | None = None
    quantization: str | None = None
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5
    suffix_decoding_max_tree_depth: int = 24
    suffix_decoding_max_cached_tokens: int = 2**20
    suffix_decoding_max_spec_factor: float = 1.0
    suffix_decoding_min_token_prob: float = 0.1
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.method in HEADS:
            raise ValueError(
                f"speculative_config: method = {self.method!r}: trained heads are not supported; the methods are "
                f"{', '.join(METHODS)}"
            )
        if self.method not in METHODS:
            raise ValueError(f"speculative_config: method = {self.method!r}: must be one of {', '.join(METHODS)}")
        if self.method == DRAFT_MODEL and (not isinstance(self.model, str) or not self.model):
            raise ValueError(
                f"speculative_config: model = {self.model!r}: method = 'draft_model' needs the draft model's folder, "
                ".gguf file or hub id"
            )
        if self.method != DRAFT_MODEL and self.model is not None:
            raise ValueError(f"speculative_config: model = {self.model!r}: method = {self.method!r} needs no model")
        self._check_quantization()
        for key, low, high in (
            ("num_speculative_tokens", 1, MOST_TOKENS),
            ("prompt_lookup_min", 1, 64),
            ("prompt_lookup_max", self.prompt_lookup_min, 256),
            ("suffix_decoding_max_tree_depth", self.prompt_lookup_min, 256),
            ("suffix_decoding_max_cached_tokens", 0, 2**28),
        ):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"speculative_config: {key} = {value!r}: must be an integer from {low} to {high}")
        for key, most in (("suffix_decoding_max_spec_factor", 1e6), ("suffix_decoding_min_token_prob", 1.0)):
            value = getattr(self, key)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
                raise ValueError(f"speculative_config: {key} = {value!r}: must be a number from 0 to {most:g}")
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"speculative_config: adaptive = {self.adaptive!r}: must be true or false")

    def _check_quantization(self) -> None:
        wanted = self.quantization
        if wanted is None:
            return
        if self.method in TEXT_METHODS:
            raise ValueError(f"speculative_config: quantization = {wanted!r}: method = {self.method!r} has no model")
        allowed = ONLINE if self.method == SELF else QUANTIZATIONS
        if wanted not in allowed:
            raise ValueError(f"speculative_config: quantization = {wanted!r}: must be one of {', '.join(allowed)}")

    @classmethod
    def read(cls, text: str) -> SpeculativeConfig:
        """From JSON, with vLLM's keys. A key that nobody knows is refused."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"speculative_config = {text[:100]!r}: is not JSON ({error}); for example "
                """'{"method": "ngram", "num_speculative_tokens": 5}'"""
            ) from None
        if not isinstance(given, dict):
            raise ValueError(f"speculative_config = {text[:100]}: must be an object with the key method")
        values = {key: value for key, value in given.items() if key not in _IGNORED and value is not None}
        cached = values.pop("suffix_decoding_max_cached_requests", None)
        if cached is not None:  # vLLM counts requests; 0 switches the cache off in both
            if not isinstance(cached, int) or cached < 0:
                raise ValueError(
                    f"speculative_config: suffix_decoding_max_cached_requests = {cached!r}: must be an integer from 0"
                )
            values.setdefault("suffix_decoding_max_cached_tokens", min(2**28, cached * 256))
        if values.get("model") in TEXT_METHODS:  # as vLLM takes it
            if values.setdefault("method", values["model"]) == values["model"]:
                del values["model"]
        elif "model" in values:
            values.setdefault("method", DRAFT_MODEL)
        if values.get("method") in DEFAULT_TOKENS:
            values.setdefault("num_speculative_tokens", DEFAULT_TOKENS[values["method"]])
        if "method" not in values:
            raise ValueError(f"speculative_config: method is missing: must be one of {', '.join(METHODS)}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f": the keys are {', '.join(known)}"
                raise ValueError(f"speculative_config: unknown key {str(key)[:100]!r}{hint}")
        # As with vLLM, one of the two alone sets both.
        least, most = values.get("prompt_lookup_min"), values.get("prompt_lookup_max")
        if least is not None and most is None:
            values["prompt_lookup_max"] = least
        if most is not None and least is None:
            values["prompt_lookup_min"] = most
        return cls(**values)

    @property
    def drafts_by_model(self) -> bool:
        """A model makes the drafts, on the device."""
        return self.method in (DRAFT_MODEL, SELF)

    def core_options(self) -> dict[str, Any]:
        """What the core is told of it."""
        is_suffix = self.method == "suffix"
        return {
            "method": self.method,
            "prompt_lookup_min": self.prompt_lookup_min,
            "prompt_lookup_max": self.suffix_decoding_max_tree_depth if is_suffix else self.prompt_lookup_max,
            "suffix_decoding_max_spec_factor": max(float(self.suffix_decoding_max_spec_factor), math.ulp(0.0)),
            "suffix_decoding_min_token_prob": float(self.suffix_decoding_min_token_prob),
            "suffix_decoding_max_cached_tokens": self.suffix_decoding_max_cached_tokens,
            "adaptive": self.adaptive,
            "follows": self.method == DRAFT_MODEL,
        }

    def line(self) -> str:
        """For the start-up report."""
        pays = "as many as pay" if self.adaptive else "always"
        by = f" {self.model}" if self.model else f" in {self.quantization or 'int4'}" if self.method == SELF else ""
        return f"{self.method}{by}, up to {self.num_speculative_tokens} drafts a request and step, {pays}"
