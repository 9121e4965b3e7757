"""What a cache of few bits makes of keys and values, for transformers: written from the formats'
description, not from our code.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor


def rounded(x: Tensor, kv_dtype: str) -> Tensor:
    """x [..., head_dim] as a cache of `kv_dtype` gives it back, one scale a token and head."""
    if kv_dtype in ("float32", "float16", "bfloat16"):
        return x.to(getattr(torch, kv_dtype)).float()
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    largest = torch.where(largest == 0, 1.0, largest)
    if kv_dtype == "int4":
        return (x / (largest / -8)).round().clamp(-8, 7) * (largest / -8)
    if kv_dtype == "int8":
        return (x / (largest.abs() / 127)).round() * (largest.abs() / 127)
    assert kv_dtype == "fp8"
    return (x / (largest.abs() / 448)).to(torch.float8_e4m3fn).float() * (largest.abs() / 448)


class RoundingCache(transformers.DynamicCache):  # type: ignore[misc]
    """Holds what pages of `kv_dtype` hold of each key and value."""

    def __init__(self, kv_dtype: str) -> None:
        super().__init__()
        self.kv_dtype = kv_dtype

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(rounded(keys, self.kv_dtype), rounded(values, self.kv_dtype), *args, **kwargs)


def as_argument(model: torch.nn.Module, cache: RoundingCache) -> dict[str, RoundingCache]:
    """The cache under the name that this transformers has for it."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


@torch.inference_mode()
def logits_over(model: torch.nn.Module, token_ids: list[int], kv_dtype: str) -> Tensor:
    """transformers' logits [tokens, vocab] float32 of one sequence, over such a cache."""
    ids = torch.tensor([token_ids], device=model.device)
    logits: Tensor = model(ids, **as_argument(model, RoundingCache(kv_dtype))).logits[0].float()
    return logits
