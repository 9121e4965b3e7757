"""`python -m bench.kernels.linear [7b | 8b | 70b | int4 | bf16 | M ...]`: the linear layers of a
whole decode step.

One layer's four fused linears on weights of their own, repeated over enough copies that the L2
forgets them, in one CUDA graph and scaled to the model's layers: milliseconds a step, the rate at
which weights are read (or the arithmetic), the share of the card's limit, the same by cuBLAS in
bf16, the best peer (`PEERS`) and the goal.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from bench.kernels.timing import ARITHMETIC, BANDWIDTH, microseconds, rotations
from torch import Tensor

from octavo.kernels.linear import dense, dense_table, int4, int4_table
from octavo.kernels.linear.int4_layout import DEPTH, ROWS, Int4Weight

# [outputs, inputs] of qkv, o, gate_up, down; layers
MODELS = {
    "7b": ([(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)], 32),
    "8b": ([(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)], 32),
    "70b": ([(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)], 80),
}
TOKENS = (1, 2, 8, 16, 32, 64, 128, 256, 1024)
# Milliseconds a step on an H100: for int4 the better of Marlin and Machete (vLLM 0.26), for bf16
# cuBLAS.
PEERS = {
    ("7b", "int4"): (2.14, None, 2.14, 2.24, 2.54, 3.17, 3.95, 5.90, 18.05),
    ("8b", "int4"): (2.29, None, 2.30, 2.41, 2.72, 3.75, 4.26, 6.17, 19.59),
    ("70b", "int4"): (15.11, None, 15.25, 15.87, 17.77, 22.3, 28.8, 48.7, 177),
    ("7b", "bf16"): (5.02, None, 5.02, 4.97, 5.03, 5.18, 5.35, 5.89, 17.12),
    ("8b", "bf16"): (5.18, None, 5.22, 5.27, 5.29, 5.38, 5.70, 6.44, 18.24),
    ("70b", "bf16"): (48.1, None, 48.4, 48.6, 49.0, 49.7, 50.7, 52.9, 176),
}
GOALS = {
    ("7b", "int4"): (1.45, None, 1.45, 1.6, 1.9, 2.4, 3.5, 5.6, 17.63),
    ("7b", "bf16"): (4.35, None, 4.35, 4.45, 4.6, 4.8, None, None, None),
    ("8b", "int4"): (1.55,),
    ("70b", "int4"): (12.6,),
    ("70b", "bf16"): (46,),
}
GROUP = 128


def int4_weight(rows: int, depth: int) -> Int4Weight:
    """Random numbers and scales, symmetric."""
    words = torch.randint(-(2**31), 2**31, (rows // ROWS, depth // DEPTH, 128), device="cuda").int()
    scales = (torch.rand(rows // ROWS, depth // GROUP, 8, 2, device="cuda") / depth**0.5 + 1e-3).bfloat16()
    return Int4Weight(words, scales.view(torch.int32).squeeze(-1), None, None, GROUP, torch.bfloat16)


def bf16_weight(rows: int, depth: int) -> Tensor:
    return torch.randn((rows, depth), dtype=torch.bfloat16, device="cuda")


def step(linear: Callable, layers: list[list], tokens: int, num_layers: int) -> float:
    """Milliseconds of a step: `layers` holds the weights of some copies of a layer."""
    inputs = {w.shape[1] if isinstance(w, Tensor) else w.depth for layer in layers for w in layer}
    x = {depth: torch.randn((tokens, depth), dtype=torch.bfloat16, device="cuda") for depth in inputs}
    calls = [
        lambda w=w: linear(x[w.shape[1] if isinstance(w, Tensor) else w.depth], w) for layer in layers for w in layer
    ]
    return microseconds(calls) * 4 * num_layers / 1e3


def main() -> None:
    wanted = sys.argv[1:]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; ms a step")
    print(
        f"{'model':6}{'weights':8}{'M':>5} {'ours':>8} {'rate':>14} {'limit':>6} {'cuBLAS':>8} {'peer':>8} {'goal':>8}"
    )
    kinds = {"int4": (int4_weight, int4.int4_linear), "bf16": (bf16_weight, dense.linear)}
    for model, (shapes, num_layers) in MODELS.items():
        if set(wanted) & set(MODELS) and model not in wanted:
            continue
        count = sum(rows * depth for rows, depth in shapes)
        plain = [[bf16_weight(*shape) for shape in shapes] for _ in range(rotations(count * 2) + 1)]
        cublas = {tokens: step(F.linear, plain, tokens, num_layers) for tokens in TOKENS if _is_wanted(tokens, wanted)}
        for kind, (make, linear) in kinds.items():
            if set(wanted) & set(kinds) and kind not in wanted:
                continue
            layers = (
                plain
                if kind == "bf16"
                else [[make(*shape) for shape in shapes] for _ in range(rotations(count // 2) + 1)]
            )
            size = sum(w.nbytes for w in layers[0]) * num_layers
            for index, tokens in enumerate(TOKENS):
                if tokens not in cublas:
                    continue
                ours = step(linear, layers, tokens, num_layers)
                flops = 2 * count * num_layers * tokens
                if flops / ARITHMETIC > size / BANDWIDTH:
                    rate, share = f"{flops / ours / 1e9:7.0f} TFLOP/s", flops / ours * 1e3 / ARITHMETIC
                else:
                    rate, share = f"{size / ours / 1e9:9.2f} TB/s", size / ours * 1e3 / BANDWIDTH
                goals = GOALS.get((model, kind), ())
                goal = goals[index] if index < len(goals) else None
                columns = [
                    f"{figure:8.2f}" if figure is not None else f"{'-':>8}"
                    for figure in (cublas[tokens], PEERS[model, kind][index], goal)
                ]
                met = "" if goal is None else " met" if ours <= goal else " missed"
                print(f"{model:6}{kind:8}{tokens:5} {ours:8.3f} {rate:>14} {share:6.0%}", *columns, met, flush=True)
        del plain, layers
        torch.cuda.empty_cache()
    print(*int4_table.lines(), *dense_table.lines(), sep="\n")


def _is_wanted(tokens: int, wanted: list[str]) -> bool:
    numbers = [int(word) for word in wanted if word.isdigit()]
    return not numbers or tokens in numbers


if __name__ == "__main__":
    main()
