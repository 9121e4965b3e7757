"""Names of `quantization`, in `EngineConfig` and in what it says of a draft model."""

ONLINE = ("fp8", "int8", "int4")
"""Values of `quantization` that quantise a model while it is loaded."""

CONFIRMING = {
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "awq": "awq",
    "awq_marlin": "awq",
    "compressed-tensors": "compressed-tensors",
    "fp8": "fp8",
}
"""Values of `quantization` that a checkpoint quantised so confirms, vLLM's kernels among them."""

QUANTIZATIONS = (*dict.fromkeys((*ONLINE, *CONFIRMING, "gguf")),)
