"""Rows over quantised pages, for the attention tests."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.kernels.reference import layers as reference

KV_DTYPES = [
    pytest.param(dtype, id=name)
    for dtype, name in ((torch.float8_e4m3fn, "fp8"), (torch.int8, "int8"), (torch.uint8, "int4"))
]


def quantise_rows(rows: Any, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """`make_rows`' fp32 rows with codes for a cache, and their scales: NaN where no key is, as the
    fp8 codes are.
    """
    unused = rows.kv_cache.isnan().any(-1)
    codes, scales = reference.quantise_kv(rows.kv_cache.nan_to_num(0.0), dtype)
    if dtype == torch.float8_e4m3fn:
        codes.view(torch.uint8)[unused] = 0x7F
    scales[unused] = float("nan")
    return replace(rows, kv_cache=codes), scales
