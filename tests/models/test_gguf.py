"""GGUF against the `gguf` package: names and permutation by its own converter's rules. The formats of
blocks have `tests/cpu/test_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from octavo import _core
from octavo.config import EngineConfig
from octavo.model_config import ModelError
from octavo.weights import load
from octavo.weights.gguf import GgufSource
from octavo.weights.gguf_config import config_from_gguf
from octavo.weights.load import load_model
from tests.models import harness
from tests.models.harness import Runner
from tests.models.test_architectures import PROMPT, assert_close, make


def test_default_model_equals_the_gguf_package_exactly(smollm2_path: Path) -> None:
    header = _core.GgufFile(str(smollm2_path))
    source = GgufSource(header, config_from_gguf(header))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path).tensors}
    shapes = source.shapes()
    assert len(shapes) == len(stored) == 272
    for name, shape in shapes.items():
        tensor = stored[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            expected = unpermute(expected, 9 if "q_proj" in name else 3)
        actual = torch.empty(shape)
        source.fill(name, actual)
        assert np.array_equal(actual.numpy(), expected.reshape(shape)), name


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of Llama models."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Its inverse by search, not by a formula of its own: where did each row go?"""
    order = permute(np.arange(rows.shape[0]), heads)
    result = np.empty_like(rows)
    result[order] = rows
    return result


ARCHITECTURES = {
    "llama-gqa-tied": gguf.MODEL_ARCH.LLAMA,
    "llama-mha-untied": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3-published": gguf.MODEL_ARCH.GEMMA3,
}


def write(
    case: str,
    folder: Path,
    change: Callable[[dict[str, Any]], None] = lambda fields: None,
    extra_tokens: int = 0,
    control: Sequence[str] = (),
    ordinary: Sequence[str] = (),
    extra_tensors: Mapping[str, np.ndarray] | None = None,
    split_max_tensors: int = 0,
    kind: str = "F32",
    **shape: Any,
) -> tuple[Any, Path]:
    """A tiny random model in float32 GGUF as llama.cpp's converter lays it out; `change` may spoil
    the metadata.

    control and ordinary: texts of the tokens from id 100 on. split_max_tensors: of each part, of
    which the first is returned. kind: of matrices. shape: keys of the model's config.
    """
    model = make(case, folder, **shape)
    config, arch = model.config, ARCHITECTURES[case]
    name = gguf.MODEL_ARCH_NAMES[arch]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    fields: dict[str, Any] = {
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": kv_heads,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{name}.rope.freq_base": float(
            config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]
        ),
        f"{name}.attention.key_length": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }
    if arch == gguf.MODEL_ARCH.GEMMA3:
        fields[f"{name}.attention.sliding_window"] = config.sliding_window
    change(fields)
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, name, split_max_tensors=split_max_tensors)
    for key, value in fields.items():
        kinds = {float: writer.add_float32, str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
        kinds.get(type(value), writer.add_uint32)(key, value)
    pieces = ["a", "b", "ab", *(f"t{index}" for index in range(3, config.vocab_size + extra_tokens))]
    named = [*control, *ordinary]
    pieces[100 : 100 + len(named)] = named
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if 100 <= index < 100 + len(control) else 1 for index in range(len(pieces))])
    writer.add_token_merges(["a b"])
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if arch == gguf.MODEL_ARCH.LLAMA and "self_attn.q_proj" in key:
            values = permute(values, heads)
        elif arch == gguf.MODEL_ARCH.LLAMA and "self_attn.k_proj" in key:
            values = permute(values, kv_heads)
        elif arch == gguf.MODEL_ARCH.GEMMA3 and key.endswith("norm.weight"):
            values = values + 1
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        stored_values = gguf.quantize(values, stored) if kind != "F32" else values
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), stored_values, raw_dtype=stored)
    for key, values in (extra_tensors or {}).items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(folder.glob("model-*.gguf"))
    return model, parts[0] if parts else path


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_logits_from_gguf_equal_transformers(case: str, tmp_path: Path) -> None:
    reference, path = write(case, tmp_path)
    loaded = load_model(EngineConfig(model=str(path), dtype="float32"), device=torch.device("cpu"))
    (logits,) = Runner(loaded.model, torch.float32).step([], [(harness.Sequence(0), PROMPT)])
    with torch.inference_mode():
        assert_close(logits, reference(torch.tensor([PROMPT])).logits[0])


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("case", list(ARCHITECTURES))
def test_logits_from_blocks_are_those_of_the_expanded_file(case: str, kind: str, tmp_path: Path) -> None:
    """The expanded one's are transformers', and its numbers the gguf package's."""
    _, path = write(case, tmp_path, kind=kind, hidden_size=64, intermediate_size=96, head_dim=32)
    logits = {}
    for dtype in ("auto", "float32"):
        loaded = load_model(EngineConfig(model=str(path), dtype=dtype), device=torch.device("cpu"))
        assert loaded.in_blocks == (dtype == "auto")
        runner = Runner(loaded.model, torch.float32)
        sequence = harness.Sequence(0)
        (prompt,) = runner.step([], [(sequence, PROMPT)])
        (decoded,) = runner.step([(sequence, 7)], [])
        logits[dtype] = torch.cat((prompt, decoded))
    error = (logits["auto"] - logits["float32"]).norm() / logits["float32"].norm()
    assert error < 1e-3


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    _, path = write("llama-gqa-tied", tmp_path, kind="Q8_0", hidden_size=64, intermediate_size=96, head_dim=32)
    offset = next(o for name, _, _, o, _ in _core.GgufFile(str(path)).tensors() if name == "blk.1.ffn_down.weight")
    data = bytearray(path.read_bytes())
    data[offset : offset + 2] = np.array([np.inf], np.float16).tobytes()
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"NaN or infinite numbers in 1 tensors.*layers\.1\.mlp\.down_proj\.weight"):
        load_model(EngineConfig(model=str(path)), device=torch.device("cpu"))


@pytest.mark.parametrize(("layers", "scaled_by"), [(34, 256), (62, 168)])
def test_gemmas_scale_of_attention(layers: int, scaled_by: int) -> None:
    """llama.cpp, `llama_model_gemma3`: 1 / sqrt(head size), but for the 27B 1 / sqrt(embedding size
    / heads).
    """

    class Header:
        path, architecture = "gemma.gguf", "gemma3"

        def metadata(self) -> dict[str, Any]:
            sizes = {"embedding_length": 5376, "block_count": layers, "feed_forward_length": 21504}
            sizes |= {"context_length": 131072}
            heads = {"head_count": 32, "head_count_kv": 16, "key_length": 256, "layer_norm_rms_epsilon": 1e-6}
            return {f"gemma3.{k}": v for k, v in sizes.items()} | {f"gemma3.attention.{k}": v for k, v in heads.items()}

        def tensors(self) -> list[tuple[str, str, list[int], int, int]]:
            return [("token_embd.weight", "F32", [262208, 5376], 0, 0)]

    assert config_from_gguf(Header()).attention_scale == pytest.approx(scaled_by**-0.5)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("llama.attention.head_count", 0, "llama.attention.head_count: 0 is outside"),
        ("llama.attention.head_count", 7, "llama.attention.head_count"),
        ("llama.attention.head_count_kv", 8, "llama.attention.head_count_kv: 8 does not divide"),
        ("llama.block_count", 1_000_000_000, "llama.block_count: 1000000000 is outside"),
        ("llama.block_count", 4, "9 tensors do not fit the config: model.layers.3.input_layernorm.weight: missing"),
        ("llama.rope.dimension_count", 999, "llama.rope.dimension_count: 999 is not the head size"),
        ("llama.rope.freq_base", float("nan"), "llama.rope.freq_base: nan must be"),
        ("llama.rope.freq_base", 0.0, "llama.rope.freq_base: 0.0 must be"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon: nan must be"),
        ("llama.embedding_length", 68, "do not fit the config"),
    ],
)
def test_lying_metadata_is_named(field: str, value: float, named: str, tmp_path: Path) -> None:
    _, path = write("llama-gqa-tied", tmp_path, lambda fields: fields.update({field: value}))
    with pytest.raises(ModelError) as caught:
        load_model(EngineConfig(model=str(path)), device=torch.device("cpu"))
    assert named in str(caught.value)
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 4096, 0.5, 0.999])
def test_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    _, path = write("llama-gqa-tied", tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(ModelError, match=r"model\.gguf"):
        load_model(EngineConfig(model=str(path)), device=torch.device("cpu"))


@pytest.mark.parametrize("extra", [-1, 1])
def test_vocabulary_of_another_length_than_the_embedding(extra: int, tmp_path: Path) -> None:
    _, path = write("llama-gqa-tied", tmp_path, extra_tokens=extra)
    with pytest.raises(ModelError, match=rf"model\.gguf.*{199 + extra}"):
        load_model(EngineConfig(model=str(path)), device=torch.device("cpu"))


def test_end_tokens_are_found_by_key_and_by_text(tmp_path: Path) -> None:
    """The texts that llama.cpp takes for ends (`special_eog_ids` in llama-vocab.cpp), where they
    are control tokens.
    """
    control = ["<|eot_id|>", "<|start|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|endoftext|>"]

    def ends(**keys: int) -> set[int]:
        named = {f"tokenizer.ggml.{key}_token_id": value for key, value in keys.items()}
        _, path = write("llama-gqa-tied", tmp_path, lambda fields: fields.update(named), 0, control, ["<EOT>"])
        found = load_model(EngineConfig(model=str(path), load_format="dummy"), device=torch.device("cpu")).eos_token_ids
        assert len(set(found)) == len(found)
        return set(found)

    by_text = {100, 102, 103, 104, 105}
    assert ends() == by_text
    assert ends(eos=2) == by_text | {2}
    assert ends(eos=102, eot=5) == by_text | {5}
    assert ends(eot=5, eom=6) == by_text | {5, 6}


@pytest.mark.parametrize(("wanted", "defaults"), [("auto", {"temperature": 0.2, "top_p": 0.5}), ("vllm", {})])
def test_what_goes_with_the_default_model(
    wanted: str,
    defaults: dict[str, float],
    smollm2_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(load, "fill_model", lambda *_: None)
    config = EngineConfig(model=str(smollm2_path), generation_config=wanted)
    with caplog.at_level("INFO", "octavo"):
        loaded = load_model(config, device=torch.device("cpu"))
    assert loaded.eos_token_ids == (2, 0)  # <|im_end|>, <|endoftext|>
    assert loaded.generation_defaults == defaults
    assert "its Q4_1, Q8_0 blocks are used as they are: 0.09 GiB in the file" in caplog.text
