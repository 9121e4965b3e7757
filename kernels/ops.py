"""The one door to the ops: Triton where the first argument lives on a CUDA device, the plain-PyTorch twin elsewhere.

Layers call only this module; what an op does, and its shapes, stand in `reference.py`. Triton is imported at the
first call with a CUDA tensor, so a host without it can run everything on its CPU.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from octavo.kernels import reference, reference_step

Op = TypeVar("Op", bound=Callable[..., Any])


def _by_device(twin: Op, module: str, tensor_at: int = 0) -> Op:
    """`twin` for CPU tensors, the function of the same name in `octavo.kernels.<module>` for CUDA tensors.

    The argument at position `tensor_at`, a tensor or a list of them, decides.
    """
    if not torch.cuda.is_available():
        return twin

    @functools.cache
    def kernel() -> Callable[..., Any]:
        return cast(Callable[..., Any], getattr(importlib.import_module(f"octavo.kernels.{module}"), twin.__name__))

    @functools.wraps(twin)
    def op(*args: Any, **kwargs: Any) -> Any:
        decides = args[tensor_at]
        tensor = decides[0] if isinstance(decides, list) else decides
        return (kernel() if tensor.is_cuda else twin)(*args, **kwargs)

    return cast(Op, op)


rms_norm = _by_device(reference.rms_norm, "norm")
add_rms_norm = _by_device(reference.add_rms_norm, "norm")
silu_and_mul = _by_device(reference.silu_and_mul, "activation")
gelu_tanh_and_mul = _by_device(reference.gelu_tanh_and_mul, "activation")
linear = _by_device(reference.linear, "linear_bf16")
rope_and_cache = _by_device(reference.rope_and_cache, "rope")
decode_attention = _by_device(reference.decode_attention, "decode_attention")
prefill_attention = _by_device(reference.prefill_attention, "prefill_attention")
copy_blocks = _by_device(reference.copy_blocks, "copy_blocks")
prepare = _by_device(reference_step.prepare, "prepare", tensor_at=1)
sample = _by_device(reference_step.sample, "sample")
sample_peak_rehearsal = _by_device(reference_step.sample_peak_rehearsal, "sample")
