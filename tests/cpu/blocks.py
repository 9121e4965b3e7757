"""Random blocks of every format of GGUF files, and their numbers by the `gguf` package."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from octavo import _core

PLAIN = ("F32", "F16", "BF16")
SMALL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
LARGE = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FORMATS = (*PLAIN, *SMALL, *LARGE)

# Where a block has float16 scales; the package cannot make K-quants, so their blocks are made here.
SCALES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "IQ4_NL": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def numbers_of_block(kind: str) -> int:
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0])


def make(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[_core.BlockMatrix, Tensor]:
    """A matrix of valid blocks whose every byte is random, and its numbers [rows, columns]."""
    random = np.random.default_rng(seed)
    quantization = gguf.GGMLQuantizationType[kind]
    size, num_bytes = gguf.GGML_QUANT_SIZES[quantization]
    if kind in PLAIN:
        raw = gguf.quantize(random.normal(size=(rows, columns)).astype(np.float32), quantization)
    else:
        raw = random.integers(0, 256, size=(rows, columns // size, num_bytes), dtype=np.uint8)
        for place in SCALES[kind]:
            scales = random.normal(scale=0.05, size=raw.shape[:2]).astype(np.float16)
            raw[:, :, place : place + 2] = scales[..., None].view(np.uint8)
        raw = raw.reshape(rows, -1)
    values = gguf.dequantize(raw, quantization)
    data = np.ascontiguousarray(raw).tobytes()
    return _core.BlockMatrix.from_bytes(kind, rows, columns, data), torch.from_numpy(np.array(values, np.float32))
