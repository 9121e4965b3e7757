"""What a run needs of memory and disk, said before it starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.engine.host_memory import total_bytes
from octavo.model_config import ModelConfig
from octavo.quantize.awq import PIECE
from octavo.quantize.layer import BATCH_TOKENS
from octavo.quantize.options import Options
from octavo.quantize.output import free_bytes

_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Needs:
    """Bytes, beside what the program takes by itself."""

    device: int  # at a time
    host: int  # at a time; the same memory where the device is the host
    disk: int

    def said(self, device: torch.device) -> str:
        """In words."""
        disk = f"{_size(self.disk)} on disk"
        if device.type == "cpu":
            return f"It takes about {_size(self.device)} of memory at its peak, and {disk}"
        return (
            f"It takes about {_size(self.device)} of the GPU and {_size(self.host)} of memory at its peak, and {disk}"
        )


def needs(
    options: Options,
    config: ModelConfig,
    shapes: Sequence[tuple[int, int]],
    *,
    tokens: int,
    item_bytes: int,
    state_bytes: int,
    rest: Sequence[int],
    to_do: Sequence[bool],
    reading: int,
    on_host: bool,
) -> Needs:
    """shapes: of a layer's projections. tokens: of the calibration. item_bytes: of a plain weight;
    state_bytes: of a number of a hidden state. rest: of each file without layers. to_do: of the
    layers' files, then of those. reading: as `Original.reading`.
    """
    assert options.bits is not None
    weights = sum(rows * inputs for rows, inputs in shapes)
    largest = max(rows * inputs for rows, inputs in shapes)
    depths = {inputs for _, inputs in shapes}
    file = weights * options.bits // 8 + weights // 16  # scales and the like
    host = weights * item_bytes + weights + 2 * file  # as read, its numbers a byte each, packed, written
    if options.is_calibrated:
        width = 2 * config.hidden_size + 3 * config.intermediate_size + 3 * config.num_heads * config.head_dim
        batch = min(tokens, BATCH_TOKENS) * width * 4
        moments = 4 * (max(depths) ** 2 if options.method == "gptq" else 2 * sum(depth**2 for depth in depths))
        # GPTQ: in their order, twice on the way, damped, its factor, the inverse and that one's factor;
        # of the matrix a copy, its numbers and a product. AWQ: of the matrix what is lost, twice, and
        # what is tried; of the rows that are clipped at a time eight copies.
        work = 4 * max(6 * depth**2 for depth in depths) + 16 * 2 * largest
        if options.method == "awq":
            work += 8 * 4 * min(2 * largest, PIECE)
        states = tokens * config.hidden_size * state_bytes
        embedding = 2 * config.vocab_size * config.hidden_size * item_bytes + states  # its rows, then all in one
        layer = 4 * weights + moments + max(batch, work)
        device = states + max(embedding, layer)
    else:
        device = 16 * largest
    host = reading + max(host + (device if on_host else 0), 2 * max(rest))
    layers = to_do[: len(to_do) - len(rest)]
    disk = sum(layers) * file + sum(size for size, missing in zip(rest, to_do[len(layers) :], strict=True) if missing)
    return Needs(host if on_host else device, host, disk)


def check_room(needs: Needs, device: torch.device, options: Options) -> None:
    """Raises `ValueError` that says what would help."""
    free = free_memory(device)
    if needs.device > free:
        fewer = "; lower --num-samples or --sample-length" if options.is_calibrated else ""
        other = ", or give --device cpu" if device.type == "cuda" else ""
        raise ValueError(
            f"memory: about {_size(needs.device)} are needed, and {_size(free)} are free on the {device.type}"
            f"{fewer}{other}"
        )
    room = free_bytes(options.output)
    if needs.disk > room:
        raise ValueError(
            f"--output {options.output}: about {_size(needs.disk)} are needed, and {_size(room)} are free on that disk"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that a device has left; of a host also those that it can make free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(available, total_bytes())


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
