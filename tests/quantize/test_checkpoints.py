"""Checkpoints that `octavo quantize` writes: what transformers makes of them, what they mean, and
how much they lose.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from octavo.quantize import methods
from octavo.quantize.options import METHODS, Options
from octavo.quantize.run import Quantisation
from octavo.weights.gguf_text import write_gguf_text
from tests.models.test_gguf import write
from tests.quantize.checkpoints import CALIBRATION, SEEN, SHAPE, TEXT, meant, ours, run, small_model, tensors_of, theirs

pytest.importorskip("compressed_tensors", reason="needs Python 3.11", exc_type=ImportError)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the mean token, in standard deviations of the logits."""
    return float(((actual - expected).abs() / expected.std()).mean())


COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("llama-gqa-tied", {"method": "rtn", "group_size": 32}),
    "rtn-rows": ("mistral-window", {"method": "rtn", "group_size": -1}),
    "rtn-8": ("qwen3", {"method": "rtn", "bits": 8}),
    "gptq-act-order": ("llama-mqa-biases", {"method": "gptq", "group_size": 32, "desc_act": True}),
    "awq": ("gemma3-published", {"method": "awq"}),
    "int8": ("qwen2", {"method": "int8"}),
    "fp8": ("llama-mha-untied", {"method": "fp8"}),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_transformers_computes_what_we_do(name: str, tmp_path: Path) -> None:
    """Through compressed-tensors, in float32."""
    case, options = COMPRESSED[name]
    small_model(case, tmp_path / "plain", uneven=name != "int8")
    folder = run(tmp_path / "plain", tmp_path / "made", **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    actual, expected = ours(folder), theirs(model)
    if name not in ("int8", "fp8"):
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
        return
    # Activations are rounded too: one that falls to the other side moves all that follows. In int8 the
    # library divides a token by its largest magnitude / 127.5, and we by / 127, as its users' engines do.
    assert difference(actual, expected) < (0.05 if name == "int8" else 0.02)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_zeros_in_compressed_tensors(group_size: int, tmp_path: Path) -> None:
    """By the library's own reading of a module; transformers cannot load zeros that are packed (5.24, with
    0.20).
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    small_model("qwen2", tmp_path / "plain", num_key_value_heads=1)
    folder = run(tmp_path / "plain", tmp_path / "made", method="rtn", symmetric=False, group_size=group_size)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.load_from_registry(config["format"])
    plain, tensors = load_file(tmp_path / "plain" / "model.safetensors"), tensors_of(folder)
    for name in ("self_attn.v_proj", "mlp.down_proj"):
        full = f"model.layers.1.{name}"
        own = {key.removeprefix(f"{full}."): tensor for key, tensor in tensors.items() if key.startswith(f"{full}.")}
        weight, expected = compressor.decompress(own, scheme)["weight"], plain[f"{full}.weight"]
        step = own["weight_scale"].repeat_interleave(expected.shape[1] // own["weight_scale"].shape[1], 1)
        assert bool(((weight - expected).abs() <= 0.51 * step).all())


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("llama-gqa-tied", {"method": "gptq", "format": "gptq", "group_size": 64}),
        ("qwen2", {"method": "gptq", "format": "gptq", "group_size": 32, "desc_act": True, "symmetric": False}),
        ("qwen3", {"method": "rtn", "format": "gptq", "bits": 8}),
        ("gemma3-published", {"method": "awq", "format": "awq", "group_size": 64}),
        ("llama-mha-untied", {"method": "rtn", "format": "awq"}),
    ],
    ids=["gptq", "gptq-act-order", "gptq-8", "awq", "rtn-as-awq"],
)
def test_files_mean_what_we_compute(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    """transformers' model with the weights that a reader of the tests' own finds in the files."""
    reference = small_model(case, tmp_path / "plain")
    plain = theirs(reference)
    folder = run(tmp_path / "plain", tmp_path / "made", **options)
    tensors, config = tensors_of(folder), json.loads((folder / "config.json").read_text())
    state = {name: tensor for name, tensor in tensors.items() if name in reference.state_dict()}
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert f"{name}.weight" not in tensors
            state[f"{name}.weight"] = meant(tensors, name, config["quantization_config"])
    reference.load_state_dict(state, strict=not reference.config.tie_word_embeddings)
    assert difference(theirs(reference), plain) < 0.7  # zeros that are one off would lose all
    torch.testing.assert_close(ours(folder), theirs(reference), atol=1e-3, rtol=1e-3)


FAMILIES = ["llama-gqa-tied", "llama-mqa-biases", "mistral-window", "qwen2", "qwen3", "gemma3-published"]


@pytest.mark.parametrize("case", FAMILIES)
def test_calibrated_methods_lose_less_than_the_nearest_numbers(case: str, tmp_path: Path) -> None:
    """A scale that is not taken back where it belongs would lose everything."""
    expected = theirs(small_model(case, tmp_path / "plain"), SEEN)
    lost = {
        method: difference(ours(run(tmp_path / "plain", tmp_path / method, method=method), SEEN), expected)
        for method in ("rtn", "gptq", "awq")
    }
    assert lost["gptq"] < 0.9 * lost["rtn"] and lost["awq"] < 0.9 * lost["rtn"], lost


@dataclasses.dataclass
class Exact:
    """A weight that is not rounded."""

    weight: torch.Tensor

    def rows(self, start: int, stop: int) -> Exact:
        return Exact(self.weight[start:stop])


@pytest.mark.parametrize("case", FAMILIES)
def test_awqs_scales_are_taken_back(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any scales, and nothing rounded: a layer computes what it did."""
    small_model(case, tmp_path / "plain")
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.setattr(methods, "awq", lambda weight, *args, **kwargs: Exact(weight.clone()))
    monkeypatch.setattr(methods, "find_scales", lambda weight, moments, magnitude, grid: 0.5 + magnitude * 999 % 2)
    made = Options(
        str(tmp_path / "plain"), "awq", tmp_path / "made", calibration=tmp_path / "text", device="cpu", **CALIBRATION
    )
    run_ = Quantisation(made)
    tensors = {name: run_.original.read(stored) for name, stored in run_.layers[0].items()}
    activations = run_._first_activations()
    result = run_._calibrated(0, tensors, activations)
    scaled = tensors | {f"{name}.weight": exact.weight for name, exact in result.rounded.items()} | result.plain
    assert not any(torch.equal(scaled[f"{name}.weight"], tensors[f"{name}.weight"]) for name in result.rounded)
    after = []
    for one in (tensors, scaled):
        activations = run_._first_activations()
        activations.advance(run_._layer(0, one))
        after.append(activations.hidden)
    torch.testing.assert_close(after[1], after[0], atol=1e-3, rtol=1e-3)


def test_what_is_no_matrix_of_a_layer_is_carried_along(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    small_model("llama-mha-untied", plain)
    (plain / "LICENSE").write_text("free")
    (plain / "additional_chat_templates").mkdir()
    (plain / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (plain / "chat_template.jinja").write_text("{{ messages }}")
    (plain / "pytorch_model.bin").write_text("weights of another kind")
    folder = run(plain, tmp_path / "made", method="rtn")
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (plain / name).read_bytes()
    assert (folder / "additional_chat_templates" / "tool_use.jinja").exists()
    assert not (folder / "pytorch_model.bin").exists()
    before, after = load_file(plain / "model.safetensors"), tensors_of(folder)
    kept = {name for name in before if not name.endswith("_proj.weight")}
    assert "lm_head.weight" in kept and "model.norm.weight" in kept
    for name in kept:
        assert torch.equal(before[name], after[name])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((plain / "config.json").read_text())


def test_names_and_the_part_that_sees_stay(tmp_path: Path) -> None:
    """Of a checkpoint with a vision part: its tensors, and the prefix of the text's."""
    from safetensors.torch import save_file

    plain = tmp_path / "plain"
    small_model("gemma3-published", plain)
    tensors = load_file(plain / "model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    renamed["vision_tower.encoder.layers.0.mlp.fc1.weight"] = torch.randn(8, 8)
    save_file(renamed, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config}
    (plain / "config.json").write_text(json.dumps({**outer, "tie_word_embeddings": True}))
    folder = run(plain, tmp_path / "made", method="awq", format="awq")
    after = tensors_of(folder)
    assert torch.equal(after["vision_tower.encoder.layers.0.mlp.fc1.weight"], renamed.popitem()[1])
    assert {name for name in after if name.startswith("language_model.model.layers.1.mlp.")} == {
        f"language_model.model.layers.1.mlp.{part}.{end}"
        for part in ("gate_proj", "up_proj", "down_proj")
        for end in ("qweight", "qzeros", "scales")
    }
    assert (
        "vision_tower"
        in json.loads((folder / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    )
    assert bool(ours(folder).isfinite().all())


@pytest.mark.parametrize("case", ["llama-gqa-tied", "qwen3", "gemma3-published"])
def test_a_gguf_file_is_expanded(case: str, tmp_path: Path) -> None:
    """transformers makes of it what it makes of the folder that the file came from."""
    (tmp_path / "gguf").mkdir()
    shape = SHAPE | {"num_hidden_layers": 2}
    if case.startswith("gemma3"):
        shape |= {"layer_types": None, "sliding_window": 8}
    _, path = write(case, tmp_path / "gguf", **shape)
    folder = run(path, tmp_path / "made", method="rtn", group_size=32)
    expected = run(tmp_path / "gguf", tmp_path / "of-folder", method="rtn", group_size=32)  # of the same model
    before, after = tensors_of(expected), tensors_of(folder)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6 if "norm" in name else 0)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32) for place in (folder, expected)
    ]
    torch.testing.assert_close(*(theirs(model) for model in models), atol=1e-4, rtol=1e-4)


TEXTS = [
    "Hello wörld, 42 times!\n\n  if (x == 3.14):\treturn 'a'",
    "<|im_start|>user\nHi<|im_end|>",
    "你好 🦜 e\u0301",
    "",
]


def test_a_gguf_vocabulary_as_a_tokenizer_file(smollm2_path: Path, tmp_path: Path) -> None:
    from octavo import _core
    from octavo.weights.text import open_gguf, read_text

    write_gguf_text(smollm2_path, tmp_path)
    before, after = read_text(smollm2_path, None, None), read_text(tmp_path, None, None)
    assert after.tokenizer is not None and before.tokenizer is not None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = before.tokenizer.encode_text(text).token_ids
        assert after.tokenizer.encode_text(text).token_ids == ids == theirs(text)["input_ids"]
    assert after.tokenizer.named_tokens == before.tokenizer.named_tokens
    chat = [{"role": "user", "content": "Hi"}]
    assert after.chat_template is not None
    prompt = after.tokenizer.encode_chat(after.chat_template, json.dumps(chat)).token_ids
    assert prompt == theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert isinstance(_core.Tokenizer.from_gguf(open_gguf(smollm2_path)).to_json(), str)


def test_what_a_vocabulary_puts_around_a_text_is_kept(tmp_path: Path) -> None:
    """BOS in front, as Llama's files ask for."""
    from octavo.weights.text import read_text

    said = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 5}
    _, path = write("llama-gqa-tied", tmp_path, lambda fields: fields.update(said))
    (tmp_path / "text").mkdir()
    write_gguf_text(path, tmp_path / "text")
    tokenizers = [read_text(place, None, None).tokenizer for place in (path, tmp_path / "text")]
    assert all(tokenizer is not None and tokenizer.encode_text("ab").token_ids == [5, 2] for tokenizer in tokenizers)


def test_every_format_has_a_test() -> None:
    tested = {(options["method"], "compressed-tensors") for _, options in COMPRESSED.values()}
    tested |= {("gptq", "gptq"), ("rtn", "gptq"), ("awq", "awq"), ("rtn", "awq")}
    assert tested == {(method, form) for method, formats in METHODS.items() for form in formats}
