"""Random models that a GPU's kernels take, of transformers: the oracles of the tests on one."""

import random
from typing import Any

import pytest
import torch

from octavo import SamplingParams


def make(family: str, num_layers: int, **shape: Any) -> torch.nn.Module:
    """family: as transformers names its classes, such as Qwen3. shape: fields of its config."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {
        "vocab_size": 2048,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "head_dim": 64,
        **shape,
    }
    if family == "Gemma3":
        config = transformers.Gemma3TextConfig(**shape, sliding_window=96, query_pre_attn_scalar=64)
    else:
        config = getattr(transformers, f"{family}Config")(**shape)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def various(rng: random.Random, longest: int) -> SamplingParams:
    """Parameters of a request of fewer than `longest` tokens, that reach every kernel of sampling."""
    return SamplingParams(
        temperature=rng.choice([0.0, 1.0]),
        top_k=rng.choice([0, 5]),
        top_p=rng.choice([0.9, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.1]),
        logprobs=rng.choice([None, 3]),
        n=rng.choice([1, 2]),
        max_tokens=rng.randrange(1, longest),
        ignore_eos=True,
    )
