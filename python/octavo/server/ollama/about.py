"""What Ollama's routes tell of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine

_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Fields of `SamplingParams` by Ollama's names."""


def details(engine: AsyncEngine) -> dict[str, Any]:
    """What is known of the model's files; Ollama's clients want all of the fields."""
    model = engine.model_config
    quantization = engine.config.quantization or model.checkpoint_dtype or ""
    return {
        "parent_model": "",
        "format": "gguf" if str(engine.config.model).endswith(".gguf") else "safetensors",
        "family": _family(engine),
        "families": [_family(engine)],
        "parameter_size": _shortened(model.num_parameters()),
        "quantization_level": quantization.upper(),
    }


def model_info(engine: AsyncEngine) -> dict[str, Any]:
    """What of the model's shape GGUF files have, by their names."""
    model = engine.model_config
    of_family = {
        "context_length": engine.max_model_len,
        "embedding_length": model.hidden_size,
        "block_count": model.num_layers,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.num_heads,
        "attention.head_count_kv": model.num_kv_heads,
        "attention.key_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": model.rms_norm_eps,
        "rope.freq_base": model.rope.theta,
        "vocab_size": model.vocab_size,
    }
    general = {"general.architecture": _family(engine), "general.parameter_count": model.num_parameters()}
    return general | {f"{_family(engine)}.{name}": value for name, value in of_family.items()}


def parameters(engine: AsyncEngine) -> str:
    """A line for each of the model's defaults, as Ollama has them of a Modelfile."""
    given = engine.generation_defaults
    return "\n".join(f"{theirs:30} {given[ours]}" for ours, theirs in _PARAMETERS.items() if ours in given)


def template(engine: AsyncEngine) -> str:
    """The chat template, which is Jinja's here."""
    return "" if engine.chat_template is None else engine.chat_template.source or ""


def capabilities(engine: AsyncEngine) -> list[str]:
    """What it can do, in Ollama's words."""
    takes_tools = engine.chat_template is not None and engine.chat_template.takes_tools
    can = {
        "completion": engine.generates,
        "tools": engine.generates and takes_tools and engine.answers.calls is not None,
        "thinking": engine.generates and engine.answers.reasoning is not None,
        "embedding": engine.embeddings is not None,
    }
    return [name for name, able in can.items() if able]


def _family(engine: AsyncEngine) -> str:
    """What GGUF files call the architecture."""
    name = engine.model_config.architecture
    for ending in ("ForCausalLM", "ForConditionalGeneration", "Model"):
        name = name.removesuffix(ending)
    return name.lower()


def _shortened(number: int) -> str:
    """A number of weights as Ollama writes it: 134.52M, 7B, 6.7B."""
    for size, letter, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if number >= size:
            return f"{number / size:.{0 if number % size == 0 else digits}f}{letter}"
    return str(number)
