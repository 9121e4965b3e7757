"""Makes the checkpoints of this folder with compressed-tensors itself (0.20.0, transformers 5.24,
torch 2.15): `PYTHONPATH=<its folder> python tests/models/compressed/make.py`.

Each is a tiny random Llama, quantised and compressed by the library, with the logits that the
library's own fake quantisation gave for `PROMPT` in float32 (`expected.safetensors`).
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

HERE = Path(__file__).parent
PROMPT = [int(x) for x in torch.randint(3, 199, (41,), generator=torch.Generator().manual_seed(1))]
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
SCHEMES = {
    "w4a16": {"weights": {**WEIGHTS, "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}},
    "w8a16": {"weights": WEIGHTS},
    "w8a8": {"weights": WEIGHTS, "input_activations": TOKENS},
    "fp8": {
        "weights": {**WEIGHTS, "type": "float"},
        "input_activations": {**TOKENS, "type": "float"},
    },
}


def small_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def calibrate(module: torch.nn.Module) -> None:
    """Scales and zeros of a weight from its own extremes."""
    args = module.quantization_scheme.weights
    rows = len(module.weight)
    groups = module.weight.detach().view(rows, -1, args.group_size or module.weight.shape[1])
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.view_as(module.weight_zero_point))


def make(name: str) -> None:
    model = small_llama()
    scheme = QuantizationScheme(targets=["Linear"], **SCHEMES[name])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            calibrate(module)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT])).logits[0]
    folder = HERE / name
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    compressor.update_config(str(folder))
    save_file({"logits": logits.contiguous()}, folder / "expected.safetensors")


if __name__ == "__main__":
    for each in SCHEMES:
        make(each)
