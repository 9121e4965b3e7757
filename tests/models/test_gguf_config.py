"""What a GGUF header says is computed as llama.cpp does: the same tiny model with the same setting in
transformers' words is the oracle, where it has such words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from octavo.config import EngineConfig
from octavo.model_config import ModelError
from octavo.weights import gguf_config
from octavo.weights.gguf_config import config_from_gguf
from octavo.weights.load import load_model
from tests.models import harness
from tests.models.harness import Runner
from tests.models.test_architectures import PROMPT, assert_close
from tests.models.test_gguf import write

LLAMA, GEMMA = "llama-gqa-tied", "gemma3-published"
HALF = 8  # rotary pairs of a head of llama


def load(path: Path, **options: Any) -> Any:
    return load_model(EngineConfig(model=str(path), **{"dtype": "float32", **options}), device=torch.device("cpu"))


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(path)
    assert str(path.parent) in str(caught.value)
    return str(caught.value)


def assert_equal(reference: Any, path: Path) -> None:
    (logits,) = Runner(load(path).model, torch.float32).step([], [(harness.Sequence(0), PROMPT)])
    with torch.inference_mode():
        assert_close(logits, reference(torch.tensor([PROMPT])).logits[0])


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **options}}


def gemma(full: dict[str, Any], local_theta: float = 1e4, **options: Any) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": local_theta}
    return {"rope_parameters": {"full_attention": {"rope_theta": 500.0, **full}, "sliding_attention": local}, **options}


ALL_FULL = {"layer_types": ["full_attention"] * 7}
EVERY_THIRD = [layer % 3 == 0 for layer in range(7)]
KEYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # Settings of transformers, and the header's keys without the architecture; None takes a key away.
    "factor without a type": (LLAMA, rope("linear", factor=4.0), {"rope.scaling.factor": 4.0}),
    "old factor": (LLAMA, rope("linear", factor=4.0), {"rope.scale_linear": 4.0}),
    "both factors": (LLAMA, rope("linear", factor=4.0), {"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}),
    "linear": (LLAMA, rope("linear", factor=4.0), {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "none": (LLAMA, rope("default"), {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "a factor of zero": (LLAMA, rope("default"), {"rope.scaling.factor": 0.0}),
    "yarn": (
        LLAMA,
        rope("yarn", factor=4.0, original_max_position_embeddings=16),
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.finetuned": True,
            "rope.scaling.yarn_beta_fast": 32.0,
        },
    ),
    "yarn of qwen": (
        "qwen3",
        rope("yarn", factor=4.0),
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
    ),
    "factor of attention": (
        LLAMA,
        rope("yarn", factor=4.0, attention_factor=(0.1 * np.log(4.0) + 1.0) * 0.9),
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.9},
    ),
    "no base": (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"rope.freq_base": None}),
    "gemma3 without a base": (GEMMA, gemma({"rope_theta": 1e4}), {"rope.freq_base": None}),
    "gemma3 without a window": (GEMMA, gemma({}, **ALL_FULL), {"attention.sliding_window": None}),
    "gemma3, a window of zero": (
        GEMMA,
        gemma({}, **ALL_FULL),
        {"attention.sliding_window": 0, "attention.sliding_window_pattern": 2},
    ),
    "gemma3, soft cap": (GEMMA, gemma({}, final_logit_softcapping=3.0), {"final_logit_softcapping": 3.0}),
    "gemma3, local base": (GEMMA, gemma({}, 70.0), {"rope.freq_base_swa": 70.0}),
    "gemma3, pattern": (GEMMA, gemma({}, sliding_window_pattern=3), {"attention.sliding_window_pattern": 3}),
    "gemma3, pattern of layers": (
        GEMMA,
        gemma({}, layer_types=["sliding_attention" if window else "full_attention" for window in EVERY_THIRD]),
        {"attention.sliding_window_pattern": EVERY_THIRD},
    ),
    "gemma3, factor": (GEMMA, gemma({"rope_type": "linear", "factor": 4.0}), {"rope.scaling.factor": 4.0}),
}


@pytest.mark.parametrize("name", KEYS)
def test_header_equals_transformers(name: str, tmp_path: Path) -> None:
    case, shape, keys = KEYS[name]

    def change(fields: dict[str, Any]) -> None:
        architecture = next(iter(fields)).split(".")[0]
        fields.update({f"{architecture}.{key}": value for key, value in keys.items()})
        for key in [key for key, value in fields.items() if value is None]:
            del fields[key]

    assert_equal(*write(case, tmp_path, change, **shape))


FACTORS = np.linspace(1.0, 3.0, HALF, dtype=np.float32)


def test_factors_of_frequencies_come_on_top_of_a_linear_one(tmp_path: Path) -> None:
    """LongRoPE with factors three times as large is the same in transformers' words."""
    options = rope("longrope", short_factor=[1.0] * HALF, long_factor=(3 * FACTORS).tolist(), attention_factor=0.8)
    options["rope_parameters"]["original_max_position_embeddings"] = 16
    assert_equal(
        *write(
            LLAMA,
            tmp_path,
            lambda fields: fields.update({"llama.rope.scaling.factor": 3.0, "llama.rope.scaling.attn_factor": 0.8}),
            extra_tensors={"rope_freqs.weight": FACTORS},
            **options,
        )
    )


def test_longrope(tmp_path: Path) -> None:
    options = rope("longrope", short_factor=[1.0] * HALF, long_factor=FACTORS.tolist(), attention_factor=1.2)
    options["rope_parameters"]["original_max_position_embeddings"] = 16
    keys = {
        "llama.rope.scaling.type": "longrope",
        "llama.rope.scaling.original_context_length": 16,
        "llama.rope.scaling.attn_factor": 1.2,
    }
    tensors = {"rope_factors_long.weight": FACTORS, "rope_factors_short.weight": np.ones(HALF, np.float32)}
    assert_equal(*write(LLAMA, tmp_path, lambda fields: fields.update(keys), extra_tensors=tensors, **options))


@pytest.mark.parametrize(
    ("factors", "named"),
    [
        (np.ones(HALF - 1, np.float32), "rope_freqs.weight: has 7 factors, but must have 8"),
        (np.ones((2, HALF), np.float32), "rope_freqs.weight: shape [2, 8], but must have one dimension"),
        (np.zeros(HALF, np.float32), "rope_freqs.weight: holds factors that are not above 0"),
    ],
)
def test_wrong_factors_of_frequencies_are_named(factors: np.ndarray, named: str, tmp_path: Path) -> None:
    _, path = write(LLAMA, tmp_path, extra_tensors={"rope_freqs.weight": factors})
    assert named in refused(path)


@pytest.mark.parametrize(
    ("case", "key", "value", "named"),
    [
        (LLAMA, "llama.rope.scaling.type", "dynamic", "llama.rope.scaling.type: 'dynamic' is not supported"),
        (LLAMA, "llama.rope.scaling.type", "longrope", "rope_factors_short.weight: None is not a list of 8 numbers"),
        (LLAMA, "llama.rope.scaling.factor", float("nan"), "llama.rope.scaling.factor: nan must be"),
        (LLAMA, "llama.rope.scaling.attn_factor", 0.0, "llama.rope.scaling.attn_factor: 0.0 must be"),
        (LLAMA, "llama.attention.value_length", 8, "llama.attention.value_length: 8 is not the head size 16"),
        (LLAMA, "llama.expert_count", 8, "llama.expert_count: 8 is not supported: mixtures"),
        (LLAMA, "llama.attention.causal", False, "llama.attention.causal: False is not supported"),
        (LLAMA, "llama.context_length", None, "llama.context_length: missing"),
        (GEMMA, "gemma3.rope.freq_base_swa", 0.0, "gemma3.rope.freq_base_swa: 0.0 must be"),
        (GEMMA, "gemma3.attention.sliding_window", "8", "gemma3.attention.sliding_window: '8' is not an integer"),
        (GEMMA, "gemma3.attention.sliding_window_pattern", 0, "gemma3.attention.sliding_window_pattern: 0 is outside"),
        (GEMMA, "gemma3.attention.sliding_window_pattern", [True], "sliding_window_pattern: is not a list of 7"),
        (GEMMA, "gemma3.attn_logit_softcapping", 2.0, "gemma3.attn_logit_softcapping: 2.0 is not supported"),
    ],
)
def test_headers_that_are_refused(case: str, key: str, value: Any, named: str, tmp_path: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields[key] = value
        if value is None:
            del fields[key]

    assert named in refused(write(case, tmp_path, change)[1])


@pytest.mark.parametrize(
    ("case", "keys", "tensor"),
    [
        (LLAMA, {}, "rope_factors_long.weight"),
        (LLAMA, {"llama.rope.scaling.type": "longrope"}, "rope_freqs.weight"),
        ("qwen2", {}, "rope_freqs.weight"),
    ],
)
def test_factors_that_llama_cpp_would_not_read(case: str, keys: dict[str, Any], tensor: str, tmp_path: Path) -> None:
    extra = {tensor: np.ones(HALF, np.float32)}
    _, path = write(case, tmp_path, lambda fields: fields.update(keys), extra_tensors=extra)
    assert f"{tensor}: not part of a" in refused(path)


def test_unknown_keys_of_the_architecture_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = {"llama.ssm.inner_size": 3, "general.odd": 1, "llama.attention.sliding_window": 4, "llama.vocab_size": 199}
    _, path = write(LLAMA, tmp_path, lambda fields: fields.update(keys))
    load(path, load_format="dummy")
    (warning,) = [record.getMessage() for record in caplog.records if "unknown keys" in record.getMessage()]
    assert warning.endswith("no effect: llama.attention.sliding_window, llama.ssm.inner_size")


class EveryKey:
    """A header with every key that the `gguf` package has for an architecture."""

    path = "every.gguf"

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def metadata(self) -> dict[str, Any]:
        parts = (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
        names = [name for part in parts for name in vars(part).values() if str(name).startswith("{arch}.")]
        sizes = {
            "attention.head_count": 4,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "block_count": 2,
            "context_length": 64,
            "embedding_length": 64,
            "feed_forward_length": 96,
            "rope.freq_base": 1e4,
        }
        values = dict.fromkeys(name.removeprefix("{arch}.") for name in names) | sizes
        return {f"{self.architecture}.{key}": value for key, value in values.items()}

    def tensors(self) -> list[tuple[str, str, list[int], int, int]]:
        return [("token_embd.weight", "F32", [199, 64], 0, 0)]


NO_WINDOW = {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}
OF_OTHER_ARCHITECTURES = """
activation_sparsity_scale altup.active_idx altup.num_inputs attention.decay_lora_rank attention.gate_lora_rank
attention.group_norm_epsilon attention.group_norm_groups attention.iclr_lora_rank attention.key_length_mla
attention.kv_lora_rank attention.q_lora_rank attention.relative_buckets_count attention.value_length_mla
attention.value_residual_mix_lora_rank decoder_block_count embedding_length_out embedding_length_per_layer_input
expert_chunk_feed_forward_length expert_feed_forward_length expert_gating_func expert_group_count expert_group_scale
expert_group_used_count expert_shared_count expert_shared_feed_forward_length expert_weights_norm
expert_weights_scale experts_per_group features_length full_attention_interval interleave_moe_layer_step
leading_dense_block_count moe_every_n_layers moe_latent_size n_deepstack_layers rescale_every_n_layers
router_logit_softcapping swiglu_clamp_exp swiglu_clamp_shexp swin_norm time_decay_extra_dim time_mix_extra_dim
token_shift_count {dense}_feat_in {dense}_feat_out
"""


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_every_key_of_the_gguf_package_stands_somewhere(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a release adds there is read, refused, harmless or of another architecture."""
    unknown: set[str] = set()
    monkeypatch.setattr(gguf_config, "warn_unknown", lambda path, names: unknown.update(names))
    config_from_gguf(EveryKey(architecture))
    found = {name.removeprefix(f"{architecture}.") for name in unknown}
    own = set() if architecture == "gemma3" else NO_WINDOW | {"final_logit_softcapping"}
    assert found == set(OF_OTHER_ARCHITECTURES.split()) | own
