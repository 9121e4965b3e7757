"""Start-up's look at what fewer bits cost: which layers stay in 16 bits, what the figures are, and what
is refused.

The oracle is transformers, with weights put on the grid of few bits here and a cache that rounds in one
layer. Outliers are such that they leave the model's function as it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.cli import main
from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.gate import LIMITS, Gate, Verdict, text_ids
from octavo.engine.kv_layout import KvLayout
from octavo.layers.schemes.online import OnlineScheme
from octavo.weights.load import load_model
from tests.models.harness import Runner, Sequence
from tests.models.rounding_cache import RoundingCache, as_argument
from tests.models.test_architectures import make
from tests.models.test_quantised import nearest_of_sixteen

CPU = torch.device("cpu")
LAYERS = 4
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "initializer_range": 0.06,
}
BAD = 2  # the layer with outliers
IDS = text_ids(None, 199, 128)


def config(folder: Path, **options: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), dtype="float32", device="cpu", kv_cache_memory=1 << 22, **options)


@pytest.fixture(scope="module")
def outliers_in_weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """One layer whose norms make some inputs tiny, and whose matrices make up for that."""
    folder = tmp_path_factory.mktemp("weights")
    model = make("llama-gqa-tied", folder, **SHAPE)
    layer = model.model.layers[BAD]
    attention, mlp = layer.self_attn, layer.mlp
    with torch.no_grad():
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[5] /= 300
            for matrix in readers:
                matrix.weight[:, 5] *= 300
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def outliers_in_values(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """One layer whose values have a large channel in each head, which its output matrix makes small."""
    folder = tmp_path_factory.mktemp("values")
    model = make("llama-gqa-tied", folder, **SHAPE)
    attention = model.model.layers[BAD].self_attn
    with torch.no_grad():
        for head in range(2):
            attention.v_proj.weight[head * 32 + 3] *= 100
        for head in range(4):
            attention.o_proj.weight[:, head * 32 + 3] /= 100
    model.save_pretrained(folder)
    return folder, model


def rounded(weight: torch.Tensor, form: str) -> torch.Tensor:
    if form == "int4":
        return nearest_of_sixteen(weight, 128)
    step = weight.abs().amax(1, keepdim=True) / 127
    return torch.round(weight / step) * step


class RoundingIn(RoundingCache):
    """Rounds in some layers alone."""

    def __init__(self, kv_dtype: str, layers: Collection[int]) -> None:
        super().__init__(kv_dtype)
        self.form, self.rounding = kv_dtype, layers

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.kv_dtype = self.form if layer_idx in self.rounding else "float32"
        return super().update(keys, values, layer_idx, *args, **kwargs)


@torch.inference_mode()
def oracle(model: torch.nn.Module, form: str, layers: Collection[int], kv: str = "int8", kv_layers: Any = ()) -> Any:
    """Streams behind the embedding and each layer, and logits, with some layers in few bits."""
    kept, streams = {}, []
    for number in layers:
        for name, module in model.model.layers[number].named_modules():
            if isinstance(module, torch.nn.Linear):
                kept[number, name] = (module, module.weight.data)
                module.weight.data = rounded(module.weight.data, form)
    hooks = [
        one.register_forward_hook(lambda module, inputs, out: streams.append(out[0] if isinstance(out, tuple) else out))
        for one in (model.model.embed_tokens, *model.model.layers)
    ]
    logits = model(torch.tensor([IDS]), **as_argument(model, RoundingIn(kv, kv_layers))).logits[0]
    for hook in hooks:
        hook.remove()
    for module, weight in kept.values():
        module.weight.data = weight
    return [stream.view(len(IDS), -1) for stream in streams], logits


def expected_loss(model: torch.nn.Module, number: int, **how: Any) -> float:
    """Of a layer that is fed what the plain model feeds it."""
    plain, _ = oracle(model, "int8", ())
    found, _ = oracle(
        model, how.get("form", "int8"), how.get("layers", ()), how.get("kv", "int8"), how.get("kv_layers", ())
    )
    added = plain[number + 1] - plain[number]
    return float(((found[number + 1] - plain[number + 1]).norm(dim=-1) / added.norm(dim=-1)).mean())


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    expected, found = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def verdict_of(folder: Path, **options: Any) -> tuple[Verdict, Any, Gate]:
    wanted = config(folder, **options)
    gate = Gate(wanted, CPU)
    model = load_model(wanted, device=CPU, judge=gate).model
    verdict = gate.conclude(model)
    assert verdict is not None
    return verdict, model, gate


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_layer_whose_weights_have_outliers_stays_alone(
    form: str, outliers_in_weights: tuple[Path, torch.nn.Module]
) -> None:
    folder, reference = outliers_in_weights
    verdict, model, _ = verdict_of(folder, quantization=form)
    (part,) = verdict.parts
    assert (part.key, part.name, list(part.kept)) == ("weights", f"{form} weights", [BAD])
    assert part.kept[BAD] == pytest.approx(expected_loss(reference, BAD, form=form, layers=[BAD]), rel=1e-3)
    assert part.kept[BAD] > 2 * LIMITS[form]
    for number, layer in enumerate(model.decoder_layers):
        for matrix in (part for part in layer.layers() if isinstance(part, OnlineScheme)):
            assert (matrix.plain is not None) == (number == BAD) == (matrix.product is None)
    others = [number for number in range(LAYERS) if number != BAD]
    (_, plain), (_, served) = oracle(reference, form, ()), oracle(reference, form, others)
    assert verdict.num_tokens == len(IDS) and verdict.divergence == pytest.approx(divergence(plain, served), rel=0.01)
    (logits,) = Runner(model, torch.float32, max_len=len(IDS)).step([], [(Sequence(0), IDS)])
    torch.testing.assert_close(logits, served, atol=1e-3, rtol=1e-3)


def test_the_layer_whose_values_have_an_outlier_keeps_plain_pages(
    outliers_in_values: tuple[Path, torch.nn.Module],
) -> None:
    folder, reference = outliers_in_values
    engine = Engine.from_config(config(folder, kv_cache_dtype="int4", max_quality_loss=5.0))
    report, layout = engine.parts.report, engine.runner.kv_layout
    assert report.verdict is not None
    (part,) = report.verdict.parts
    assert (part.key, part.name, list(part.kept)) == ("kv_cache", "int4 keys and values", [BAD])
    assert part.kept[BAD] == pytest.approx(expected_loss(reference, BAD, kv="int4", kv_layers=[BAD]), rel=0.05)
    int4, plain = 2 * 2 * 16 * (32 // 2 + 4), 2 * 2 * 16 * 32 * 4
    assert layout.layer_bytes == [plain if number == BAD else int4 for number in range(LAYERS)]
    assert report.kv_dtype == "int4 and float32" and report.kv_bytes == report.num_blocks * (plain + 3 * int4)
    others = [number for number in range(LAYERS) if number != BAD]
    (_, expected), (_, served) = oracle(reference, "int8", ()), oracle(reference, "int8", (), "int4", others)
    assert report.verdict.divergence == pytest.approx(divergence(expected, served), rel=0.05)
    engine.close()


def test_layers_that_share_a_place_of_the_pool_share_its_pages(tmp_path: Path) -> None:
    make("gemma3", tmp_path)
    model = load_model(config(tmp_path), device=CPU).model
    groups = [group.layers for group in model.kv_groups]
    assert len(groups) > 1
    layer = groups[1][1]
    layout = KvLayout.of(
        model, block_size=16, dtype=torch.int8, plain_dtype=torch.float32, plain_layers=frozenset([layer])
    )
    places = range(max(map(len, groups)))
    assert layout.dtypes == tuple(torch.float32 if place == 1 else torch.int8 for place in places)


def test_what_costs_too_much_is_refused(
    outliers_in_weights: tuple[Path, torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = outliers_in_weights
    words = ["--model", str(folder), "--device", "cpu", "--dtype", "float32", "--kv-cache-memory", "4MiB"]
    few = ["--quantization", "int4", "--kv-cache-dtype", "int8", "--max-quality-loss", "0.0001"]
    assert main(["generate", "x", *words, *few]) == 2
    said = capsys.readouterr().err
    assert "max_quality_loss = 0.0001: int4 weights and int8 keys and values cost 0." in said
    assert "(KL divergence, 128 tokens); not int4 weights but 16 bits in 1 of 4 layers: 2 (would lose " in said
    assert "raise --max-quality-loss" in said and said.count("\n") == 1


@pytest.mark.parametrize("value", ["nan", "-1", "x"])
def test_a_limit_that_is_none_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) if value == "x" else nullcontext():
        assert main(["generate", "x", "--max-quality-loss", value]) == 2
    assert "max" in capsys.readouterr().err


def test_the_report_says_what_was_found(
    outliers_in_weights: tuple[Path, torch.nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = outliers_in_weights
    with caplog.at_level(logging.INFO, "octavo"):
        engine = Engine.from_config(config(folder, quantization="int8"))
        engine.close()
    said = [line for line in caplog.messages if line.startswith("quality ")]
    assert len(said) == 2 and said[0].startswith("quality      int8 weights cost 0.")
    assert said[1].startswith("quality      not int8 weights but 16 bits in 1 of 4 layers: 2 (would lose ")


@pytest.mark.parametrize("options", [{}, {"quantization": "int4", "max_quality_loss": math.inf}])
def test_nothing_is_measured_where_nothing_is_asked(
    options: dict[str, Any], outliers_in_weights: tuple[Path, torch.nn.Module]
) -> None:
    engine = Engine.from_config(config(outliers_in_weights[0], **options))
    assert engine.parts.report.verdict is None
    assert not any(line.startswith("quality") for line in engine.parts.report.lines())
    matrices = [part for part in engine.runner.model.layers() if isinstance(part, OnlineScheme)]
    assert all(matrix.plain is None for matrix in matrices) and bool(matrices) == bool(options)
    engine.close()


def test_random_weights_are_not_measured_and_not_refused() -> None:
    wanted = EngineConfig(
        model="tiny", load_format="dummy", device="cpu", quantization="int4", kv_cache_dtype="int4",
        max_quality_loss=0.0, kv_cache_memory=1 << 22,
    )  # fmt: skip
    engine = Engine.from_config(wanted)
    assert "quality      not measured: random weights have none" in engine.parts.report.lines()
    engine.close()
