"""CUDA graphs of the decode forward pass, one a batch size.

A graph covers embedding to the last norm for rows of one new token each, over the static inputs that `prepare` fills,
so replaying it costs the host one call instead of hundreds of launches. Attention reads the real lengths on the device,
so one graph serves all lengths. The logits stay outside: every graph would keep its own, of rows x vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo._core import Plan
from octavo.engine.step_buffers import DeviceState, StepInputs
from octavo.layers.context import StepContext, set_context
from octavo.models.registry import Model


class DecodeGraphs:
    """Captured decode steps by number of rows."""

    def __init__(self, model: Model, inputs: StepInputs, state: DeviceState, *, max_seq_len: int) -> None:
        self._model = model
        self._inputs = inputs
        self._state = state
        self._max_seq_len = max_seq_len
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # torch's opaque handle of the graphs' shared memory

    def capture(self, rows: int) -> None:
        """Captures the decode step of `rows` rows; a warm-up run first compiles the kernels and fills their caches."""
        inputs = self._inputs
        context = StepContext(
            num_decode_tokens=rows,
            num_decodes=rows,
            decode_query_len=1,
            num_prefills=0,
            max_query_len=1,
            max_seq_len=self._max_seq_len,
            row_slots=inputs.row_slots[:rows],
            query_start_loc=inputs.query_start_loc[: rows + 1],
            seq_lens=inputs.seq_lens[:rows],
            slot_mapping=[mapping[:rows] for mapping in inputs.slot_mapping],
            block_tables=self._state.block_tables,
        )
        inputs.fill_padding(rows)
        set_context(context)
        self._run(rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self._run(rows)
        self._pool = graph.pool()
        self._graphs[rows] = (graph, hidden)

    def fits(self, plan: Plan) -> bool:
        """Whether a captured graph runs this plan: decodes only, one token each, padded to a captured size."""
        return plan.num_prefill_tokens == 0 and plan.decode_query_len == 1 and plan.padded_decodes in self._graphs

    def replay(self, plan: Plan) -> Tensor:
        """Hidden states [padded_decodes, hidden_size] of the step whose inputs `prepare` has just filled."""
        graph, hidden = self._graphs[plan.padded_decodes]
        graph.replay()
        return hidden

    def _run(self, rows: int) -> Tensor:
        return self._model.forward(self._inputs.token_ids[:rows], self._inputs.positions[:rows])
