"""`python -m bench.kernels.sweep_linear int4|fp8 MODEL [M ...]`: plans of linears tried one by one,
the best marked.

Up to 64 tokens a plan is timed within a layer's four linears, where launches overlap: the time is
the layer's. Beyond, alone: the time is the product's. What wins goes into the op's table by hand.
Candidates are first compiled side by side (`--compile`, a process each).
"""

import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from bench.kernels.linear import MODELS, int4_weight
from bench.kernels.linear_8bit import random_weight
from bench.kernels.timing import milliseconds, rotations
from torch import Tensor

from octavo.kernels.linear import eight_bit, int4
from octavo.kernels.linear.eight_bit_table import Config, Library, Matmul, Tile, Warps
from octavo.kernels.linear.int4_table import Int4Plan
from octavo.kernels.pointwise import quantize

TOKENS = (1, 32, 64, 128, 256, 384, 512, 768, 1024, 1280, 2048, 4096)
IN_SEQUENCE = 64  # tokens
LIBRARY = Int4Plan("library", 0, 0, 0, 0, 0)  # dequantise, then cuBLAS


def int4_plans(tokens: int) -> Iterator[Int4Plan]:
    if tokens == 1:
        for splits, ahead, launch in itertools.product((1, 2, 4, 8), (4, 6), ("late", "plain")):
            yield Int4Plan("tiles", 4, 16, splits, 4, ahead, 2, launch)
        for tiles, splits, warps in itertools.product((1, 2), (1, 2), (4, 8)):
            yield Int4Plan("slices", tiles, 8, splits, warps, 4, launch="late")
    elif tokens <= 32:
        for splits, ahead, launch in itertools.product((1, 2, 4), (3, 4, 6), ("late", "plain")):
            yield Int4Plan("tiles", 4, 32, splits, 4, ahead, 2, launch)
        for splits, launch in itertools.product((1, 2), ("late", "plain")):
            yield Int4Plan("tiles", 8, 32, splits, 8, 4, 2, launch)
    elif tokens <= 64:
        for splits, ahead in itertools.product((1, 2, 4), (3, 4)):
            yield Int4Plan("tiles", 4, 64, splits, 4, ahead, 2)
        for splits in (1, 2):
            yield Int4Plan("tiles", 8, 64, splits, 8, 3, 2)
        for splits in (1, 4):
            yield Int4Plan("gluon", 8, 64, splits, 12, 8)
    else:
        if tokens <= 384:
            yield Int4Plan("tiles", 4, 64, 2, 4, 4, 2)
            yield Int4Plan("tiles", 8, 64, 1, 8, 4, 2)
        for splits in (1, 2, 4):
            yield Int4Plan("gluon", 8, 128, splits, 12, 8)
            if tokens > 128:
                yield Int4Plan("gluon", 8, 256, splits, 12, 4)
        if tokens >= 1024:
            yield LIBRARY


def fp8_plans(tokens: int) -> Iterator[Config]:
    if tokens <= 8:
        for block_n, block_k, warps, stages in itertools.product((16, 32), (512, 1024), (2, 4), (3, 4, 5)):
            yield Warps(8, block_n, block_k, warps, stages, True)
    elif tokens <= 64:
        m = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
        for block_k, stages, parts in itertools.product((128, 256, 512), (3, 4, 5), (1, 2)):
            yield Tile(m, 64, block_k, 4, stages, parts, True)
    else:
        for block_m, block_n, warps, stages in ((128, 64, 4, 5), (128, 128, 8, 4), (128, 128, 4, 3), (64, 128, 4, 4)):
            yield Matmul(block_m, block_n, 128, warps, stages, True)
        yield Library()


def int4_call(plan: Int4Plan, x: Tensor, weight: Any) -> None:
    if plan == LIBRARY:
        torch.nn.functional.linear(x, int4.dequantise(weight))
        return
    out = torch.empty((x.shape[0], weight.rows), dtype=x.dtype, device=x.device)
    int4.launch(x, weight, None, out, plan)


def fp8_call(plan: Config, x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor]) -> None:
    eight_bit._linear(plan, *x, *weight, torch.bfloat16, None)


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize.quantize_rows(x, torch.float8_e4m3fn)


# kind -> (candidates, makes a weight, makes x of bf16 rows, one product)
KINDS: dict[str, tuple[Callable, Callable, Callable, Callable]] = {
    "int4": (int4_plans, int4_weight, lambda x: x, int4_call),
    "fp8": (fp8_plans, partial(random_weight, dtype=torch.float8_e4m3fn), fp8_rows, fp8_call),
}


def microseconds(calls: list[Callable[[], None]]) -> float:
    """Median device time of all calls once, in a graph of at least 30 ms where that is few calls:
    shorter ones run at clocks that a step does not have.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    once = torch.cuda.CUDAGraph()
    with torch.cuda.graph(once):
        for call in calls:
            call()
    once.replay()
    repeats = max(2, int(30 / milliseconds(once, 3)))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(3):
        start.record()
        for _ in range(repeats):
            once.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / repeats * 1e3)
    return sorted(times)[1]


def compile_share(kind: str, work: list[tuple[tuple[int, int], int, Any]]) -> None:
    _, make, make_x, product = KINDS[kind]
    weights: dict[tuple[int, int], Any] = {}
    for shape, tokens, plan in work:
        weight = weights.setdefault(shape, make(*shape))
        x = make_x(torch.randn((tokens, shape[1]), device="cuda").bfloat16())
        try:
            product(plan, x, weight)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{kind} {shape} x {tokens} {plan}: {type(error).__name__} {str(error)[:200]}", flush=True)


def compile_all(kind: str, models: list[str], all_tokens: list[int], processes: int = 14) -> None:
    candidates = KINDS[kind][0]
    # One shape an inner size: variants do not depend on the outputs.
    shapes = {shape[1]: shape for model in models for shape in MODELS[model][0]}
    work: dict[tuple[int, Any], tuple[tuple[int, int], int, Any]] = {}
    for shape, tokens in itertools.product(shapes.values(), all_tokens):
        for plan in candidates(tokens):
            is_gluon = isinstance(plan, Int4Plan) and plan.kernel == "gluon"
            same = replace(plan, splits=1) if is_gluon else plan
            work.setdefault((shape[1], same), (shape, tokens, plan))
    shares = [list(work.values())[index::processes] for index in range(processes)]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_share, args=(kind, share)) for share in shares if share]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def sweep(kind: str, model: str, all_tokens: list[int]) -> None:
    candidates, make, make_x, product = KINDS[kind]
    shapes, _ = MODELS[model]
    size = sum(rows * depth for rows, depth in shapes) // (2 if kind == "int4" else 1)
    layers = [[make(*shape) for shape in shapes] for _ in range(rotations(size) + 1)]
    for tokens in all_tokens:
        inputs = {depth: make_x(torch.randn((tokens, depth), device="cuda").bfloat16()) for _, depth in shapes}
        plans = list(candidates(tokens))
        best: list[Any] = [plans[0]] * len(shapes)
        for at, (rows, depth) in enumerate(shapes):
            results: list[tuple[float, Any]] = []
            for plan in plans:
                calls = []
                for layer in layers:
                    for index, (_, inner) in enumerate(shapes):
                        if tokens <= IN_SEQUENCE or index == at:
                            chosen = plan if index == at else best[index]
                            calls.append(partial(product, chosen, inputs[inner], layer[index]))
                try:
                    results.append((microseconds(calls) / len(layers), plan))
                except Exception as error:  # a plan that does not fit the card is a result too
                    print(f"  {plan}: {type(error).__name__}", flush=True)
                    torch.cuda.synchronize()
            results.sort(key=lambda result: result[0])
            best[at] = results[0][1]
            rate = 2e-6 * rows * depth * tokens / results[0][0]
            print(f"{kind} {model} {rows} x {depth}, {tokens} tokens ({rate:.0f} TFLOP/s):", flush=True)
            for time, plan in results[:6]:
                print(f"    {time:9.2f} us {_short(plan)}", flush=True)
    torch.cuda.empty_cache()


def _short(plan: Any) -> str:
    return str(tuple(plan)) if isinstance(plan, tuple) else " ".join(str(value) for value in vars(plan).values())


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    kind, models = words[0], [word for word in words if word in MODELS]
    all_tokens = [int(word) for word in words if word.isdigit()] or list(TOKENS)
    if "--compile" in sys.argv:
        compile_all(kind, models, all_tokens)
        return
    for model in models:
        sweep(kind, model, all_tokens)


if __name__ == "__main__":
    main()
