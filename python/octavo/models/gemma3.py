"""Gemma 3, text part: norms before and after each block, norms on q and k, windowed and full layers
mixed 5 to 1.

Gemma team 2025; tensor names of transformers' `Gemma3ForCausalLM`.
"""

from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from octavo.layers.schemes.choice import Schemes
from octavo.model_config import ModelConfig, RopeConfig
from octavo.models.config_reader import MAX_LAYERS, Fields, read_decoder, read_rope, read_windows
from octavo.models.decoder import DecoderLayer, Model, hidden_norm


class Gemma3DecoderLayer(DecoderLayer):
    """h += norm(attention(norm(h))); h += norm(mlp(norm(h)))."""

    def __init__(self, name: str, config: ModelConfig, layer: int, *, kv_group: int, schemes: Schemes) -> None:
        super().__init__(name, config, layer, kv_group=kv_group, schemes=schemes)
        self.post_attention_norm = hidden_norm(f"{name}.post_attention_layernorm", config, schemes)
        self.pre_mlp_norm = hidden_norm(
            f"{name}.pre_feedforward_layernorm", config, schemes, self.mlp.gate_up.input_form
        )
        self.post_mlp_norm = hidden_norm(f"{name}.post_feedforward_layernorm", config, schemes)

    def __call__(self, x: Any, residual: Tensor, positions: Tensor) -> Tensor:
        x = self.post_attention_norm(self.attention(x, positions))
        x = self.pre_mlp_norm.add(x, residual)
        out: Tensor = self.post_mlp_norm(self.mlp(x))
        return out


class Gemma3ForCausalLM(Model):
    """Embeddings scaled by sqrt(hidden_size), two rotary bases; files keep the weights of norms
    minus one.
    """

    architectures = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")  # of the latter the text part
    defaults: ClassVar = {  # published files leave out nearly everything
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }
    gguf_architecture = "gemma3"
    gguf_blocks: ClassVar = {"ffn_norm": "pre_feedforward_layernorm"}
    decoder_layer = Gemma3DecoderLayer

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        rope, local_rope = read_ropes(fields)
        return read_decoder(
            fields,
            rope=rope,
            local_rope=local_rope,
            layer_windows=read_windows(fields, partial(has_window, fields)),
            qk_norm=True,
            norm_add_one=True,
            attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
            embedding_scale=fields.integer("hidden_size") ** 0.5,
            logit_soft_cap=fields.number("final_logit_softcapping", 0.0),
        )

    @classmethod
    def complete_gguf(cls, values: dict[str, Any]) -> None:
        """The scale of attention: of the heads' size, but for the 27B's 62 layers."""
        hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
        if values.get("num_hidden_layers") == 62 and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            values["query_pre_attn_scalar"] = hidden // heads
        elif "head_dim" in values:
            values["query_pre_attn_scalar"] = values["head_dim"]


def has_window(fields: Fields, layer: int) -> bool:
    """Of files without `layer_types`: every sixth layer sees everything."""
    return (layer + 1) % fields.integer("sliding_window_pattern", high=MAX_LAYERS) != 0


def read_ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """Rotary settings of the full layers and of those with a window.

    transformers 5 writes `rope_parameters`, one table a layer type; older files have `rope_theta`,
    `rope_scaling` and `rope_local_base_freq`.
    """
    tables = fields.table("rope_parameters")
    if "full_attention" not in tables:
        full = read_rope(fields, "rope_scaling", fields.table("rope_scaling"))
        return full, RopeConfig(theta=fields.number("rope_local_base_freq"))
    for kind in ("full_attention", "sliding_attention"):
        if not isinstance(tables.get(kind), dict):
            raise fields.error(f"rope_parameters.{kind}", "missing or not an object")
    full, local = (
        read_rope(fields, "rope_parameters", tables[kind]) for kind in ("full_attention", "sliding_attention")
    )
    return full, local
