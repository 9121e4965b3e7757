"""GGUF's names for what Hugging Face names otherwise: metadata keys and tensors (llama.cpp's
`gguf-py`).
"""

import re
from collections.abc import Mapping

# Key of config.json -> metadata key without its architecture.
GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}

_ROPE_KEYS = {
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
}
# The same, for errors alone, of what a family puts together itself.
GGUF_OWN_KEYS = {
    **{f"rope_parameters.{key}": suffix for key, suffix in _ROPE_KEYS.items()},
    **{f"rope_parameters.full_attention.{key}": suffix for key, suffix in _ROPE_KEYS.items()},
    "rope_parameters.sliding_attention.rope_theta": "rope.freq_base_swa",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "layer_types": "attention.sliding_window_pattern",
    "final_logit_softcapping": "final_logit_softcapping",
}

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_IN_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


def hugging_face_name(stored: str, blocks: Mapping[str, str]) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Names nobody knows stay as
    they are.

    blocks: `Model.gguf_blocks` of the family.
    """
    match = _IN_BLOCK.fullmatch(stored)
    if match:
        layer, part, kind = match.groups()
        name = blocks.get(part, _BLOCK.get(part))
        return stored if name is None else f"model.layers.{layer}.{name}.{kind}"
    part, _, kind = stored.rpartition(".")
    return f"{_TOP[part]}.{kind}" if part in _TOP else stored
