"""Which process an engine belongs to.

Threads do not come along through a fork: an engine of the parent has none to run on, and torch's
workers, for which every parallel product waits, are gone too. Both would hang for good.
"""

from __future__ import annotations

import os

_first_builder: int | None = None


def claim() -> int:
    """The id of this process, for an engine that is about to be built in it.

    Raises `RuntimeError` where an engine had been built before this process was forked.
    """
    global _first_builder
    if _first_builder is None:
        _first_builder = os.getpid()
    check(_first_builder)
    return _first_builder


def check(owner: int) -> None:
    """Raises `RuntimeError` in any process but `owner`."""
    if os.getpid() != owner:
        raise RuntimeError(
            "this process was forked from one that had loaded a model, whose threads did not come along: start it by "
            'spawn, as with multiprocessing.get_context("spawn"), and load the model in it'
        )
