"""Memory of the host: how much there is, and tensors that take theirs only when it is written."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def total_bytes() -> int:
    """Of the machine, or of its container where that has a limit (cgroup v2). What is free of it
    bounds nothing: much of the rest may be page cache.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return total


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.zeros`, which writes every page (2 to 4 s for 2 GiB); here the kernel hands out
    zero pages as they are first used.
    """
    count = torch.Size(shape).numel()
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(*shape)
