"""The forward pass of one step over the static inputs: the same for a launch, for a capture and for
the rehearsal of the largest step.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from octavo.engine.step_buffers import DeviceState, StepInputs
from octavo.kernels.step.plan_format import Plan
from octavo.layers.context import StepContext, set_context
from octavo.models.registry import Model


class StepShape(NamedTuple):
    """Rows and tokens of a step, padding included."""

    num_decodes: int
    num_decode_tokens: int
    num_prefills: int = 0
    num_prefill_tokens: int = 0
    has_drafts: bool = False  # decode rows may have more tokens than one, each its own number

    @classmethod
    def of(cls, plan: Plan) -> StepShape:
        """The shape of a planned step."""
        return cls(
            plan.padded_decodes,
            plan.num_decode_tokens,
            plan.num_prefills,
            plan.num_prefill_tokens,
            plan.decode_query_len > 1,
        )

    @property
    def num_tokens(self) -> int:
        return self.num_decode_tokens + self.num_prefill_tokens


def step_context(
    inputs: StepInputs,
    state: DeviceState,
    shape: StepShape,
    *,
    max_decode_len: int,
    max_query_len: int,
    max_seq_len: int,
) -> StepContext:
    """What attention needs to know of a step, as views of the static inputs. `max_decode_len`
    bounds the tokens of a decode row in any step: a kernel is compiled for that number, and not for
    the longest row of this one.
    """
    rows, num_tokens = shape.num_decodes + shape.num_prefills, shape.num_tokens
    return StepContext(
        num_decode_tokens=shape.num_decode_tokens,
        num_decodes=shape.num_decodes,
        decode_query_len=max_decode_len if shape.has_drafts else 1,
        num_prefills=shape.num_prefills,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        row_slots=inputs.row_slots[:rows],
        query_start_loc=inputs.query_start_loc[: rows + 1],
        seq_lens=inputs.seq_lens[:rows],
        slot_mapping=[mapping[:num_tokens] for mapping in inputs.slot_mapping],
        block_tables=state.block_tables,
    )


def hidden_states(model: Model, inputs: StepInputs, context: StepContext) -> Tensor:
    """Hidden states [n, hidden_size] of all tokens of decode rows and of the last token of each
    prefill row.
    """
    return sampled(all_hidden_states(model, inputs, context), inputs, context)


def all_hidden_states(model: Model, inputs: StepInputs, context: StepContext) -> Tensor:
    """Hidden states [tokens, hidden_size] of all tokens of a step."""
    set_context(context)
    tokens = context.slot_mapping[0].shape[0]
    return model.forward(inputs.token_ids[:tokens], inputs.positions[:tokens])


def sampled(hidden: Tensor, inputs: StepInputs, context: StepContext) -> Tensor:
    """Of the hidden states of all tokens of a step, those that a token may be drawn from."""
    if context.num_prefills:
        hidden = hidden[inputs.sample_index[: context.num_decode_tokens + context.num_prefills]]
    return hidden
