"""How a CPU multiplies by plain weights, by their dtype and by what the processor can do.

Without AVX-512 or AMX torch's own 16-bit product is a loop over rows. FBGEMM's packs 16-bit weights
as float16, widens them in registers and accumulates in float32. Measured on one core with AVX2 and
no more (torch 2.15, weights cold, the gate-up matrix of SmolLM2, 576 -> 3072):

| rows | bf16 `F.linear` | widened at each call | FBGEMM | fp32 `F.linear` | fp32 oneDNN packed |
| --- | --- | --- | --- | --- | --- |
| 1  | 0.40 ms | -       | 0.24 ms | 0.68 ms | 0.54 ms |
| 2  | 0.85 ms | -       | 0.26 ms | 1.09 ms | 0.68 ms |
| 4  | 1.48 ms | 1.05 ms | 0.31 ms | 1.21 ms | 0.80 ms |
| 8  | 3.49 ms | 1.73 ms | 0.55 ms | -       | -       |
| 32 | -       | 3.06 ms | 1.88 ms | 2.70 ms | 2.02 ms |
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octavo.layers.schemes.dense import PlainScheme, multiply

MAX_FLOAT16 = 65504.0
PACK_ROWS = 32  # rows that packing is told to expect: at 1 row no slower than a packing for 1, at 2 rows twice as fast


class HalfScheme(PlainScheme):
    """16-bit weights in FBGEMM's float16 layout, which replaces the plain one; float32 sums.

    bfloat16 weights are exact in float16 but for those under 6e-5, which move by 3e-8 at most. A
    matrix with an element over `MAX_FLOAT16` (which only its values tell) stays as it is.
    """

    packed: Any = None  # FBGEMM's object; None: the plain matrix multiplies

    def finish(self) -> None:
        low, high = torch.aminmax(self.weight)  # NaN compares false
        if not bool(low >= -MAX_FLOAT16 and high <= MAX_FLOAT16):
            return
        bias = None if self.bias is None else self.bias.float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(self.weight.float(), bias)
        del self.weight, self.bias

    def own_bytes(self) -> int:
        if self.packed is None:
            return super().own_bytes()
        rows, columns = self.matrix.out_features, self.matrix.in_features
        return 2 * rows * columns + (4 * rows if self.matrix.bias else 0)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return multiply(x, self.weight, self.bias)
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)
        return out.to(x.dtype)


class PackedScheme(PlainScheme):
    """float32 weights in oneDNN's blocked layout, which replaces the plain one."""

    packed: Tensor

    def finish(self) -> None:
        try:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACK_ROWS)
        except NotImplementedError:  # older torch wants a tensor of its mkldnn layout
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.to_mkldnn(), PACK_ROWS)
        del self.weight

    def own_bytes(self) -> int:
        rows, columns = self.matrix.out_features, self.matrix.in_features
        return 4 * rows * columns + (4 * rows if self.matrix.bias else 0)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def has_onednn() -> bool:
    """Whether this torch was built with oneDNN."""
    available: Callable[[], bool] = torch.backends.mkldnn.is_available
    return available()


def has_fbgemm() -> bool:
    """Whether this torch was built with FBGEMM, and runs where that does."""
    return "fbgemm" in torch.backends.quantized.supported_engines


@functools.cache
def widens_half(dtype: torch.dtype) -> bool:
    """Whether FBGEMM is here and better than torch's own 16-bit product on this processor."""
    if dtype == torch.float32 or not has_fbgemm():
        return False
    if not has_onednn():
        return True
    ops = torch.ops.mkldnn
    return not (ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())
