"""Made-up requests before the first real one, so that no kernel is compiled while somebody waits.

Triton compiles a variant of a kernel when it is first launched with new constants: one or two
seconds that would stop every stream. Which variants a step needs follows from what its requests ask
for, so the warm-up asks for all of it, through a core of its own on the real device buffers.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch

from octavo._core import EngineCore, Prompt, SamplingParams
from octavo.engine.model_runner import ModelRunner
from octavo.engine.step_buffers import Step, StepBuffers
from octavo.kernels.step.plan_format import RESULT_TOKENS, Plan
from octavo.models.registry import Model

FILTERS: dict[str, Any] = {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01}
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.0, **PENALTIES, "logit_bias": [(0, 1.0)]},
    {**FILTERS, "n": 2},  # a fork: its blocks are copied
    {**FILTERS, **PENALTIES, "logprobs": 2},
    {"temperature": 0.0, "prompt_logprobs": 2},
]
PROMPT_LENS = (3, 40)  # `prepare` has a variant for short rows and one for long ones


@torch.inference_mode()
def rehearse_layers(model: Model) -> None:
    """Launches the layers' own kernels, each kind once. Before any graph is captured: the kernels'
    counters are made by their first launch.
    """
    done: set[Hashable] = set()
    for layer in model.layers():
        layer.rehearse(done)


def warm_up(runner: ModelRunner, buffers: StepBuffers, core_options: dict[str, Any]) -> None:
    """Runs every kind of request to its end. `core_options`: those of the real core, whose pool
    must be unused yet.
    """
    speculation = core_options.get("speculation")
    max_tokens = 2
    if speculation is not None:  # long enough that drafts of every number are verified
        speculation = speculation | {"adaptive": False}
        max_tokens = 4 + core_options["num_draft_tokens"]
    core = EngineCore(**core_options | {"batching": "continuous", "speculation": speculation})
    core.bind(0, buffers.plan_array, buffers.result_array)

    def run(params: SamplingParams, length: int) -> None:
        core.add_call([Prompt([0] * length)], params, now=time.monotonic())
        while core.schedule(0, time.monotonic()) is not None:
            step = Step(0, buffers.read_plan(), buffers)
            runner.launch_forward(step)
            runner.launch_sample(step)
            buffers.wait()
            if speculation is not None:
                say_zero(buffers, step.plan)
            core.commit(0, time.monotonic())

    for options in REQUESTS:
        if options.get("n", 1) > runner.max_num_seqs:
            continue
        for length in PROMPT_LENS:
            if length + max_tokens <= core.longest_request:
                run(SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options), length)
    if core_options.get("vector_size"):
        for pooling in ("last", "mean"):
            run(SamplingParams.embedding(pooling=pooling), min(PROMPT_LENS[0], core.longest_request))
    # Taken again by the first request that needs them.
    runner.state.penalty_counts = runner.state.pooled_sums = None


def say_zero(buffers: StepBuffers, plan: Plan) -> None:
    """Writes over the result that every row drew token 0, as the prompts are: so that the core foretells
    more of them, and drafts are verified.
    """
    words = buffers.result_array.view(np.int32)[: plan.padded_rows * plan.result_width]
    words.reshape(plan.padded_rows, plan.result_width)[:, RESULT_TOKENS] = 0
