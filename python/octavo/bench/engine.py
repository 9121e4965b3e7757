"""The engine that a bench measures, and what its figures need beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Iterator
from typing import Any

from octavo.config import EngineConfig


@contextlib.contextmanager
def step_thread(config: EngineConfig) -> Iterator[Any]:
    """The thread of an engine whose queue holds any workload. The engine is closed at the end: the
    next one needs its memory.
    """
    from octavo.engine.engine import Engine
    from octavo.engine.step_thread import StepThread

    thread = StepThread(Engine.from_config(dataclasses.replace(config, max_waiting=2**20)))
    try:
        yield thread
    finally:
        thread.close()


def described(engine: Any, name: str) -> dict[str, Any]:
    """What a figure needs beside it."""
    import torch

    return {
        "workload": name,
        "model": engine.parts.model_name,
        "device": engine.parts.report.device,
        "dtype": engine.parts.report.dtype,
        "kv_dtype": engine.parts.report.kv_dtype,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
