"""From files to a model in memory: safetensors and GGUF, never pickle."""
