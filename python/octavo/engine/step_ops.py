"""`prepare` and `sample` where the step's tensors are: the kernels on a GPU, and on a CPU Rust's
(`rust/step`), which take 0.05 ms where the twins' many small torch ops take 1 to 3.
"""

import torch
from torch import Tensor

from octavo import _core
from octavo.engine.step_buffers import DeviceState, StepInputs
from octavo.kernels import ops
from octavo.kernels.reference.logprobs import write_logprobs
from octavo.kernels.step.plan_format import ROW_WORDS, Plan


def prepare(plan: Plan, plan_device: Tensor, state: DeviceState, inputs: StepInputs, *, block_size: int) -> None:
    """As `octavo.kernels.reference.step.prepare`."""
    if plan_device.is_cuda:
        ops.prepare(plan, plan_device, state, inputs, block_size=block_size)
        return
    if plan.has_penalties or plan.num_penalty_tokens:
        state.require_penalty_counts()
    _core.prepare_step(
        plan,
        plan_device,
        block_size,
        state.records,
        state.last_token,
        state.penalty_counts,
        state.block_table,
        inputs.token_ids,
        inputs.positions,
        inputs.slots_of_groups,
        inputs.row_slots,
        inputs.seq_lens,
        inputs.query_start_loc,
        inputs.sample_index,
        inputs.sample_rows,
    )


def sample(
    logits: Tensor,
    plan: Plan,
    plan_device: Tensor,
    state: DeviceState,
    inputs: StepInputs,
    result: Tensor,
    masks: Tensor | None = None,
) -> None:
    """As `octavo.kernels.reference.step.sample`; logits float32."""
    if logits.is_cuda:
        ops.sample(logits, plan, plan_device, state, inputs, result, masks)
        return
    _core.sample_step(
        plan,
        plan_device,
        logits,
        state.records,
        state.last_token,
        state.vocab_size,
        state.penalty_counts,
        result,
        masks,
    )
    if plan.max_logprobs >= 0:
        words = plan_device.view(torch.int32)[plan.rows_offset // 4 :]
        rows = words[: plan.padded_rows * ROW_WORDS].view(-1, ROW_WORDS)
        record = result[: plan.padded_rows * plan.result_width].view(-1, plan.result_width)
        write_logprobs(logits[:, : state.vocab_size], plan, rows, record)
