"""`python -m bench.kernels.linear_8bit [name part ...]`: one step's linears with 8-bit weights,
cold, in milliseconds (w8a16, w8a8, and int8 grouped, with a scale a group); `... quant`: the ops
that quantise, in microseconds.

A step is the four fused linears of a layer, one after the other in one CUDA graph, times the layers
of the model. Peers are vLLM 0.26's CUTLASS products on an H100, activations already quantised,
measured once; `torch` is `torch._scaled_mm` with a scale a row in the same process.
"""

import itertools
import sys
from collections.abc import Callable
from functools import partial

import torch
import triton
from bench.kernels.timing import BANDWIDTH, microseconds, rotations
from torch import Tensor

from octavo.kernels.linear import eight_bit, eight_bit_grouped
from octavo.kernels.pointwise import activation, norm, quantize
from octavo.kernels.reference.eight_bit import LARGEST

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048)
MODELS = {
    "7b": (32, [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]),
    "8b": (32, [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]),
    "70b": (80, [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)]),
}
PEERS = {  # milliseconds at 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024 tokens
    ("7b", "fp8"): (2.69, 2.73, 2.72, 2.75, 2.76, 3.06, 2.85, 3.12, 3.84, 9.74),
    ("7b", "int8"): (2.84, 2.76, 2.88, 2.84, 2.91, 2.88, 2.86, 3.10, 3.86, 9.84),
    ("8b", "fp8"): (2.86, 2.85, 2.88, 2.90, 2.91, 3.06, 3.00, 3.35, 4.12, 10.53),
    ("8b", "int8"): (2.92, 2.92, 2.93, 2.92, 2.95, 2.96, 3.00, 3.29, 4.12, 10.69),
    ("70b", "fp8"): (23.7, 23.7, 23.9, 24.0, 24.1, 24.9, 25.0, 26.5, 30.4, 103),
    ("70b", "int8"): (24.6, 24.6, 24.9, 24.7, 24.9, 25.0, 25.1, 26.3, 30.0, 103),
}
GOALS = {
    "7b": {1: 2.25, 2: 2.25, 4: 2.25, 8: 2.25, 16: 2.3, 32: 2.4, 64: 2.5, 128: 2.9, 256: 3.6},
    "8b": {1: 2.45},
    "70b": {1: 22.9},
}
GROUP = 128  # of `grouped`
EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def random_weight(channels: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantised normal weights, in pieces: the fp32 of 470 million would not be small."""
    pieces = [quantize.quantize_rows(torch.randn(1024, size, device="cuda"), dtype) for _ in range(channels // 1024)]
    rest = quantize.quantize_rows(torch.randn(channels % 1024, size, device="cuda"), dtype)
    return torch.cat([q for q, _ in pieces] + [rest[0]]), torch.cat([scale for _, scale in pieces] + [rest[1]])


def layer_calls(weights: list[tuple[Tensor, Tensor]], tokens: int, kind: str, library: bool) -> Callable[[], object]:
    """One layer's linears on random activations."""
    linears: list[Callable[[], object]] = []
    for weight, scale in weights:
        x = torch.randn(tokens, weight.shape[1], device="cuda").bfloat16()
        if kind == "grouped":
            groups = scale.unsqueeze(1).expand(-1, weight.shape[1] // GROUP).contiguous()
            linears.append(lambda a=(x, weight, groups): eight_bit_grouped.linear_w8a16_grouped(*a))
            continue
        if kind == "w8a16":
            linears.append(lambda a=(x, weight, scale): eight_bit.linear_w8a16(*a))
            continue
        q, x_scale = quantize.quantize_rows(x, weight.dtype)
        if library:
            arguments = (q, weight.t(), x_scale.unsqueeze(1), scale.unsqueeze(0))
            linears.append(lambda a=arguments: torch._scaled_mm(*a, out_dtype=torch.bfloat16))
        else:
            linears.append(lambda a=(q, x_scale, weight, scale): eight_bit.linear_w8a8(*a, torch.bfloat16))

    def layer() -> None:
        for linear in linears:
            linear()

    return layer


def folded() -> None:
    """Norm and activation that quantise as they go, beside the same that do not."""
    print(f"{'op':36} {'us':>8} {'TB/s':>6} {'without':>8} {'goal':>6}")
    for tokens, (name, dtype) in itertools.product((1, 32, 256, 2048), EIGHT_BITS.items()):
        goals = (2.0, 2.2) if tokens == 1 else (None, None)
        for hidden in (4096, 8192):
            weight = torch.randn(hidden, device="cuda").bfloat16()
            size = tokens * hidden * 7
            sets = [torch.randn(2, tokens, hidden, device="cuda").bfloat16() for _ in range(rotations(size))]
            ours = microseconds([partial(norm.add_rms_norm_quant, *pair, weight, 1e-5, dtype) for pair in sets])
            plain = microseconds([partial(norm.add_rms_norm, *pair, weight, 1e-5) for pair in sets])
            report(f"add_rms_norm_quant {name} {tokens} x {hidden}", ours, size, plain, goals[0])
            size = tokens * hidden * 3
            rows = [torch.randn(tokens, hidden, device="cuda").bfloat16() for _ in range(rotations(size))]
            ours = microseconds([partial(quantize.quantize_rows, x, dtype) for x in rows])
            report(f"quantize_rows {name} {tokens} x {hidden}", ours, size, None, None)
            scale = torch.full((1,), 3 / LARGEST[dtype], device="cuda")
            ours = microseconds([partial(quantize.quantize_static, x, scale, dtype) for x in rows])
            report(f"quantize_static {name} {tokens} x {hidden}", ours, size, None, None)
        for inner in (11008, 28672):
            size = tokens * inner * 5
            gated = [torch.randn(tokens, 2 * inner, device="cuda").bfloat16() for _ in range(rotations(size))]
            ours = microseconds([partial(activation.silu_and_mul_quant, x, dtype) for x in gated])
            plain = microseconds([partial(activation.silu_and_mul, x) for x in gated])
            report(f"silu_and_mul_quant {name} {tokens} x {inner}", ours, size, plain, goals[1])
            ours = microseconds([partial(activation.gelu_tanh_and_mul_quant, x, dtype) for x in gated])
            plain = microseconds([partial(activation.gelu_tanh_and_mul, x) for x in gated])
            report(f"gelu_tanh_and_mul_quant {name} {tokens} x {inner}", ours, size, plain, None)


def report(name: str, ours: float, size: int, plain: float | None, goal: float | None) -> None:
    """One row of `folded`."""
    met = "" if goal is None else f"{goal:6.1f} {'met' if ours <= goal else 'missed'}"
    without = f"{'-':>8}" if plain is None else f"{plain:8.2f}"
    print(f"{name:36} {ours:8.2f} {size / ours * 1e-6:6.2f} {without}", met, flush=True)


def main() -> None:
    wanted = sys.argv[1:]
    if wanted == ["quant"]:
        folded()
        return
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; milliseconds a step"
    )
    print(
        f"{'linears':20} {'tokens':>6} {'ours':>8} {'of limit':>8} {'TFLOP/s':>8} {'torch':>8} {'peer':>8} {'goal':>8}"
    )
    for model, (layers, shapes) in MODELS.items():
        for name, dtype in EIGHT_BITS.items():
            kinds = ("w8a16", "w8a8", "grouped") if name == "int8" else ("w8a16", "w8a8")
            if not any(all(part in f"{model} {name} {kind}" for part in wanted) for kind in kinds):
                continue
            weights = [random_weight(*shape, dtype) for shape in shapes]
            size = sum(weight.numel() for weight, _ in weights)
            for kind in kinds:
                if not all(part in f"{model} {name} {kind}" for part in wanted):
                    continue
                for index, tokens in enumerate(TOKENS):
                    ours = microseconds([layer_calls(weights, tokens, kind, False)]) * layers * 1e-3
                    plain = None
                    if kind == "w8a8" and name == "fp8":
                        plain = microseconds([layer_calls(weights, tokens, kind, True)]) * layers * 1e-3
                    peer = PEERS[model, name][index] if index < 10 else None
                    goal = GOALS[model].get(tokens)
                    share = size * layers / BANDWIDTH * 1e3 / ours
                    rate = 2 * size * layers * tokens / ours * 1e-9
                    columns = [f"{value:8.2f}" if value is not None else f"{'-':>8}" for value in (plain, peer, goal)]
                    met = "" if goal is None else " met" if ours <= goal else " missed"
                    row = f"{model + ' ' + name + ' ' + kind:16} {tokens:6} {ours:8.3f} {share:8.0%} {rate:8.0f}"
                    print(row, *columns, met, flush=True)
            del weights
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
