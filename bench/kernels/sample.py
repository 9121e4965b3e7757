"""Sampling of [rows, 128256] float32 logits (randn x 3): the whole step's `sample`, result records
and state included.

Beside it vLLM 0.26's native sampler on an H100, measured once, and the goal at 256 rows.
"""

from collections.abc import Iterator

import torch
from bench.kernels.cases import Case
from bench.kernels.timing import rotations
from tests.kernels.plan_bytes import LOGPROBS, PENALTIES, SAMPLE, Enter, Row, write_plan

from octavo.engine.step_buffers import DeviceState, StepInputs
from octavo.kernels.step import prepare, sample

VOCAB = 128256

# What is asked -> (parameters of each request, vLLM's microseconds at 1, 32 and 256 rows, goal at
# 256)
MIXES: dict[str, tuple[dict[str, float], tuple[float | None, ...], float | None]] = {
    "greedy": ({}, (37.5, 40.9, 77.8), 50),
    "temperature": ({"temperature": 1.0}, (87.9, 103, 453), 60),
    "top_k 50": ({"temperature": 1.0, "top_k": 50}, (275, 305, 939), 150),
    "top_p 0.9": ({"temperature": 1.0, "top_p": 0.9}, (309, 526, 1354), 150),
    "top_k 50, top_p 0.9": ({"temperature": 1.0, "top_k": 50, "top_p": 0.9}, (364, 342, 905), 150),
    "min_p 0.05": ({"temperature": 1.0, "min_p": 0.05}, (None, None, None), 150),
    "penalties": ({"temperature": 1.0, "repetition_penalty": 1.1}, (None, None, None), None),
    "greedy, logprobs 5": ({}, (None, None, None), None),
}


def sampling() -> Iterator[Case]:
    """Every mix at 1, 32 and 256 rows."""
    for name, (parameters, peers, goal) in MIXES.items():
        for rows, peer in zip((1, 32, 256), peers, strict=True):
            yield sample_case(name, rows, parameters, peer, goal if rows == 256 else None)


def sample_case(name: str, rows: int, parameters: dict[str, float], peer: float | None, goal: float | None) -> Case:
    device = torch.device("cuda")
    state = DeviceState(max_num_seqs=rows, num_groups=1, max_blocks=64, vocab_size=VOCAB, device=device)
    inputs = StepInputs(max_tokens=rows, max_rows=rows, num_groups=1, device=device)
    flags = SAMPLE | (PENALTIES if name == "penalties" else 0) | (LOGPROBS if "logprobs" in name else 0)
    plan, data = write_plan(
        [Row(slot, flags=flags) for slot in range(rows)],
        enters=[Enter(slot, seed=(slot, 1), penalty_tokens=[(slot, 3)], **parameters) for slot in range(rows)],
        all_greedy=name == "greedy",
        max_logprobs=5 if "logprobs" in name else -1,
        device="cuda",
    )
    prepare.prepare(plan, data, state, inputs, block_size=64)
    result = torch.empty(rows * plan.result_width, dtype=torch.int32, device=device)
    size = rows * VOCAB * 4
    sets = [torch.randn(rows, VOCAB, device=device) * 3 for _ in range(rotations(size))]
    calls = [lambda x=x: sample.sample(x, plan, data, state, inputs, result) for x in sets]
    argmax = [lambda x=x: x.argmax(1) for x in sets] if name == "greedy" else None
    return Case("sample", f"{rows} x {VOCAB} {name}", calls, size, torch_calls=argmax, peer=peer, goal=goal)
