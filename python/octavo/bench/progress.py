"""The progress bar of every benchmark."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def progress(what: str, total: int, over: Iterable[Any] | None = None) -> Any:
    """A bar on the standard error that leaves nothing behind; none where that is no terminal."""
    from tqdm import tqdm  # half the time that the command line takes to load

    return tqdm(over, desc=what, total=total, disable=None, leave=False, dynamic_ncols=True)
