"""Every key of a config that changes what transformers computes is honoured or refused by name.

The oracle is transformers, which loads the same folder: tiny random models whose `config.json` is
changed by hand. The sweeps go over its config classes and its modelling code, so that a key which
a new release brings must be put somewhere.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import cache_utils, masking_utils, modeling_rope_utils

from octavo.config import EngineConfig
from octavo.model_config import ModelConfig, ModelError
from octavo.models import known_keys
from octavo.models.registry import FAMILIES, MODEL_TYPES, config_from_dict
from octavo.models.rope_reader import REFUSED_ROPE_KINDS, ROPE_KINDS
from octavo.weights.load import load_model
from tests.models.harness import Runner, Sequence
from tests.models.test_architectures import SHAPE, assert_close

LENGTH = 90  # over every original length and every window here
PROMPT = [int(x) for x in torch.randint(3, 199, (LENGTH,), generator=torch.Generator().manual_seed(3))]
SMALL: dict[str, Any] = {**SHAPE, "num_hidden_layers": 2, "max_position_embeddings": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "max_window_layers": 1}),
    "gemma3_text": (
        "Gemma3Text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24, "sliding_window_pattern": 2},
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a random model of a family, made once."""
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            save(kind, made[kind])
        return made[kind]

    return folder_of


def save(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    if kind == "gemma3":
        family, options = MODELS["gemma3_text"]
        vision = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 8,
            "patch_size": 4,
        }
        config = transformers.Gemma3Config(
            text_config={**SMALL, **options}, vision_config=vision, mm_tokens_per_image=4, image_token_index=198
        )
        model: Any = transformers.Gemma3ForConditionalGeneration(config)
    else:
        family, options = MODELS[kind]
        config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
        model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)


def changed(saved: Any, kind: str, folder: Path, change: Mapping[str, Any]) -> Path:
    """The family's folder with other keys in its config; `...` takes a key away."""
    shutil.copytree(saved(kind), folder, dirs_exist_ok=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def ours(folder: Path, **options: Any) -> torch.Tensor:
    config = EngineConfig(model=str(folder), **{"dtype": "float32", **options})
    loaded = load_model(config, device=torch.device("cpu"))
    return Runner(loaded.model, torch.float32).step([], [(Sequence(0), PROMPT)])[0]


def theirs(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0]


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        ours(folder)
    assert str(folder / "config.json") in str(caught.value)
    return str(caught.value)


HALF = 8  # rotary pairs of a head
LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
    "long_factor": [2.0 + 0.5 * i for i in range(HALF)],
    "original_max_position_embeddings": 32,
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "linear by its old name": {"type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "llama3, original length outside": {**LLAMA3, "original_max_position_embeddings": ...},
    "yarn": YARN,
    "yarn with betas": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn with a factor of attention": {**YARN, "attention_factor": 1.3},
    "yarn with mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn with one mscale": {**YARN, "mscale": 0.7},
    "yarn without original length": {**YARN, "original_max_position_embeddings": ...},
    "longrope": LONGROPE,
    "longrope with factors": {**LONGROPE, "factor": 8.0},
    "longrope with a factor of attention": {**LONGROPE, "attention_factor": 0.8},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
}


def without_gaps(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not ...}


ROPES_OF_FAMILIES = [(name, "llama") for name in ROPES]  # the others' are read by the same code
ROPES_OF_FAMILIES += [(name, "gemma3_text") for name in ("linear", "llama3", "yarn", "longrope", "proportional")]
ROPES_OF_FAMILIES += [("yarn", "mistral"), ("yarn", "qwen2"), ("longrope", "qwen3")]


@pytest.mark.parametrize(("name", "kind"), ROPES_OF_FAMILIES)
def test_rope_kinds_equal_transformers(name: str, kind: str, saved: Any, tmp_path: Path) -> None:
    table = without_gaps(ROPES[name])
    change: dict[str, Any] = {"rope_parameters": {"rope_theta": 500.0, **table}}
    if kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 50.0}
        change = {"rope_parameters": {"full_attention": {"rope_theta": 500.0, **table}, "sliding_attention": local}}
    if name == "llama3, original length outside":
        change["original_max_position_embeddings"] = 32
    folder = changed(saved, kind, tmp_path, change)
    actual = ours(folder)
    assert_close(actual, theirs(folder))
    plain = ours(changed(saved, kind, tmp_path / "plain", {"rope_parameters": ...}))
    assert (actual - plain).abs().max() > 1e-3  # the key does change something


KEYS: dict[str, tuple[str, dict[str, Any]]] = {
    # Rotary settings in their old place, alone and beside the new one.
    "rope_scaling and rope_theta": ("llama", {"rope_parameters": ..., "rope_scaling": YARN, "rope_theta": 700.0}),
    "rope_scaling beside rope_parameters": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}, "rope_scaling": YARN},
    ),
    "linear beside rope_parameters": ("qwen2", {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 90.0}),
    "llama3 beside rope_parameters": ("mistral", {"rope_scaling": LLAMA3}),
    "an empty rope_scaling": ("qwen3", {"rope_parameters": {**YARN, "rope_theta": 70.0}, "rope_scaling": {}}),
    "no rotary settings": ("llama", {"rope_parameters": ...}),
    "yarn not rounded": ("llama", {"rope_parameters": {**YARN, "rope_theta": 500.0, "truncate": False}}),
    "original length outside wins": ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}),
    "original length outside of a default": ("llama", {"original_max_position_embeddings": 64}),
    "factor without a type": ("llama", {"rope_scaling": {"factor": 4.0}}),
    "gemma3, old keys": (
        "gemma3_text",
        {"rope_parameters": ..., "rope_scaling": LINEAR, "rope_theta": 700.0, "rope_local_base_freq": 70.0},
    ),
    "gemma3, full layers alone": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 70.0}}},
    ),
    "gemma3, window layers alone": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 70.0}}},
    ),
    "gemma3, window layers without a base": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "default"}}, "rope_local_base_freq": 70.0},
    ),
    "gemma3, a null table": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": None, "sliding_attention": {"rope_theta": 70.0}}, "rope_theta": 90.0},
    ),
    "gemma3, both": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": {"rope_theta": 70.0}, "sliding_attention": {"rope_theta": 7.0}},
            "rope_scaling": LINEAR,
        },
    ),
    "gemma3, yarn in the window layers": ("gemma3_text", {"rope_parameters": {"sliding_attention": YARN}}),
    # Windows.
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "mistral with the default window": ("mistral", {"sliding_window": ...}),
    "mistral with a window": ("mistral", {"sliding_window": 16}),
    "qwen2 with the default window": ("qwen2", {"use_sliding_window": True, "sliding_window": ..., "layer_types": ...}),
    "qwen3 with a window": ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "layer_types": ...}),
    "qwen2 with a null window": ("qwen2", {"use_sliding_window": True, "sliding_window": None, "layer_types": ...}),
    "qwen2 with layer types": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma3 with layer types": (
        "gemma3_text",
        {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "gemma3 with a pattern": ("gemma3_text", {"layer_types": ..., "sliding_window_pattern": 2}),
    # Of another family, or of none.
    "model_type decides": ("mistral", {"architectures": ["LlamaForCausalLM"], "sliding_window": 16}),
    "model_type decides for llama": ("llama", {"architectures": ["MistralForCausalLM"]}),
    "hidden_activation of llama": ("llama", {"hidden_activation": "gelu_pytorch_tanh"}),
    "hidden_act of gemma3": ("gemma3_text", {"hidden_act": "silu"}),
    "soft caps": ("gemma3_text", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}),
    "scale of attention": ("gemma3_text", {"query_pre_attn_scalar": 40}),
    "attention_bias of mistral": ("mistral", {"attention_bias": True, "mlp_bias": True}),
    "epsilon": ("qwen3", {"rms_norm_eps": 0.1}),
    "activation": ("qwen2", {"hidden_act": "gelu_pytorch_tanh"}),
    "defaults": ("llama", {"rms_norm_eps": ..., "hidden_act": ..., "bos_token_id": ..., "eos_token_id": ...}),
    "both parts": ("gemma3", {}),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_equal_transformers(name: str, saved: Any, tmp_path: Path) -> None:
    kind, change = KEYS[name]
    folder = changed(saved, kind, tmp_path, change)
    assert_close(ours(folder), theirs(folder))


def config_of(values: Mapping[str, Any]) -> ModelConfig:
    return config_from_dict(values, "config.json")


def test_top_level_of_a_model_with_two_parts(saved: Any, tmp_path: Path) -> None:
    """What stands at the top goes before the text's own: end tokens, the tie of the head, the type."""
    values = json.loads((saved("gemma3") / "config.json").read_text())
    text = {**values["text_config"], "eos_token_id": 1, "tie_word_embeddings": False, "dtype": "float16"}
    values = {**values, "text_config": text, "eos_token_id": [1, 106], "dtype": "bfloat16"}
    config = config_of(values)
    assert (config.eos_token_ids, config.tie_word_embeddings) == ((1, 106), True)
    assert config.checkpoint_dtype == "bfloat16"
    for key in ("eos_token_id", "dtype"):
        del values[key]
    config = config_of({**values, "tie_word_embeddings": False})
    assert (config.eos_token_ids, config.tie_word_embeddings) == ((1,), False)
    assert config.checkpoint_dtype == "float16"
    # Sizes at the top are those of nothing.
    assert config_of({**values, "hidden_size": 6}).hidden_size == text["hidden_size"]


@pytest.mark.parametrize("kind", [*MODELS, "gemma3"])
def test_end_tokens_are_those_of_transformers(kind: str) -> None:
    """Where a config has none, the class of the config does."""
    theirs = transformers.CONFIG_MAPPING[kind]()
    generation = transformers.GenerationConfig.from_model_config(theirs)
    eos = generation.eos_token_id
    found = config_of({"architectures": [MODEL_TYPES[kind].architectures[0]], "model_type": kind})
    assert found.eos_token_ids == (() if eos is None else (eos,))
    assert found.bos_token_id == generation.bos_token_id


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
    "not causal": ("llama", {"is_causal": False}, "is_causal: False"),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "cached already"),
    "axial": ("llama", {"rope_parameters": {"rope_type": "axial"}}, "rope_parameters.rope_type: 'axial'"),
    "two types": ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": ...}, "type"),
    "tables of layer types": (
        "qwen2",
        {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        "rope_parameters.full_attention: an object",
    ),
    "no tables of layer types": ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta"),
    "part of the dimensions": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1"),
    "yarn without a factor": ("llama", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: missing"),
    "factors of another length": (
        "llama",
        {"rope_scaling": {**LONGROPE, "long_factor": [1.0] * 7}},
        "rope_scaling.long_factor",
    ),
    "a factor of zero": (
        "llama",
        {"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 7 + [0.0]}},
        "rope_scaling.short_factor.7: 0.0 must be",
    ),
    "window layers without a window": (
        "gemma3_text",
        {"sliding_window": None},
        "sliding_window: missing, but layer_types has sliding_attention",
    ),
    "unused window of layer types": (
        "qwen3",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "sliding_window: missing",
    ),
    "mistral with full layers": (
        "mistral",
        {"sliding_window": 8, "layer_types": ["full_attention", "full_attention"]},
        "layer_types: full_attention beside sliding_window",
    ),
    "a window of llama": ("llama", {"sliding_window": 8}, "sliding_window: not supported with LlamaForCausalLM"),
    "another model_type": ("llama", {"model_type": "cohere"}, "model_type: 'cohere' is not supported"),
    "other layers": ("llama", {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
    "other files": ("llama", {"transformers_weights": "x.safetensors"}, "transformers_weights"),
    "a cap that is not applied": (
        "gemma3",
        {"text_config": {"final_logit_softcapping": 3.0}},
        "text_config.final_logit_softcapping",
    ),
    "bidirectional text": (
        "gemma3",
        {"text_config": {"use_bidirectional_attention": True}},
        "text_config.use_bidirectional_attention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_keys_that_are_refused(name: str, saved: Any, tmp_path: Path) -> None:
    kind, change, named = REFUSED[name]
    assert named in refused(changed(saved, kind, tmp_path, change))


def test_longrope_goes_by_the_length_that_is_served(
    saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed(saved, "llama", tmp_path, {"rope_parameters": {**LONGROPE, "rope_theta": 500.0}})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([PROMPT[:30]])
    with torch.inference_mode():
        short = model(prompt).logits[0]
    config = EngineConfig(model=str(folder), dtype="float32", max_model_len=32)
    caplog.set_level("INFO")
    loaded = load_model(config, device=torch.device("cpu"))
    (logits,) = Runner(loaded.model, torch.float32, max_len=32).step([], [(Sequence(0), PROMPT[:30])])
    assert_close(logits, short)
    assert "short factors" in caplog.text
    assert_close(ours(folder), theirs(folder))
    assert "long factors" in caplog.text


def test_model_type_decides_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"})
    assert (config.architecture, set(config.layer_windows)) == ("MistralForCausalLM", {4096})
    assert "model_type: 'mistral' decides" in caplog.text
    config = config_of({"architectures": ["MistralForCausalLM"], "model_type": "llama"})
    assert (config.architecture, set(config.layer_windows)) == ("LlamaForCausalLM", {0})


def test_yarn_extends_the_length_of_files_that_kept_the_old_one() -> None:
    values = {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768}
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert config_of({**values, "rope_scaling": yarn}).max_position_embeddings == 131072
    assert config_of({**values, "rope_scaling": {**yarn, "factor": 0.5}}).max_position_embeddings == 32768


def unknown_keys(caplog: pytest.LogCaptureFixture) -> list[str]:
    texts = [record.getMessage() for record in caplog.records if "unknown keys" in record.getMessage()]
    return [name for text in texts for name in text.split("no effect: ")[1].split(", ")]


def test_unknown_keys_are_named(caplog: pytest.LogCaptureFixture) -> None:
    values = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "residual_multiplier": 2.0,
        "_notes": 1,
        "text_config": {"logit_scale": 2.0, "rope_parameters": {"full_attention": {"rope_type": "default", "beta": 1}}},
    }
    config_of(values)
    assert unknown_keys(caplog) == [
        "residual_multiplier",
        "text_config.logit_scale",
        "text_config.rope_parameters.full_attention.beta",
    ]
    caplog.clear()
    config_of({"architectures": ["LlamaForCausalLM"], **{f"key{'y' * 3000}{i}": i for i in range(999)}})
    assert len(caplog.text) < 4000 and "and 979 more" in caplog.text


CONFIGS = {family.model_type: transformers.CONFIG_MAPPING[family.model_type] for family in FAMILIES}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_of_the_config_classes_is_known(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    values = {field.name: None for field in dataclasses.fields(CONFIGS[kind])}
    values |= {key: value for key, value in CONFIGS[kind]().to_dict().items() if key in values and value is not None}
    values["architectures"] = list(MODEL_TYPES[kind].architectures)
    config_of(values)
    assert unknown_keys(caplog) == []


@pytest.mark.parametrize("kind", CONFIGS)
def test_defaults_are_those_of_the_config_classes(kind: str) -> None:
    """Of every key that is read; harmless ones may have any."""
    theirs = {field.name: field.default for field in dataclasses.fields(CONFIGS[kind])}
    ours = MODEL_TYPES[kind].defaults if kind != "gemma3" else {"tie_word_embeddings": True}
    own = {"rope_theta", "rope_local_base_freq", "sliding_window_pattern"}  # transformers has these in its code
    for key, default in theirs.items():
        if key not in known_keys.HARMLESS and key not in known_keys.REFUSED:
            assert (ours.get(key) or None) == (default or None), key
    assert set(ours) - own <= set(theirs)


def attributes(source: str) -> Iterator[str]:
    """Of a config, as modelling code reads them."""
    yield from re.findall(r"\b(?:decoder_|effective_|text_)?config\.(\w+)", source)
    yield from re.findall(r"""(?:get|has)attr\((?:self\.)?(?:decoder_|text_)?config, ["'](\w+)""", source)


@pytest.mark.parametrize("kind", MODELS)
def test_every_attribute_that_modelling_code_reads_is_known(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    modules = [masking_utils, cache_utils, inspect.getmodule(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[CONFIGS[kind]])]
    names = {name for module in modules for name in attributes(inspect.getsource(module))}  # type: ignore[arg-type]
    names = {name for name in names if not name.startswith("_")} - {"get_text_config", "to_dict"}
    names -= {"text_config", "image_token_id", "vision_config"}  # of gemma3 as a whole
    values = CONFIGS[kind]().to_dict()
    assert {"hidden_size", "is_causal", "rope_parameters"} <= names
    config_of({**{name: values.get(name) for name in names}, "architectures": [MODEL_TYPES[kind].architectures[0]]})
    assert unknown_keys(caplog) == []


SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 199,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}


def test_every_kind_of_rope_and_every_key_of_its_table_is_known(caplog: pytest.LogCaptureFixture) -> None:
    assert set(modeling_rope_utils.ROPE_INIT_FUNCTIONS) | {"default"} <= {*ROPE_KINDS, *REFUSED_ROPE_KINDS}
    assert not set(ROPE_KINDS) & set(REFUSED_ROPE_KINDS)
    keys = set(modeling_rope_utils.RopeParameters.__annotations__)
    read = set()
    for table in (YARN, LONGROPE, LLAMA3, LINEAR, ROPES["proportional"]):
        caplog.clear()
        config_of({"architectures": ["LlamaForCausalLM"], **SIZES, "rope_scaling": {**dict.fromkeys(keys), **table}})
        read |= keys - {name.removeprefix("rope_scaling.") for name in unknown_keys(caplog)}
    assert read == keys - {"mrope_section"}  # of images
