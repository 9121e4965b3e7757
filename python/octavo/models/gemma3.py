"""Gemma 3, text part: norms before and after each block, norms on q and k, windowed and full layers
mixed 5 to 1.

Gemma team 2025; tensor names of transformers' `Gemma3ForCausalLM`.
"""

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from octavo.layers.norm import RMSNorm
from octavo.layers.schemes.choice import Schemes
from octavo.model_config import ModelConfig, RopeConfig
from octavo.models.config_reader import MAX_LAYERS, MAX_POSITIONS, Fields, read_decoder, read_dtype, read_windows
from octavo.models.decoder import DecoderLayer, Model, hidden_norm
from octavo.models.rope_reader import read_table

LAYER_TYPES = ("full_attention", "sliding_attention")


class Gemma3DecoderLayer(DecoderLayer):
    """h += norm(attention(norm(h))); h += norm(mlp(norm(h)))."""

    def __init__(self, name: str, config: ModelConfig, layer: int, *, kv_group: int, schemes: Schemes) -> None:
        super().__init__(name, config, layer, kv_group=kv_group, schemes=schemes)
        self.post_attention_norm = hidden_norm(f"{name}.post_attention_layernorm", config, schemes, schemes.between)
        self.pre_mlp_norm = hidden_norm(
            f"{name}.pre_feedforward_layernorm", config, schemes, self.mlp.gate_up.input_form
        )
        self.post_mlp_norm = hidden_norm(f"{name}.post_feedforward_layernorm", config, schemes, schemes.between)

    @property
    def mlp_norm(self) -> RMSNorm:
        return self.pre_mlp_norm

    def __call__(self, x: Any, residual: Tensor, positions: Tensor) -> Tensor:
        x = self.post_attention_norm(self.attention(x, positions))
        x = self.pre_mlp_norm.add(x, residual)
        out: Tensor = self.post_mlp_norm(self.mlp(x))
        return out


class Gemma3ForCausalLM(Model):
    """Embeddings scaled by sqrt(hidden_size), two rotary bases; files keep the weights of norms
    minus one.
    """

    architectures = ("Gemma3ForCausalLM",)
    headless_architectures: ClassVar[tuple[str, ...]] = ("Gemma3TextModel",)
    model_type = "gemma3_text"
    defaults: ClassVar[dict[str, Any]] = {  # published files leave out nearly everything
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    }
    gguf_architecture = "gemma3"
    gguf_blocks: ClassVar = {"ffn_norm": "pre_feedforward_layernorm"}
    decoder_layer = Gemma3DecoderLayer

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        rope, local_rope = read_ropes(fields)
        bias = fields.flag("attention_bias", False)
        window = fields.integer("sliding_window", 0, high=MAX_POSITIONS)
        pattern = fields.integer("sliding_window_pattern", high=MAX_LAYERS)
        return read_decoder(
            fields,
            architecture=cls.architectures[0],
            activation="hidden_activation",
            rope=rope,
            local_rope=local_rope,
            layer_windows=read_windows(fields, window, lambda layer: (layer + 1) % pattern != 0),
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=True,
            norm_add_one=True,
            attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
            embedding_scale=fields.integer("hidden_size") ** 0.5,
            logit_soft_cap=fields.number("final_logit_softcapping", 0.0),
        )

    @classmethod
    def complete_gguf(cls, values: dict[str, Any], header: Fields) -> None:
        """The scale of attention: of the heads' size, but for the 27B's 62 layers. Without a window
        all layers are full ones.
        """
        hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            of_27b = values.get("num_hidden_layers") == 62
            values["query_pre_attn_scalar"] = hidden // heads if of_27b else values.get("head_dim", hidden // heads)
        values["rope_parameters"] = {
            "full_attention": values["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": header.get("rope.freq_base_swa")},
        }
        values["final_logit_softcapping"] = header.get("final_logit_softcapping") or None
        window = values["sliding_window"] = header.get("attention.sliding_window") or None
        pattern = header.get("attention.sliding_window_pattern")
        if window and isinstance(pattern, list):  # whether each layer has one
            values["layer_types"] = [LAYER_TYPES[bool(has_window)] for has_window in pattern]
        elif window and pattern is not None:
            values["sliding_window_pattern"] = pattern


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The text part of a checkpoint that has a vision part too; its config is `text_config`."""

    architectures = ("Gemma3ForConditionalGeneration",)
    headless_architectures = ()
    model_type = "gemma3"
    gguf_architecture = ""  # a GGUF file has the text part alone

    @classmethod
    def read_config(cls, fields: Fields) -> ModelConfig:
        text = fields.inside("text_config", fields.table("text_config"), cls.defaults)
        text.refuse_other_computations()
        if text.get("final_logit_softcapping") is not None:
            raise text.error("final_logit_softcapping", f"is not supported with {cls.architectures[0]}, which has none")
        text.get("tie_word_embeddings")  # counts at the top alone
        config = super().read_config(text)
        outer: dict[str, Any] = {}
        # What stands at the top goes before the text's own.
        if fields.get("bos_token_id") is not None:
            outer["bos_token_id"] = next(iter(fields.token_ids("bos_token_id", config.vocab_size)), None)
        if fields.get("eos_token_id") is not None:
            outer["eos_token_ids"] = fields.token_ids("eos_token_id", config.vocab_size)
        return replace(
            config,
            tie_word_embeddings=fields.flag("tie_word_embeddings", True),
            checkpoint_dtype=read_dtype(fields) or config.checkpoint_dtype,
            **outer,
        )


def read_ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """Rotary settings of the full layers and of those with a window.

    transformers 5 writes `rope_parameters`, one table a layer type; older files have `rope_theta`
    and `rope_scaling` for the full layers and `rope_local_base_freq` for the others.
    """
    both = fields.table("rope_parameters")
    for key in both:
        if key not in LAYER_TYPES:
            raise fields.error(f"rope_parameters.{key}", f"must stand inside of {' or '.join(LAYER_TYPES)}")
    tables = fields.inside("rope_parameters", both)
    scaling = fields.table("rope_scaling")
    if scaling:  # old files: of the full layers, on top of what the new key has for them
        table = fields.inside("rope_scaling", {"rope_type": "default", **tables.table("full_attention"), **scaling})
    else:
        table = tables.inside("full_attention", tables.table("full_attention"))
    local_table = tables.inside("sliding_attention", tables.table("sliding_attention"))
    theta, local_theta = fields.number("rope_theta"), fields.number("rope_local_base_freq")
    return (
        read_table(fields, table, theta, of_layer_type=True),
        read_table(fields, local_table, local_theta, of_layer_type=True),
    )
