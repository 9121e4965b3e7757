"""Octavo: an LLM inference engine and server. Rust decides, Python executes.

Names are loaded when they are first used: `import octavo` itself loads neither torch nor the
extension.
"""

TYPE_CHECKING = False  # for type checkers it is true whatever is written here; `typing` is half of this import's time
if TYPE_CHECKING:
    from typing import Any

    from octavo.config import EngineConfig as EngineConfig
    from octavo.engine.async_engine import AsyncEngine as AsyncEngine
    from octavo.engine.llm import LLM as LLM
    from octavo.outputs import CompletionOutput as CompletionOutput
    from octavo.outputs import EmbeddingOutput as EmbeddingOutput
    from octavo.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from octavo.outputs import Logprob as Logprob
    from octavo.outputs import RequestOutput as RequestOutput
    from octavo.pooling import PoolerConfig as PoolerConfig
    from octavo.pooling import PoolingParams as PoolingParams
    from octavo.sampling_params import SamplingParams as SamplingParams
    from octavo.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "octavo.engine.llm",
    "AsyncEngine": "octavo.engine.async_engine",
    "EngineConfig": "octavo.config",
    "SamplingParams": "octavo.sampling_params",
    "StructuredOutputsParams": "octavo.structured_outputs",
    "RequestOutput": "octavo.outputs",
    "CompletionOutput": "octavo.outputs",
    "EmbeddingOutput": "octavo.outputs",
    "EmbeddingRequestOutput": "octavo.outputs",
    "Logprob": "octavo.outputs",
    "PoolerConfig": "octavo.pooling",
    "PoolingParams": "octavo.pooling",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "Logprob",
    "PoolerConfig",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]


def __getattr__(name: str) -> "Any":
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    import importlib  # until a command has begun, an interrupt ends with a traceback: that may not take long

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
