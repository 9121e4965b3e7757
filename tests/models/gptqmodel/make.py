"""Makes the checkpoints of this folder with GPTQModel itself (7.7.0, transformers 5.24, torch 2.15), in
an environment of its own: `TORCHDYNAMO_DISABLE=1 GPTQMODEL_CPU_WORKERS=2 python -c "import os, runpy;
os.cpu_count = lambda: 16; runpy.run_path('tests/models/gptqmodel/make.py', run_name='__main__')"`, as it
refuses some methods where it counts two processors.

Each is a tiny random Llama, quantised over random tokens and written by the library, with the logits
for `PROMPT` of a plain model in float32 that has the weights which the library reads out of its file
(`expected.safetensors`): its own products round to 16 bits. It needs a tokenizer to be there.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

HERE = Path(__file__).parent
VOCAB = 199
PROMPT = [int(x) for x in torch.randint(3, VOCAB, (41,), generator=torch.Generator().manual_seed(1))]
CASES: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "gptq-act-order": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False, "format": "gptq_v2"},
    "awq": {"bits": 4, "group_size": 64, "quant_method": "awq", "format": "gemm"},
}


def small_llama(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(token): token for token in range(VOCAB)}, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="1").save_pretrained(folder)


@torch.inference_mode()
def expected(folder: Path, plain: Path, backend: str) -> torch.Tensor:
    """Of the weights that the library reads out of a file."""
    # In the type of the file's scales, which the library would round to the model's.
    dtype = torch.float16 if backend == "torch" else torch.bfloat16
    read = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=dtype).model.float()
    reference = transformers.LlamaForCausalLM.from_pretrained(plain).float().eval()
    for name, module in read.named_modules():
        if hasattr(module, "qweight"):
            if backend == "torch":
                weight = module.dequantize_weight()
            else:  # which it has in 16 bits alone
                half = torch.zeros(1, module.in_features, dtype=torch.float16)
                module._ensure_runtime_dtype(device=half.device, dtype=half.dtype)
                weight = module._dequantize_weight_for_inference(half, dtype=half.dtype).float()
            reference.get_submodule(name).weight.copy_(weight.T)
        elif isinstance(module, torch.nn.Embedding) or "norm" in name:
            reference.get_submodule(name).weight.copy_(module.weight)
    return reference(torch.tensor([PROMPT])).logits[0]


def make(name: str, plain: Path, folder: Path) -> None:
    model = GPTQModel.load(str(plain), QuantizeConfig(**CASES[name]), device="cpu")
    generator = torch.Generator().manual_seed(1)
    pieces = [torch.randint(0, VOCAB, (64,), generator=generator).tolist() for _ in range(32)]
    model.quantize([{"input_ids": piece, "attention_mask": [1] * 64} for piece in pieces], batch_size=4)
    model.save(str(folder))
    logits = expected(folder, plain, "torch_awq" if name == "awq" else "torch")
    (HERE / name).mkdir(exist_ok=True)
    for file in ("config.json", "quantize_config.json", "model.safetensors"):
        shutil.copyfile(folder / file, HERE / name / file)
    save_file({"logits": logits.contiguous()}, HERE / name / "expected.safetensors")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        small_llama(Path(scratch) / "plain")
        for each in CASES:
            make(each, Path(scratch) / "plain", Path(scratch) / each)
