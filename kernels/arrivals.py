"""Counters by which the programs of a launch find out who of them is the last."""

import functools

import torch
from torch import Tensor

MAX_ARRIVALS = 65536


@functools.cache
def arrivals(device: torch.device) -> Tensor:
    """[MAX_ARRIVALS] int32 of a device, zero between launches: whoever arrives last resets its counter. Launches that
    use them must be on one stream; the first call must not be within the capture of a graph.
    """
    return torch.zeros(MAX_ARRIVALS, dtype=torch.int32, device=device)
