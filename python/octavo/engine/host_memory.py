"""Memory of the host: how much of it is left, and tensors that take theirs only when it is written."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """What this process can still take before the kernel kills something: of the machine, or of its container."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        return min(available, limit - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no cgroup v2, or one without a limit ("max")
        return available


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.zeros`, which writes every page (2 to 4 s for 2 GiB); here the kernel hands out
    zero pages as they are first used.
    """
    count = torch.Size(shape).numel()
    pages = mmap.mmap(-1, max(1, count * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(*shape)
