"""The gated feed-forward block: down(activation(gate) * up), gate and up as one matrix."""

from typing import Any

from torch import Tensor

from octavo.layers.schemes.choice import Schemes
from octavo.layers.schemes.scheme import Matrix
from octavo.layers.weight import Layer
from octavo.model_config import ModelConfig


class GatedMLP(Layer):
    """SiLU (Llama) or tanh-approximated GELU (Gemma) gating."""

    def __init__(self, name: str, config: ModelConfig, *, schemes: Schemes) -> None:
        hidden, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = schemes.linear(Matrix({f"{name}.gate_proj": width, f"{name}.up_proj": width}, hidden, bias))
        self.down = schemes.linear(Matrix({f"{name}.down_proj": hidden}, width, bias))
        self.gate = "silu_and_mul" if config.activation == "silu" else "gelu_tanh_and_mul"

    def finish(self) -> None:
        self.activation = getattr(self.down.input_form, self.gate)

    def __call__(self, x: Any) -> Tensor:
        """x [num_tokens, hidden_size] in the form of `gate_up` -> [num_tokens, hidden_size]."""
        return self.down(self.activation(self.gate_up(x)))
