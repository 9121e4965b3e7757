"""The forward pass of one step over the static inputs: the same for a launch, for a capture and for the rehearsal of
the largest step.
"""

from __future__ import annotations

from torch import Tensor

from octavo.engine.step_buffers import DeviceState, StepInputs
from octavo.layers.context import StepContext, set_context
from octavo.models.registry import Model


def step_context(
    inputs: StepInputs,
    state: DeviceState,
    *,
    num_decodes: int,
    num_prefills: int,
    num_tokens: int,
    max_query_len: int,
    max_seq_len: int,
    decode_query_len: int = 1,
) -> StepContext:
    """What attention needs to know of a step, as views of the static inputs. Counts include padding."""
    rows = num_decodes + num_prefills
    return StepContext(
        num_decode_tokens=num_decodes * decode_query_len,
        num_decodes=num_decodes,
        decode_query_len=decode_query_len,
        num_prefills=num_prefills,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        row_slots=inputs.row_slots[:rows],
        query_start_loc=inputs.query_start_loc[: rows + 1],
        seq_lens=inputs.seq_lens[:rows],
        slot_mapping=[mapping[:num_tokens] for mapping in inputs.slot_mapping],
        block_tables=state.block_tables,
    )


def hidden_states(model: Model, inputs: StepInputs, context: StepContext) -> Tensor:
    """Hidden states [n, hidden_size] of all tokens of decode rows and of the last token of each prefill row."""
    set_context(context)
    tokens = context.slot_mapping[0].shape[0]
    hidden = model.forward(inputs.token_ids[:tokens], inputs.positions[:tokens])
    if context.num_prefills:
        hidden = hidden[inputs.sample_index[: context.num_decode_tokens + context.num_prefills]]
    return hidden
