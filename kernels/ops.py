"""The one door to the ops: Triton where the first argument lives on a CUDA device, the
plain-PyTorch twin elsewhere.

Layers and engine call only this module. What an op does, and its shapes, stand in
`reference/layers.py`, of those in 4 and 8 bits in `reference/int4.py` and `eight_bit.py`, of
`prepare` and `sample` in `reference/step.py`, of `prompt_logprobs` in `reference/logprobs.py`, of
`pool` in `reference/pool.py`.
Triton is imported at the first call with a CUDA tensor, so a host without it can run everything on
its CPU.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from octavo.kernels.reference import eight_bit, int4, layers, logprobs, step
from octavo.kernels.reference import pool as pooling

Op = TypeVar("Op", bound=Callable[..., Any])


def _by_device(twin: Op, module: str, tensor_at: int = 0) -> Op:
    """`twin` for CPU tensors, the function of the same name in `octavo.kernels.<module>` for CUDA
    tensors.

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


rms_norm = _by_device(layers.rms_norm, "pointwise.norm")
add_rms_norm = _by_device(layers.add_rms_norm, "pointwise.norm")
silu_and_mul = _by_device(layers.silu_and_mul, "pointwise.activation")
gelu_tanh_and_mul = _by_device(layers.gelu_tanh_and_mul, "pointwise.activation")
linear = _by_device(layers.linear, "linear.dense")
int4_linear = _by_device(int4.int4_linear, "linear.int4")
linear_w8a16 = _by_device(eight_bit.linear_w8a16, "linear.eight_bit")
linear_w8a16_grouped = _by_device(eight_bit.linear_w8a16_grouped, "linear.eight_bit_grouped")
linear_w8a8 = _by_device(eight_bit.linear_w8a8, "linear.eight_bit")
quantize_rows = _by_device(eight_bit.quantize_rows, "pointwise.quantize")
quantize_static = _by_device(eight_bit.quantize_static, "pointwise.quantize")
rms_norm_quant = _by_device(eight_bit.rms_norm_quant, "pointwise.norm")
add_rms_norm_quant = _by_device(eight_bit.add_rms_norm_quant, "pointwise.norm")
silu_and_mul_quant = _by_device(eight_bit.silu_and_mul_quant, "pointwise.activation")
gelu_tanh_and_mul_quant = _by_device(eight_bit.gelu_tanh_and_mul_quant, "pointwise.activation")
rope_and_cache = _by_device(layers.rope_and_cache, "attention.rope")
decode_attention = _by_device(layers.decode_attention, "attention.decode")
prefill_attention = _by_device(layers.prefill_attention, "attention.prefill")
copy_blocks = _by_device(layers.copy_blocks, "attention.copy_blocks")
prepare = _by_device(step.prepare, "step.prepare", tensor_at=1)
sample = _by_device(step.sample, "step.sample")
prompt_logprobs = _by_device(logprobs.prompt_logprobs, "step.prompt_logprobs")
pool = _by_device(pooling.pool, "step.pool")
sample_peak_rehearsal = _by_device(step.sample_peak_rehearsal, "step.sample")
