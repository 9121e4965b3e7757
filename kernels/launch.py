"""Programmatic dependent launch: a kernel whose programs may start while the one before it in the
stream still runs.

A kernel launched so (`launch_pdl=True`) first lets its own successor start, then reads what no
kernel of the step writes (weights), then waits (`wait_for_inputs`) until its predecessor has
finished and its writes can be seen. Every program has to wait before it writes anything or returns,
also one that reads nothing: only so does "my predecessor has finished" mean that all before it
have. A kernel launched in the plain way waits for everything before it as ever, so both kinds mix.
"""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def has_pdl(device: torch.device) -> bool:
    """Whether kernels of the device can be launched so: from compute capability 9 on. Tensors
    without a device are compiled for such a card.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (9, 0)
    return device.type == "meta"


@functools.cache
def has_gluon(device: torch.device) -> bool:
    """Whether the Gluon kernels (`*_gluon.py`) run there: they are for Hopper, and for the versions
    of Triton that they have been compiled with, because Gluon is still experimental. Elsewhere the
    Triton kernels do their work.
    """
    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return is_hopper and (3, 6) <= version <= (3, 9)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; for tensors without one, those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@triton.jit
def let_successor_start(PDL: tl.constexpr):
    """From when all programs have called it, those of the next kernel may start where there is
    room.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Until all that earlier kernels wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()
