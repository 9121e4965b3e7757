"""Logits of every architecture against transformers, on tiny random models: one prefill, chunks,
and decodes in company.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from octavo.config import EngineConfig
from octavo.layers.schemes.cpu import widens_half
from octavo.weights.load import load_model
from tests.models.harness import Runner, Sequence

TOLERANCE = 1e-4
"""float32 sums in another order; logits here are of size 1, and observed differences under 1e-5."""

SHAPE = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {
    "head_dim": 32,
    "sliding_window": 8,
    "query_pre_attn_scalar": 40,
    "num_hidden_layers": 7,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 3 + ["full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha-untied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama-gqa-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mqa-biases": ("Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 24}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral-window": ("Mistral", {"sliding_window": 8}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma3": ("Gemma3Text", GEMMA),
    "gemma3-published": (  # the pattern and rotary bases of the published models, which GGUF files leave out
        "Gemma3Text",
        {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32, "num_hidden_layers": 7},
    ),
    "gemma3-logit-soft-cap": (
        "Gemma3Text",
        {**GEMMA, "final_logit_softcapping": 3.0},
    ),
}
PROMPT = [int(x) for x in torch.randint(3, 199, (41,), generator=torch.Generator().manual_seed(1))]
OTHER = [int(x) for x in torch.randint(3, 199, (19,), generator=torch.Generator().manual_seed(2))]


def make(case: str, folder: Path, **shape: Any) -> torch.nn.Module:
    """A random model whose biases and norms are random too: transformers starts them at constants
    that hide mistakes.
    """
    family, options = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **options, **shape})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[torch.Tensor, torch.Tensor, Runner]:
    reference = make(request.param, tmp_path)
    with torch.inference_mode():
        expected = [reference(torch.tensor([ids])).logits[0].float() for ids in (PROMPT, OTHER)]
    loaded = load_model(EngineConfig(model=str(tmp_path), dtype="float32"), device=torch.device("cpu"))
    return expected[0], expected[1], Runner(loaded.model, torch.float32)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_prefill(case: tuple[torch.Tensor, torch.Tensor, Runner]) -> None:
    expected, _, runner = case
    (logits,) = runner.step([], [(Sequence(0), PROMPT)])
    assert_close(logits, expected)


def test_chunks_beside_another_prefill(case: tuple[torch.Tensor, torch.Tensor, Runner]) -> None:
    expected, other, runner = case
    sequence, second = Sequence(2), Sequence(1)
    parts = [runner.step([], [(sequence, PROMPT[:13])])[0]]
    middle, beside = runner.step([], [(sequence, PROMPT[13:30]), (second, OTHER)])
    parts += [middle, *runner.step([], [(sequence, PROMPT[30:])])]
    assert_close(torch.cat(parts), expected)
    assert_close(beside, other)


def test_decodes_beside_a_prefill(case: tuple[torch.Tensor, torch.Tensor, Runner]) -> None:
    expected, other, runner = case
    sequence, second = Sequence(3), Sequence(0)
    parts = runner.step([], [(sequence, PROMPT[:5])])
    first, beside = runner.step([(sequence, PROMPT[5])], [(second, OTHER[:7])])
    parts.append(first)
    others = [beside]
    for step in range(12):  # two decode rows of different lengths
        one, two = runner.step([(sequence, PROMPT[6 + step]), (second, OTHER[7 + step])], [])
        parts.append(one)
        others.append(two)
    for token in PROMPT[18:]:
        parts += runner.step([(sequence, token)], [])
    assert_close(torch.cat(parts), expected)
    assert_close(torch.cat(others), other)


@pytest.mark.skipif(not widens_half(torch.bfloat16), reason="this processor multiplies bfloat16 by itself")
@pytest.mark.parametrize("name", ["llama3-rope", "qwen3"])
def test_only_weights_are_rounded_to_bfloat16(name: str, tmp_path: Path) -> None:
    reference = make(name, tmp_path)
    for parameter in reference.parameters():
        parameter.data = parameter.data.bfloat16().float()
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    loaded = load_model(EngineConfig(model=str(tmp_path), dtype="bfloat16"), device=torch.device("cpu"))
    sequence, runner = Sequence(0), Runner(loaded.model, torch.float32)
    parts = runner.step([], [(sequence, PROMPT[:30])])
    for token in PROMPT[30:]:
        parts += runner.step([(sequence, token)], [])
    # Weights under 6e-5 move in float16 (`HalfScheme`); a hidden state in bfloat16 would be off by
    # 1e-2.
    torch.testing.assert_close(torch.cat(parts), expected, atol=5e-4, rtol=5e-4)
