"""How a CPU multiplies by a weight matrix, chosen by dtype and by what the processor can do.

Measured on 2 cores with AVX2 and no more (torch 2.15, the gate-up matrix of SmolLM2, 576 -> 3072, weights cold):

| rows | bf16 `F.linear` | bf16 upcast | fp32 `F.linear` | fp32 packed |
| --- | --- | --- | --- | --- |
| 1  | 0.24 ms | 0.40 ms | 0.56 ms | 0.43 ms |
| 4  | 0.88 ms | 0.99 ms | 1.19 ms | 0.44 ms |
| 8  | 1.56 ms | 0.93 ms | 0.88 ms | 0.50 ms |
| 32 | 6.12 ms | 1.75 ms | 1.57 ms | 1.03 ms |
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

UPCAST_ROWS = 8  # from here on one conversion of the weights costs less than torch's 16-bit loop over the rows
CHUNK_ELEMENTS = 1 << 21  # of weights converted at once: 8 MB in float32, near the caches and small beside the weights
PACK_ROWS = (
    32  # the number of rows that packing is told to expect: no slower at 1 than a packing for 1, twice as fast at 2
)


class UpcastMethod:
    """16-bit weights where the processor has no 16-bit product: a few rows stream them, more share a float32 copy."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.chunk_rows = max(1, CHUNK_ELEMENTS // weight.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if x.shape[0] < UPCAST_ROWS:
            return F.linear(x, weight, bias)
        wide = x.float()
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
        for start in range(0, weight.shape[0], self.chunk_rows):
            rows = slice(start, start + self.chunk_rows)
            out[:, rows] = F.linear(wide, weight[rows].float(), None if bias is None else bias[rows].float())
        return out

    def tensors(self) -> Iterable[Tensor]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


class PackedMethod:
    """float32 weights in oneDNN's blocked layout, which replaces the plain one."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias = bias
        try:
            self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        except NotImplementedError:  # older torch wants a tensor of its mkldnn layout
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to_mkldnn(), PACK_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out

    def tensors(self) -> Iterable[Tensor]:
        return (self.packed,) if self.bias is None else (self.packed, self.bias)


def has_onednn() -> bool:
    """Whether this torch was built with oneDNN."""
    available: Callable[[], bool] = torch.backends.mkldnn.is_available
    return available()


def multiplies_16_bit(dtype: torch.dtype) -> bool:
    """Whether this processor has a 16-bit matrix product worth the name (AVX-512 or AMX, through oneDNN)."""
    if not has_onednn():
        return False
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())
