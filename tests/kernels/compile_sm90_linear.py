"""Compiles every variant of the linear layers for an H100 without one, as `compile_sm90.py` does the model's ops."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tests.kernels.compile_sm90 import TYPES, compile_launch, ints, meta
from triton.runtime.jit import JITFunction

from octavo.kernels import linear_int4
from octavo.kernels.int4_layout import Int4Weight
from octavo.kernels.linear_table import Int4Plan

TYPES[torch.int16] = "i16"


def int4_weight(rows: int, depth: int, group: int, zeros: bool, dtype: torch.dtype) -> Int4Weight:
    groups = (rows // 16, depth // group, 8)
    return Int4Weight(
        ints(rows // 16, depth // 64, 128), ints(*groups), meta(*groups, dtype=torch.int16) if zeros else None, None, group, dtype
    )
