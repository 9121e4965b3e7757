"""Speculative decoding as a user asks for it: vLLM's `speculative_config` and its keys.

Knows keys and limits; where drafts come from and how many pay is the core's affair
(`rust/speculation`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from typing import Any

METHODS = ("ngram", "suffix")
MODEL_METHODS = ("draft_model", "eagle", "eagle3", "medusa", "mtp", "mlp_speculator")
"""vLLM's methods that draft by a model."""

MOST_TOKENS = 16
_IGNORED = frozenset({"disable_padded_drafter_batch", "disable_logprobs", "draft_tensor_parallel_size"})
"""Keys of vLLM that tune machinery which is not here."""


@dataclasses.dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are foretold, to be verified several at a time. `ValueError` names the key.

    method: `ngram` repeats what came after the latest place in a request's own text that reads as
        its end (prompt lookup); `suffix` goes on as most such places do, in its own text and in
        earlier outputs of the same `cache_salt` (suffix decoding, Oliaro et al. 2024).
    num_speculative_tokens: drafts that a step verifies of one request, at most. How many it does is
        found out while it runs: as many as make it faster, down to none.
    prompt_lookup_min, prompt_lookup_max: tokens that must be the same, and that are compared.
    suffix_decoding_*: vLLM's; the tree's depth is the most tokens that are compared.
    adaptive: False has all drafts verified, whether it pays or not: for comparisons.
    """

    method: str
    num_speculative_tokens: int = 7
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5
    suffix_decoding_max_tree_depth: int = 24
    suffix_decoding_max_cached_tokens: int = 2**20
    suffix_decoding_max_spec_factor: float = 1.0
    suffix_decoding_min_token_prob: float = 0.1
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.method in MODEL_METHODS:
            raise ValueError(
                f"speculative_config: method = {self.method!r}: drafts by a model are not built yet; "
                f"{' and '.join(METHODS)} need none"
            )
        if self.method not in METHODS:
            raise ValueError(f"speculative_config: method = {self.method!r}: must be one of {', '.join(METHODS)}")
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
        model = values.pop("model", None)
        if model is not None:
            method = values.setdefault("method", "draft_model" if model not in METHODS else model)
            if method in METHODS and model != method:
                raise ValueError(f"speculative_config: model = {model!r}: method = {method!r} needs no model")
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
        }

    def line(self) -> str:
        """For the start-up report."""
        pays = "as many as pay" if self.adaptive else "always"
        return f"{self.method}, up to {self.num_speculative_tokens} drafts a request and step, {pays}"
