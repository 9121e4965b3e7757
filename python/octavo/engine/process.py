"""The process that engines belong to.

Threads do not come along through a fork: an engine of the parent has none to run on, and torch's
workers, for which every parallel product waits, are gone too. Both would hang for good.
"""

from __future__ import annotations

import os

_owner: int | None = None  # the process in which the first engine was built


def claim() -> None:
    """Before an engine is built. Raises `RuntimeError` as `check` does."""
    global _owner
    if _owner is None:
        _owner = os.getpid()
    check()


def is_forked() -> bool:
    """Whether this process was forked from one that had built an engine."""
    return _owner is not None and _owner != os.getpid()


def check() -> None:
    """Raises `RuntimeError` where nothing can run because this process was forked too late."""
    if is_forked():
        raise RuntimeError(
            "this process was forked from one that had loaded a model, whose threads did not come along: start it by "
            'spawn, as with multiprocessing.get_context("spawn"), and load the model in it'
        )
