"""`python -m bench.kernels.step [name part ...]`: a whole decode step as one CUDA graph of the
kernels alone.

Embedding, all layers, final norm, head and greedy sampling with random weights, 256 tokens of
context in paged KV of bf16: what an engine around these kernels may not lose. Beside it vLLM 0.26's
whole token at that context on an H100, measured once, and the goal.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
from bench.kernels.timing import BANDWIDTH, milliseconds
from tests.kernels.plan_bytes import Enter, Row, write_plan
from torch import Tensor

from octavo.engine.step_buffers import DeviceState, StepInputs
from octavo.kernels.attention import decode, rope
from octavo.kernels.linear import dense
from octavo.kernels.pointwise import activation, norm
from octavo.kernels.step import prepare, sample

BLOCK_SIZE = 64
CONTEXT = 256
DIM = 128
EPS = 1e-5
WEIGHT_BYTES = 20e9  # what layers may take; beyond it they share storage, in turns far longer than the L2


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    layers: int
    vocab: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """K and N of a layer's linears: qkv, out, gate and up, down."""
        attended = self.heads * DIM
        return [
            (self.hidden, attended + 2 * self.kv_heads * DIM),
            (attended, self.hidden),
            (self.hidden, 2 * self.inner),
            (self.inner, self.hidden),
        ]

    def bytes(self, rows: int, bytes_a_weight: float) -> float:
        """What a step reads: weights, head and KV."""
        weights = self.layers * sum(size * channels for size, channels in self.linears) * bytes_a_weight
        kv = rows * self.layers * CONTEXT * 2 * self.kv_heads * DIM * 2
        return weights + self.vocab * self.hidden * 2 + kv


SHAPES = {
    "7B": Shape("7B", 4096, 32, 32, 11008, 32, 32000),
    "8B": Shape("8B", 4096, 32, 8, 14336, 32, 128256),
    "70B": Shape("70B", 8192, 64, 8, 28672, 80, 32000),
}

Linear = Callable[[Tensor], Tensor]


def bf16(size: int, channels: int) -> Linear:
    weight = torch.empty((channels, size), dtype=torch.bfloat16, device="cuda").normal_(std=size**-0.5)
    return partial(dense.linear, weight=weight)


def int4(size: int, channels: int) -> Linear:
    """Groups of 128, no zero points."""
    layout = importlib.import_module("octavo.kernels.linear.int4_layout")
    numbers = torch.randint(0, 16, (channels, size), dtype=torch.uint8, device="cuda")
    scales = torch.rand((channels, size // 128), device="cuda") * (size**-0.5 / 4)
    weight = layout.pack(numbers, scales.bfloat16(), None)
    return partial(importlib.import_module("octavo.kernels.linear.int4").int4_linear, weight=weight)


def fp8(size: int, channels: int) -> Linear:
    """Weights in fp8 by channel, activations in bf16."""
    weight = torch.randn((channels, size), device="cuda").to(torch.float8_e4m3fn)
    scale = torch.full((channels,), size**-0.5, device="cuda")
    linear = importlib.import_module("octavo.kernels.linear.eight_bit").linear_w8a16
    return partial(linear, weight=weight, weight_scale=scale)


# Format -> (bytes a weight, makes a linear of K and N)
FORMATS: dict[str, tuple[float, Callable[[int, int], Linear]]] = {
    "bf16": (2.0, bf16),
    "fp8": (1.0, fp8),
    "int4": (0.5 + 2 / 128, int4),
}

# (shape, format, rows) -> vLLM's milliseconds a token, goal
TARGETS: dict[tuple[str, str, int], tuple[float | None, float | None]] = {
    ("7B", "bf16", 1): (6.06, 4.75),
    ("7B", "bf16", 32): (None, 6.6),
    ("8B", "bf16", 1): (6.6, 5.1),
    ("8B", "bf16", 32): (None, None),
    ("7B", "int4", 1): (3.54, 2.1),
    ("7B", "int4", 32): (None, 4.3),
    ("8B", "int4", 1): (3.87, 2.3),
    ("8B", "fp8", 1): (4.51, 3.2),
    ("70B", "bf16", 1): (None, None),
    ("70B", "int4", 1): (21.8, 14),
}


class Step:
    """The tensors of a step."""

    def __init__(self, shape: Shape, rows: int, linear: Callable[[int, int], Linear], bytes_a_weight: float) -> None:
        device, self.shape, self.rows = torch.device("cuda"), shape, rows
        own = sum(size * channels for size, channels in shape.linears) * bytes_a_weight
        stored = min(shape.layers, int(WEIGHT_BYTES // own))
        layers = [[linear(size, channels) for size, channels in shape.linears] for _ in range(stored)]
        self.layers = [layers[layer % stored] for layer in range(shape.layers)]
        self.embedding = torch.empty((shape.vocab, shape.hidden), dtype=torch.bfloat16, device=device).normal_()
        self.norm = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
        self.head = bf16(shape.hidden, shape.vocab)
        blocks_a_row = CONTEXT // BLOCK_SIZE
        cache = (shape.layers, rows * blocks_a_row, 2, shape.kv_heads, BLOCK_SIZE, DIM)
        self.caches = torch.empty(cache, dtype=torch.bfloat16, device=device).normal_()

        self.state = DeviceState(
            max_num_seqs=rows, num_groups=1, max_blocks=blocks_a_row, vocab_size=shape.vocab, device=device
        )
        self.inputs = StepInputs(max_tokens=rows, max_rows=rows, num_groups=1, device=device)
        self.plan, self.data = write_plan(
            [Row(slot) for slot in range(rows)],
            enters=[Enter(slot, computed_len=CONTEXT - 1) for slot in range(rows)],
            all_greedy=True,
            device="cuda",
        )
        blocks = torch.randperm(rows * blocks_a_row, device=device)
        self.state.block_table[0, :rows] = blocks.view(rows, blocks_a_row)
        prepare.prepare(self.plan, self.data, self.state, self.inputs, block_size=BLOCK_SIZE)
        self.rotary = torch.rand((CONTEXT, DIM), device=device)
        self.result = torch.empty(rows * self.plan.result_width, dtype=torch.int32, device=device)

    def run(self) -> Tensor:
        """Returns the logits."""
        residual = F.embedding(self.inputs.token_ids, self.embedding)
        x = norm.rms_norm(residual, self.norm, EPS)
        for layer, (qkv, out, gate_up, down) in enumerate(self.layers):
            x = norm.add_rms_norm(out(self._attend(qkv(x), layer)), residual, self.norm, EPS)
            x = norm.add_rms_norm(down(activation.silu_and_mul(gate_up(x))), residual, self.norm, EPS)
        logits = self.head(x)
        sample.sample(logits, self.plan, self.data, self.state, self.inputs, self.result)
        return logits

    def _attend(self, qkv: Tensor, layer: int) -> Tensor:
        """# [rows, channels of qkv] -> [rows, heads * DIM]"""
        shape, cache, inputs = self.shape, self.caches[layer], self.inputs
        q, k, v = qkv.view(self.rows, -1, DIM).split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        rope.rope_and_cache(q, k, v, inputs.positions, self.rotary, cache, inputs.slot_mapping[0])
        y = decode.decode_attention(
            q, cache, self.state.block_tables[0], inputs.row_slots, inputs.seq_lens, 1, DIM**-0.5
        )
        return y.view(self.rows, -1)


def step_milliseconds(step: Callable[[], object]) -> float:
    """Median device time of a step in a graph."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return milliseconds(graph, 15)


def main() -> None:
    wanted = sys.argv[1:]
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; ms, {CONTEXT} context"
    )
    print(f"{'step':22} {'ms':>7} {'floor':>7} {'share':>6} {'vLLM':>7} {'goal':>7}")
    for (name, format_name, rows), (peer, goal) in TARGETS.items():
        if not all(part in f"{name} {format_name} x {rows}" for part in wanted):
            continue
        bytes_a_weight, linear = FORMATS[format_name]
        step = Step(SHAPES[name], rows, linear, bytes_a_weight)
        floor = SHAPES[name].bytes(rows, bytes_a_weight) / BANDWIDTH * 1e3
        ours = step_milliseconds(step.run)
        columns = [f"{figure:7.2f}" if figure is not None else f"{'-':>7}" for figure in (peer, goal)]
        met = "" if goal is None else " met" if ours <= goal else " missed"
        label = f"{name} {format_name} x {rows}"
        print(f"{label:22} {ours:7.3f} {floor:7.3f} {floor / ours:6.0%}", *columns, met, flush=True)
        del step
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
