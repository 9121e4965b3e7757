"""Every quantised format, written by the tests' own writers, against transformers' model of the
family with the weights that the files mean, in float32; what the errors say of damaged files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo import cli
from octavo.config import EngineConfig
from octavo.layers.schemes.choice import QuantisedSchemes
from octavo.layers.schemes.formats.gptq import GptqFormat
from octavo.layers.schemes.formats.online import OnlineFormat, round_to_int4
from octavo.layers.schemes.scheme import Matrix
from octavo.model_config import ModelError
from octavo.models.llama import LlamaForCausalLM
from octavo.models.registry import Model, config_from_folder
from octavo.weights.load import load_model
from octavo.weights.quantization.config import pick_recipe, read_recipe
from octavo.weights.safetensors import SafetensorsSource
from octavo.weights.source import fill_model
from tests.models.harness import Runner, Sequence
from tests.models.quantised_files import (
    Case,
    awq_case,
    byte_args,
    byte_case,
    compressed,
    eight_bits,
    gptq,
    gptq_case,
    packed,
    packed_args,
    packed_case,
    quantise,
)
from tests.models.test_architectures import PROMPT, assert_close, make

INT8, FP8 = torch.int8, torch.float8_e4m3fn
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
"""128 divides all inputs; k and v have 64 outputs."""

MIXED = compressed(
    ({"weights": packed_args(4, 64, sym=True)}, "pack-quantized", [r"re:.*self_attn\.[qk]_proj$", "re:.*down_proj"]),
    (byte_args(INT8, per_row=True, inputs=None), "int-quantized", ["Linear"]),
    (byte_args(FP8, per_row=True, inputs="dynamic"), "float-quantized", ["model.layers.1.mlp.up_proj"]),
    ignore=("lm_head", "re:.*layers\\.0\\.self_attn\\.v_proj"),
)


def mixed(name: str) -> Any:
    if name == "model.layers.0.self_attn.v_proj":
        return None
    if name.endswith(("q_proj", "k_proj", "down_proj")):
        return packed(4, 64, sym=True)
    if name == "model.layers.1.mlp.up_proj":
        return eight_bits(FP8, per_row=True, inputs="dynamic")
    return eight_bits(INT8, per_row=True, inputs=None)


def uneven_gptq(name: str) -> Any:
    """GPTQModel's `dynamic`; and a layer that the config does not mention, but the file has plain."""
    if "layers.1.mlp" in name or name.endswith("o_proj"):
        return None
    return gptq(8, 32, sym=False) if name.endswith("down_proj") else gptq(4, 64, sym=True)


def hugging_face_fp8(static: bool, names: tuple[str, str]) -> Case:
    config = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic", "weight_block_size": None}
    inputs = "static" if static else "dynamic"
    return Case(config, lambda name: eight_bits(FP8, per_row=False, inputs=inputs, names=names))


CASES: dict[str, Callable[[], Case]] = {
    "gptq-4-128": lambda: gptq_case(4, 128, sym=True),
    "gptq-4-64-asymmetric": lambda: gptq_case(4, 64, sym=False),
    "gptq-4-32-act-order-v2": lambda: gptq_case(4, 32, sym=False, act_order=True, version="gptq_v2"),
    "gptq-4-rows": lambda: gptq_case(4, -1, sym=False),
    "gptq-8-128": lambda: gptq_case(8, 128, sym=True),
    "gptq-8-rows-v2": lambda: gptq_case(8, -1, sym=True, version="gptq_v2"),
    "gptq-8-64-act-order": lambda: gptq_case(8, 64, sym=False, act_order=True),
    "gptq-dynamic": lambda: Case(
        {"bits": 4, "group_size": 64, "sym": True, "desc_act": False}
        | {"dynamic": {r"+:.*\.down_proj": {"bits": 8, "group_size": 32, "sym": False}, r"-:.*layers\.1\.mlp": {}}},
        uneven_gptq,
        own_file="quantize_config.json",
    ),
    "awq-128": lambda: awq_case(128),
    "awq-64": lambda: awq_case(64),
    "packed-4-128": lambda: packed_case(4, 128, sym=True),
    "packed-4-32-asymmetric": lambda: packed_case(4, 32, sym=False),
    "packed-4-64-act-order": lambda: packed_case(4, 64, sym=True, act_order=True),
    "packed-8-rows": lambda: packed_case(8, -1, sym=True),
    "packed-8-64-asymmetric": lambda: packed_case(8, 64, sym=False),
    "int8-dynamic": lambda: byte_case(INT8, per_row=True, inputs="dynamic"),
    "int8-static": lambda: byte_case(INT8, per_row=False, inputs="static"),
    "int8-weights": lambda: byte_case(INT8, per_row=True, inputs=None),
    "fp8-dynamic": lambda: byte_case(FP8, per_row=True, inputs="dynamic"),
    "fp8-static": lambda: byte_case(FP8, per_row=False, inputs="static"),
    "fp8-weights": lambda: byte_case(FP8, per_row=False, inputs=None),
    "fp8-hugging-face": lambda: hugging_face_fp8(False, ("weight_scale_inv", "activation_scale")),
    "fp8-hugging-face-static": lambda: hugging_face_fp8(True, ("weight_scale_inv", "activation_scale")),
    "fp8-auto": lambda: hugging_face_fp8(True, ("weight_scale", "input_scale")),
    "several-groups": lambda: Case(MIXED, mixed),
}


def load(folder: Path, **options: Any) -> Runner:
    loaded = load_model(EngineConfig(model=str(folder), **options), device=torch.device("cpu"))
    return Runner(loaded.model, loaded.dtype)


def logits(folder: Path, **options: Any) -> torch.Tensor:
    return load(folder, **options).step([], [(Sequence(0), PROMPT)])[0]


def expect(reference: torch.nn.Module, prompt: list[int] = PROMPT) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = reference(torch.tensor([prompt])).logits[0]
    return result


def check(folder: Path, reference: torch.nn.Module, **options: Any) -> None:
    runner = load(folder, dtype="float32", **options)
    if not any(module._forward_pre_hooks for module in reference.modules()):
        assert_close(runner.step([], [(Sequence(0), PROMPT)])[0], expect(reference))
        return

    # A sum in another order may move an activation to the next number, up to 12 % of it in fp8: rare, but
    # all later tokens see it. So of ten short prompts one may differ by it, and all others agree as sums do.
    def difference(prompt: list[int]) -> float:
        (actual,), expected = runner.step([], [(Sequence(0), prompt)]), expect(reference, prompt)
        return float(((actual - expected).abs() / expected.std()).mean(-1).max())  # of the token that differs most

    short = sorted(difference(PROMPT[start : start + 4]) for start in range(0, 40, 4))
    assert short[-2] < 1e-4 and short[-1] < 0.2 and difference(PROMPT) < 0.2


@pytest.mark.parametrize("name", CASES)
def test_every_format_computes_with_the_weights_it_means(name: str, tmp_path: Path) -> None:
    reference = make("llama-gqa-tied", tmp_path, **WIDE)
    quantise(tmp_path, reference, CASES[name]())
    check(tmp_path, reference)


@pytest.mark.parametrize(("family", "name"), [("qwen2", "gptq-4-32-act-order-v2"), ("gemma3", "fp8-dynamic")])
def test_families_with_biases_and_other_norms(family: str, name: str, tmp_path: Path) -> None:
    layers = {"num_hidden_layers": 2} | (
        {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}
    )
    reference = make(family, tmp_path, **WIDE | layers)
    quantise(tmp_path, reference, CASES[name]())
    check(tmp_path, reference)


@pytest.mark.parametrize("static", [False, True])
def test_projections_with_orders_and_scales_of_their_own(static: bool, tmp_path: Path) -> None:
    """q, k and v are one matrix, but each may permute or scale their common input in its way."""
    case = CASES["fp8-auto" if static else "gptq-4-32-act-order-v2"]()
    seeds: dict[str, int] = {}

    def own(name: str) -> Any:
        seed = seeds.setdefault(name, len(seeds) // 2)  # q and k agree, v does not
        if static:
            return eight_bits(FP8, per_row=False, inputs="static", static=2.5 + seed)
        return gptq(4, 32, sym=True, act_order=True, version="gptq_v2", seed=seed)

    reference = make("llama-gqa-tied", tmp_path, **WIDE)
    if static:
        quantise(tmp_path, reference, Case(case.config, own))
        check(tmp_path, reference)
        return
    quantise(tmp_path, reference.half().float(), Case(case.config, own))
    check_like_gpu(tmp_path, reference)  # a CPU unpacks each projection by itself


def test_a_quantised_head(tmp_path: Path) -> None:
    reference = make("llama-mha-untied", tmp_path, **WIDE, vocab_size=208)
    case = gptq_case(4, 64, sym=False)
    case.config["lm_head"] = case.head = True
    quantise(tmp_path, reference, case)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    check(tmp_path, reference)


def test_scales_and_zeros_of_other_uses_are_left_out(tmp_path: Path) -> None:
    reference = make("llama-gqa-tied", tmp_path, **WIDE)
    case = byte_case(INT8, per_row=True, inputs=None)
    case.extra = {
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.0.self_attn.q_proj.weight_zero_point": torch.zeros(128, 1, dtype=torch.int8),
        "model.layers.0.mlp.up_proj.bias": torch.zeros(256),
    }
    quantise(tmp_path, reference, case)
    check(tmp_path, reference)


@pytest.mark.parametrize("name", ["w4a16", "w8a16", "w8a8", "fp8"])
def test_files_that_compressed_tensors_wrote(name: str) -> None:
    """`compressed/make.py` says how; the logits are those of the library's fake quantisation."""
    folder = Path(__file__).parent / "compressed" / name
    expected = load_file(folder / "expected.safetensors")["logits"]
    actual = logits(folder, dtype="float32")
    if name.endswith("a16"):
        assert_close(actual, expected)
        return
    # Its scale of a token in int8 is the largest magnitude / 127.5, and beyond 127 it cuts; ours, as
    # its users' engines do, divides by 127.
    difference = ((actual - expected).abs() / expected.std()).mean(-1)
    assert difference.median() < (0.05 if name == "w8a8" else 1e-3) and difference.max() < 0.2


@pytest.mark.parametrize("name", ["gptq", "gptq-act-order", "awq"])
def test_files_that_gptqmodel_wrote(name: str) -> None:
    """`gptqmodel/make.py` says how; the logits are those of the weights that the library reads."""
    folder = Path(__file__).parent / "gptqmodel" / name
    expected = load_file(folder / "expected.safetensors")["logits"]
    # Those of AWQ it has rounded to float16.
    tolerance = 2e-3 if name == "awq" else 1e-4
    torch.testing.assert_close(logits(folder, dtype="float32"), expected, atol=tolerance, rtol=tolerance)


class LikeGpu(QuantisedSchemes):
    """A GPU's products on a CPU, where their ops are the twins."""

    on_gpu = True


@pytest.mark.parametrize(
    "name",
    [
        "gptq-4-32-act-order-v2",
        "gptq-8-rows-v2",
        "gptq-8-64-act-order",
        "awq-128",
        "packed-8-64-asymmetric",
        "int8-static",
        "int8-dynamic",
        "fp8-hugging-face",
        "several-groups",
    ],
)
def test_products_of_a_gpu(name: str, tmp_path: Path) -> None:
    reference = make("llama-gqa-tied", tmp_path, **WIDE).half().float()
    quantise(tmp_path, reference, CASES[name]())
    model = check_like_gpu(tmp_path, reference)
    packed = model.weight_bytes() - model.embedding.weight.nbytes
    plain = 2 * sum(parameter.numel() for name, parameter in reference.named_parameters() if ".layers." in name)
    assert packed < (0.45 if "-4-" in name or "awq" in name else 0.75) * plain


def check_like_gpu(folder: Path, reference: torch.nn.Module) -> Model:
    """In float16, of which all plain weights must be."""
    recipe, source = pick_recipe(folder, None), SafetensorsSource(folder)
    assert recipe is not None
    schemes = LikeGpu(torch.float16, torch.device("cpu"), recipe.format_of, source.shapes().get)
    model = LlamaForCausalLM(config_from_folder(folder), schemes)
    for layer in model.decoder_layers:
        layer.attention.on_cpu = False  # these products put out float16, which a CPU's attention never sees
    fill_model(model, source, torch.device("cpu"))
    (actual,) = Runner(model, torch.float32).step([], [(Sequence(0), PROMPT)])
    expected = expect(reference)
    rounds_input = any(module._forward_pre_hooks for module in reference.modules())
    difference = ((actual - expected).abs() / expected.std()).mean(-1)
    # Outputs rounded to float16 move activations to their next numbers, here of every token.
    assert difference.median() < (0.1 if rounds_input else 2e-3) and difference.max() < 0.4
    return model


# ---- while loading -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_weights_are_quantised_while_loading(kind: str, tmp_path: Path) -> None:
    """int4 is held against its own definition, below."""
    reference = make("llama-gqa-tied", tmp_path, **WIDE)
    plain = expect(reference)
    for name, module in reference.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        if kind == "int4":
            module.weight.data = nearest_of_sixteen(module.weight.data, 128)
            continue
        written = eight_bits(FP8 if kind == "fp8" else INT8, per_row=True, inputs="dynamic")(module.weight.data)
        module.weight.data = written.weight
        if kind == "fp8":
            module.register_forward_pre_hook(lambda _, args, round_=written.round_input: (round_(args[0]),))
    check(tmp_path, reference, quantization=kind)
    assert (expect(reference) - plain).abs().mean() > 0.005 * plain.std()  # there was something to round


def nearest_of_sixteen(weight: torch.Tensor, group: int) -> torch.Tensor:
    """The nearest of -8 to 7 steps, of which the largest magnitude of its group is -8."""
    groups = weight.view(len(weight), -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    steps = torch.where(high > -low, high, low) / -8
    grid = torch.arange(-8, 8) * steps.unsqueeze(-1)  # [N, G, 16]
    nearest = (groups.unsqueeze(-1) - grid.unsqueeze(-2)).abs().argmin(-1)
    return grid.gather(-1, nearest).view_as(weight)


def test_groups_are_the_largest_that_divide() -> None:
    for inputs, group in ((384, 128), (576, 64), (96, 32)):
        weight = torch.randn(16, inputs, generator=torch.Generator().manual_seed(inputs))
        weight[3, :32] = 0
        form = OnlineFormat("int4")
        assert form.group_of(inputs) == group
        numbers = round_to_int4(weight, group)
        torch.testing.assert_close(numbers.dequantise(), nearest_of_sixteen(weight, group))
        assert not numbers.dequantise()[3, :32].any()


# ---- what is refused -----------------------------------------------------------------------------


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(EngineConfig(model=str(folder), **options), device=torch.device("cpu"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_problem_of_a_damaged_file_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantise(tmp_path, make("llama-gqa-tied", tmp_path, **WIDE), gptq_case(4, 64, sym=False, act_order=True))
    tensors = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.0."
    del tensors[f"{layer}self_attn.q_proj.scales"]
    tensors[f"{layer}self_attn.k_proj.g_idx"][5] = 2
    tensors[f"{layer}self_attn.v_proj.g_idx"][:] = 0
    tensors[f"{layer}mlp.gate_proj.qzeros"] = torch.zeros(2, 64, dtype=torch.int32)  # of 8 bits
    tensors[f"{layer}mlp.up_proj.qweight"] = torch.zeros(16, 128, dtype=torch.int32)
    tensors[f"{layer}mlp.down_proj.qweight"] = tensors[f"{layer}mlp.down_proj.qweight"].float()
    tensors[f"{layer}mlp.down_proj.bias"] = torch.ones(128)
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr("octavo.weights.source.allocate", lambda *_: pytest.fail("memory was taken"))
    message = refused(tmp_path)
    assert ": 7 tensors do not fit" in message
    for problem in (
        "self_attn.q_proj.scales: missing",
        "self_attn.k_proj.g_idx: names groups 0 to 2, but there are 2",
        "self_attn.v_proj.g_idx: cuts 128 inputs into groups of 0 to 128",
        "mlp.gate_proj.qzeros: shape [2, 64], but the config says [2, 32]",
        "mlp.up_proj.qweight: shape [16, 128], but the config says [16, 256]",
        "mlp.down_proj.qweight: holds float32 numbers, but the config says int32",
        "mlp.down_proj.bias: not part of the model",
    ):
        assert layer + problem in message
    monkeypatch.setattr("octavo.commands._log_to_stderr", lambda level: None)  # which later tests would see
    assert cli.main(["generate", "x", "--model", str(tmp_path), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "q_proj.scales: missing" in error


def test_groups_that_do_not_divide_are_listed(tmp_path: Path) -> None:
    make("llama-gqa-tied", tmp_path, **WIDE)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused(tmp_path, load_format="dummy")
    assert "model.layers.1.mlp.down_proj.qweight: 256 inputs are not a multiple of the group size 96" in message


def test_scales_that_are_not_numbers(tmp_path: Path) -> None:
    quantise(tmp_path, make("llama-gqa-tied", tmp_path, **WIDE), byte_case(FP8, per_row=True, inputs="static"))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"][7] = float("nan")
    tensors["model.layers.1.mlp.up_proj.input_scale"][0] = 0
    tensors["model.layers.1.mlp.down_proj.weight_scale"] = torch.ones(128, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    message = refused(tmp_path)
    assert "layers.0.mlp.up_proj.weight_scale: holds a scale that is negative or not finite" in message
    assert "layers.1.mlp.up_proj.input_scale: holds a scale that is not a number above 0" in message
    assert "layers.1.mlp.down_proj.weight_scale: shape [128, 2], but the config says [128, 1]" in message


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64}
W4A16 = {"weights": packed_args(4, 64, sym=True), "input_activations": None}
W8A8 = byte_args(INT8, per_row=True, inputs="dynamic")


def group(args: dict[str, Any], form: str = "pack-quantized") -> dict[str, Any]:
    return compressed((args, form, ["Linear"]))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method: 'bitsandbytes' is not supported"),
        ({}, "quant_method: '' is not supported"),
        ("gptq", "quantization_config: 'gptq' is not an object"),
        (GPTQ | {"bits": 3}, "quantization_config.bits: 3 is not supported; supported: 4, 8"),
        (GPTQ | {"bits": True}, "quantization_config.bits: True is not supported"),
        (GPTQ | {"bits": None}, "quantization_config.bits: None is not supported"),
        (GPTQ | {"group_size": 0}, "quantization_config.group_size: 0 is neither -1 nor"),
        (GPTQ | {"group_size": "64"}, "quantization_config.group_size: '64' is not an integer"),
        (GPTQ | {"desc_act": 1}, "quantization_config.desc_act: 1 is not true or false"),
        (GPTQ | {"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format: 'marlin' is not supported"),
        (GPTQ | {"dynamic": {"+:(": {"bits": 8}}}, "is not a regular expression"),
        (GPTQ | {"dynamic": {"+:a": {"bits": 5}}}, "quantization_config.dynamic.+:a.bits: 5 is not supported"),
        (AWQ | {"version": "gemv"}, "quantization_config.version: 'gemv' is not supported; supported: gemm"),
        (AWQ | {"bits": 8}, "quantization_config.bits: 8 is not supported"),
        (AWQ | {"zero_point": 0}, "quantization_config.zero_point: 0 is not supported"),
        (AWQ | {"modules_to_not_convert": "x"}, "modules_to_not_convert: 'x' is not a list"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_block_size: [128, 128]: block-wise"),
        ({"quant_method": "fp8", "activation_scheme": "none"}, "activation_scheme: 'none' is not supported"),
        (group(W4A16) | {"format": "marlin-24"}, "quantization_config.format: 'marlin-24' is not supported"),
        (
            group(W4A16, "nvfp4-pack-quantized") | {"format": "mixed-precision"},
            "group_0.format: 'nvfp4-pack-quantized'",
        ),
        (group(W4A16) | {"config_groups": {}}, "config_groups: missing or empty"),
        (group(W4A16) | {"ignore": ["re:["]}, "ignore: '[' is not a regular expression"),
        (group(W4A16) | {"ignore": ["re:" + "a" * 600]}, "ignore: a pattern of 600 characters: at most 512"),
        (group(W4A16) | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config.format: 'sparse-24'"),
        (group(W4A16 | {"input_activations": {"num_bits": 8}}), "input_activations: are not supported with"),
        (group({"weights": packed_args(2, 64, sym=True)}), "weights.num_bits: 2 is not supported; supported: 4, 8"),
        (
            group({"weights": {"strategy": "block", "type": "float", "num_bits": 8}}, "float-quantized"),
            "weights.strategy: 'block'",
        ),
        (
            group(W8A8 | {"input_activations": {"num_bits": 8, "symmetric": False}}, "int-quantized"),
            "group_0.input_activations.symmetric: False is not supported",
        ),
    ],
)
def test_configs_that_say_what_is_not_supported(config: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(ModelError) as caught:
        read_recipe(tmp_path)
    assert said in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (r"model\.layers\.(0|1)\.", True),
        (r"layers\.0", False),
        (r"(?!.*k_proj).*_proj", True),
        (r"(?P<x>.)odel\.(?:lay|z)ers", True),
        # Python's own engine takes ages for these.
        (r"(.+)+!", False),
        (r"(?=m)(.*)*!", None),
        (r"(.+)+\1!", None),
    ],
)
def test_patterns_are_those_of_python_in_bounded_time(pattern: str, matches: bool | None, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    if not pattern.endswith("!"):
        assert bool(re.match(pattern, name)) == matches
    configs: list[dict[str, Any]] = [
        group(W4A16) | {"ignore": [f"re:{pattern}"]},
        GPTQ | {"dynamic": {f"-:{pattern}": {}}},
    ]
    for config in configs:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        recipe = read_recipe(tmp_path)
        assert recipe is not None
        if matches is None:
            with pytest.raises(ModelError, match=r"quantization_config\..*takes too much work"):
                recipe.format_of(name)
        else:
            assert (recipe.format_of(name) is None) == matches


PUBLISHED: list[dict[str, Any]] = [
    GPTQ
    | {"desc_act": False, "sym": True, "damp_percent": 0.01, "true_sequential": True, "static_groups": False}
    | {"exllama_config": {"version": 1}, "use_exllama": True, "dataset": None, "batch_size": 1, "tokenizer": None}
    | {"pad_token_id": None, "model_seqlen": None, "meta": {"quantizer": ["gptqmodel:1.0"]}, "lm_head": False},
    AWQ | {"zero_point": True, "version": "gemm", "modules_to_not_convert": None, "backend": "autoawq"},
    {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"], "fmt": "e4m3"},
    group(W4A16) | {"version": "0.9", "global_compression_ratio": 1.8, "sparsity_config": {}, "transform_config": {}},
]


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config["quant_method"])
def test_keys_nobody_knows_are_named(config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    read_recipe(tmp_path)
    assert caplog.text == ""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config | {"twist": 3}}))
    read_recipe(tmp_path)
    assert "unknown keys, which have no effect: quantization_config.twist" in caplog.text


@pytest.mark.parametrize(
    ("config", "plain", "other"),
    [
        (GPTQ | {"dynamic": {r"-:.*\.up_proj": {}, r"+:.*\.q_proj": {"bits": 8}}}, "up_proj", "q_proj"),
        (GPTQ | {"lm_head": True, "dynamic": {r"-:model\.layers\.1\.": {}}}, "model.layers.1.x", "lm_head"),
        (AWQ | {"modules_to_not_convert": ["self_attn"]}, "self_attn.q_proj", "mlp.up_proj"),
        (AWQ | {"modules_to_not_convert": ["layers.1"]}, "model.layers.1.x", "model.layers.10.x"),
        ({"quant_method": "fp8", "ignored_layers": ["re:.*v_proj"]}, "self_attn.v_proj", "self_attn.k_proj"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "o_proj"]}, "o_proj", "k_proj"),
        (group(W4A16) | {"ignore": ["language_model.model.layers.1.x"]}, "model.layers.1.x", "model.layers.2.x"),
    ],
)
def test_what_a_config_leaves_plain(config: dict[str, Any], plain: str, other: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": config}}))
    recipe = read_recipe(tmp_path)
    assert recipe is not None
    names = [name if name.startswith(("model.", "lm_head")) else f"model.layers.3.{name}" for name in (plain, other)]
    assert recipe.format_of(names[0]) is None
    form = recipe.format_of(names[1])
    assert form is not None and form in recipe.formats
    assert recipe.format_of("model.layers.7.mlp.down_proj") is not None


@pytest.mark.parametrize(
    ("config", "wanted", "said"),
    [
        (GPTQ, "gptq", None),
        (GPTQ, "gptq_marlin", None),
        (AWQ, "awq", None),
        (group(W4A16), "compressed-tensors", None),
        ({"quant_method": "fp8"}, "fp8", None),
        (GPTQ, "awq", "quantization = 'awq': the weights of"),
        (AWQ, "int4", "are quantised already, by awq; leave --quantization out"),
        (None, "gptq", "quantization = 'gptq': the model does not say that its weights are quantised"),
        (None, "gguf", "quantization = 'gguf'"),
    ],
)
def test_the_flag_confirms_or_is_refused(config: Any, wanted: str, said: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    if said is None:
        assert str(pick_recipe(tmp_path, wanted)) == str(read_recipe(tmp_path))
        return
    with pytest.raises(ModelError, match=re.escape(said)):
        pick_recipe(tmp_path, wanted)


def test_a_gpu_says_at_start_what_its_kernels_cannot_multiply_by() -> None:
    """No kernel runs: schemes only say what they would need."""
    gpu = torch.device("cuda")
    with pytest.raises(ModelError, match="dtype = float32: quantised weights run in float16 or bfloat16 on a GPU"):
        QuantisedSchemes(torch.float32, gpu, lambda name: GptqFormat(4, 64))
    for matrix, form, said in (
        (
            Matrix({"a": 24}, 128),
            GptqFormat(4, 64),
            "a.qweight: 24 outputs: 4-bit weights on a GPU need a multiple of 16",
        ),
        (
            Matrix({"a": 32}, 96),
            GptqFormat(4, 32),
            "a.qweight: 96 inputs: 4-bit weights on a GPU need a multiple of 64",
        ),
        (Matrix({"a": 32}, 192), GptqFormat(4, 48), "a.qweight: groups of 48"),
        (
            Matrix({"a": 32}, 192),
            GptqFormat(8, 48),
            "a.qweight: groups of 48: 8-bit weights on a GPU need a multiple of 32",
        ),
    ):
        scheme = QuantisedSchemes(torch.float16, gpu, lambda name, form=form: form).linear(matrix)
        assert [problem[: len(said)] for problem in scheme.problems()] == [said]
