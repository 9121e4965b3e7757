"""Counters by which the programs of a launch find out who of them is the last."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ARRIVALS = 65536


@functools.cache
def arrivals(device: torch.device) -> Tensor:
    """[MAX_ARRIVALS] int32 of a device, zero between launches: whoever arrives last resets its
    counter. Launches that use them must be on one stream; the first call must not be within the
    capture of a graph.
    """
    return torch.zeros(MAX_ARRIVALS, dtype=torch.int32, device=device)


@triton.jit
def arrives_last(arrivals_ptr, counter, expected):
    """Whether this program is the last of `expected` ones to arrive at `arrivals_ptr[counter]`,
    which then is zero again. The last one can read what all of them stored before they arrived, if
    it does not read from its L1 (`.cg`).
    """
    # All threads' stores come before the one thread's release; its acquire comes before all
    # threads' loads.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    last = arrived == expected - 1
    if last:
        tl.store(arrivals_ptr + counter, 0)
    return last
