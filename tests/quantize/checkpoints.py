"""Tiny models with a tokenizer, and what the formats' tensors mean, read without the product."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from octavo.config import EngineConfig
from octavo.quantize.options import Options
from octavo.quantize.run import quantize
from octavo.weights.load import load_model
from tests.models.harness import Runner, Sequence
from tests.models.quantised_files import AWQ_ORDER
from tests.models.test_architectures import PROMPT, make

SHAPE = {"vocab_size": 260, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
TEXT = "In the beginning was a text that says little, again and again, with some 0123456789 and \nlines.\n" * 30
CALIBRATION = {"num_samples": 4, "sample_length": 64}


def small_model(case: str, folder: Path, *, uneven: bool = True, **shape: Any) -> torch.nn.Module:
    """As `make`, with a tokenizer of bytes. uneven: some inputs of every matrix are much larger than
    others.
    """
    layers = {"num_hidden_layers": 2}
    if case.startswith("gemma3"):
        layers |= {"layer_types": ["sliding_attention", "full_attention"]}
    model = make(case, folder, **SHAPE | layers | shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters() if uneven else ():
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                parameter[3::32] += 8.0
            if name.endswith(("v_proj.weight", "up_proj.weight")):
                parameter[5::32] *= 8.0
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """Four special tokens, then the bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {letter: 4 + i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def run(model: Path, output: Path, **options: Any) -> Path:
    """The command on the CPU, with a short text."""
    if options["method"] in ("gptq", "awq"):
        text = model / "calibration.prose"
        text.write_text(TEXT)
        options = {"calibration": text, **CALIBRATION, **options}
    assert quantize(Options(model=str(model), output=output, device="cpu", **options)) == 0
    return output


SEEN = [1, *(4 + sorted(pre_tokenizers.ByteLevel.alphabet()).index(letter) for letter in "InĠtheĠbeginningĠwasĠaĠtext")]
"""Ids of the calibration's text."""


def ours(folder: Path, ids: list[int] = PROMPT) -> torch.Tensor:
    """Logits of a prompt."""
    loaded = load_model(EngineConfig(model=str(folder), dtype="float32"), device=torch.device("cpu"))
    return Runner(loaded.model, torch.float32).step([], [(Sequence(0), ids)])[0]


def theirs(model: torch.nn.Module, ids: list[int] = PROMPT) -> torch.Tensor:
    """Logits of transformers' model."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, by the index."""
    files = sorted(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()))
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def unpack(words: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """int32 [a, b] -> [a, b * 32 / bits]; `order` as in `quantised_files.pack`."""
    count = 32 // bits
    unsigned = words.numpy().view(np.uint32)[:, :, None]
    places = (unsigned >> (np.arange(count, dtype=np.uint32) * bits)) & ((1 << bits) - 1)
    numbers = np.empty_like(places)
    numbers[:, :, list(order or range(count))] = places
    return numbers.reshape(len(words), -1).astype(np.int64)


def meant(tensors: dict[str, torch.Tensor], name: str, config: dict[str, Any]) -> torch.Tensor:
    """The weight [N, K] of a projection in the format gptq or awq."""
    word, zero, scale = (tensors[f"{name}.{end}"] for end in ("qweight", "qzeros", "scales"))
    scales = scale.double().numpy()
    if config["quant_method"] == "awq":
        numbers, zeros = unpack(word, 4, AWQ_ORDER), unpack(zero, 4, AWQ_ORDER)
        index = np.arange(len(numbers)) // config["group_size"]
    else:
        bits = config["bits"]
        numbers, zeros = unpack(word.t().contiguous(), bits).T, unpack(zero, bits) + 1
        index = tensors[f"{name}.g_idx"].numpy()
    return torch.from_numpy((numbers - zeros[index]) * scales[index]).float().t()
