"""Device time of an op: many calls in one CUDA graph, over inputs that rotate beyond the L2, median
of several replays.
"""

import statistics
from collections.abc import Callable, Sequence

import torch

L2_BYTES = 50 * 2**20  # H100 and H200
BANDWIDTH = 3.10e12  # bytes/s that a large copy reaches on an H100 (measured), and its bf16 arithmetic on wgmma
ARITHMETIC = 7.9e14


def rotations(bytes_a_call: int) -> int:
    """How many input sets make the cache forget a set before its turn comes again; at most 64."""
    return max(1, min(64, -(-3 * L2_BYTES // bytes_a_call)))


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median device time of one call. `calls` do the same on different inputs; they are captured in
    turn.
    """
    for call in calls[:2]:
        call()  # compiles
    torch.cuda.synchronize()
    repeats = max(1, 64 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    return milliseconds(graph, 7) * 1e3 / (repeats * len(calls))


def milliseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Median device time of a graph's replay."""
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
