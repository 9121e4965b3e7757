"""The gated feed-forward block: down(activation(gate) * up), gate and up as one matrix."""

import torch
from torch import Tensor

from octavo.kernels import ops
from octavo.layers.linear import Linear
from octavo.layers.weight import Layer
from octavo.model_config import ModelConfig


class GatedMLP(Layer):
    """SiLU (Llama) or tanh-approximated GELU (Gemma) gating."""

    def __init__(self, name: str, config: ModelConfig, *, dtype: torch.dtype) -> None:
        width = config.intermediate_size
        bias = config.mlp_bias
        self.gate_up = Linear(
            {"gate_proj": width, "up_proj": width}, config.hidden_size, dtype=dtype, bias=bias, name=name
        )
        self.down = Linear({"down_proj": config.hidden_size}, width, dtype=dtype, bias=bias, name=name)
        self.activation = ops.silu_and_mul if config.activation == "silu" else ops.gelu_tanh_and_mul

    def __call__(self, x: Tensor) -> Tensor:  # x [num_tokens, hidden_size] -> the same
        return self.down(self.activation(self.gate_up(x)))
