"""Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3: the plain pre-norm decoder, told apart only by `ModelConfig`.

Mistral may have a window, Qwen2 has biases on q, k and v, Qwen3 norms on the heads of q and k. Touvron et al. 2023;
tensor names of transformers' `LlamaForCausalLM`.
"""

from octavo.models.decoder import Model


class LlamaForCausalLM(Model):
    """Pre-norm blocks with rotary attention and a gated feed-forward part."""
