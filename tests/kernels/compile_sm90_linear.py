"""The linears with 16-bit and int4 weights, compiled for an H100 without one (`compile_sm90.py`):
all plans.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from tests.kernels.compile_sm90 import TYPES, ints, meta, report

from octavo.kernels.linear import dense, int4
from octavo.kernels.linear.dense_table import DENSE_PLANS, DensePlan
from octavo.kernels.linear.int4_layout import Int4Weight
from octavo.kernels.linear.int4_table import INT4_GLUON_PLANS, INT4_PLANS, Int4Plan


def int4_weight(rows: int, depth: int, group: int, zeros: bool, dtype: torch.dtype) -> Int4Weight:
    groups = (rows // 16, depth // group, 8)
    zero_pairs = meta(*groups, dtype=torch.int16) if zeros else None
    return Int4Weight(ints(rows // 16, depth // 64, 128), ints(*groups), zero_pairs, None, group, dtype)


def int4_case(plan: Int4Plan, depth: int, group: int, zeros: bool, dtype: torch.dtype) -> None:
    weight = int4_weight(4096, depth, group, zeros, dtype)
    x, out = meta(plan.tokens, depth, dtype=dtype), meta(plan.tokens, 4096, dtype=dtype)
    int4.launch(x, weight, None, out, plan)


def dense_case(plan: DensePlan, depth: int, dtype: torch.dtype) -> None:
    x, out = meta(plan.tokens, depth, dtype=dtype), meta(plan.tokens, 4096, dtype=dtype)
    dense.launch(x, meta(4096, depth, dtype=dtype), None, out, plan)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    bf16, fp16 = torch.bfloat16, torch.float16
    alike = {dataclasses.replace(plan, splits=min(2, plan.splits)) for plan in INT4_PLANS}
    for plan in sorted(alike, key=str):
        yield f"int4 {plan} 4096 g128 bf16", functools.partial(int4_case, plan, 4096, 128, False, bf16)
    for plan in (INT4_PLANS[0], INT4_PLANS[-1]):
        for group, zeros, dtype in ((32, True, bf16), (64, False, fp16), (128, True, fp16), (11008, True, bf16)):
            name = f"int4 {plan} 11008 g{group}{' zeros' * zeros} {TYPES[dtype]}"
            yield name, functools.partial(int4_case, plan, 11008, group, zeros, dtype)
    for plan in INT4_GLUON_PLANS:
        yield f"int4 {plan} 4096 g128 bf16", functools.partial(int4_case, plan, 4096, 128, False, bf16)
    for group, dtype in ((32, bf16), (11008, fp16)):
        plan = INT4_GLUON_PLANS[0]
        name = f"int4 {plan} 11008 g{group} zeros {TYPES[dtype]}"
        yield name, functools.partial(int4_case, plan, 11008, group, True, dtype)
    for group in (32, 128):
        weight = int4_weight(4096, 4096, group, True, bf16)
        yield f"int4 dequantise g{group}", functools.partial(int4.dequantise, weight)
    for plan in DENSE_PLANS:
        yield f"dense {plan} 11008", functools.partial(dense_case, plan, 11008, bf16)


def main() -> None:
    report(cases())


if __name__ == "__main__":
    main()
