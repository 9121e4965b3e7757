"""CUDA graphs of the forward pass, one a shape of step: so many decode rows, so many prompt tokens.

A graph covers embedding to the last norm over the static inputs that `prepare` fills, so replaying it costs the host
one call instead of hundreds of launches. Attention reads the real lengths on the device, so one graph serves all
lengths; the core pads steps to the captured shapes. The logits stay outside: every graph would keep its own, of rows x
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from octavo.engine.forward import hidden_states, step_context
from octavo.engine.step_buffers import DeviceState, StepInputs
from octavo.kernels.step.plan_format import Plan
from octavo.models.registry import Model

PREFILL_ROWS = 8  # of each captured step with prompt tokens, one of them always padding
PREFILL_TOKENS = (64, 128, 192, 256, 384, 512, 768, 1024)
"""Beyond about a thousand tokens a 7B computes for longer than the host needs to launch its kernels one by one."""


@dataclass(frozen=True)
class GraphSizes:
    """Which shapes are captured. Empty: none."""

    decodes: list[int] = field(default_factory=list)  # rows of steps of decodes only
    prefill_tokens: list[int] = field(default_factory=list)
    prefill_decodes: list[int] = field(default_factory=list)  # decode rows beside prompt tokens
    max_tokens: int = 0  # of one step, in all

    @classmethod
    def ladder(
        cls, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, decodes: list[int] | None = None
    ) -> GraphSizes:
        """Fine where padding would cost most: every shape costs a tenth of a second of start-up. decodes: instead of
        the ladder.
        """
        longest = min(max_model_len, max_num_batched_tokens)
        return cls(
            decodes=decodes or decode_ladder(max_num_seqs),
            prefill_tokens=[tokens for tokens in PREFILL_TOKENS if tokens <= longest],
            prefill_decodes=sorted(
                {0, *(rows for rows in (32, max_num_seqs // 2) if rows <= max_num_seqs), max_num_seqs}
            ),
            max_tokens=max_num_batched_tokens,
        )

    @property
    def prefill_rows(self) -> int:
        """Prefill rows of each captured step with prompt tokens."""
        return PREFILL_ROWS if self.prefill_tokens else 0

    def shapes(self) -> list[tuple[int, int, int]]:
        """(decode rows, prefill rows, prompt tokens) of each, largest first so that they share one memory pool."""
        prefills = [
            (rows, self.prefill_rows, tokens)
            for tokens in self.prefill_tokens
            for rows in self.prefill_decodes
            if rows + tokens <= self.max_tokens
        ]
        shapes = prefills + [(rows, 0, 0) for rows in self.decodes]
        return sorted(shapes, key=lambda shape: shape[0] + shape[2], reverse=True)


def decode_ladder(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then by 8, beyond 256 by 16, up to `max_num_seqs`."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, max_num_seqs + 1, 16)]
    return sorted({min(size, max_num_seqs) for size in sizes if size <= max_num_seqs or size // 2 < max_num_seqs})


class StepGraphs:
    """Captured steps by shape."""

    def __init__(self, model: Model, inputs: StepInputs, state: DeviceState, *, max_seq_len: int) -> None:
        self._model = model
        self._inputs = inputs
        self._state = state
        self._max_seq_len = max_seq_len
        self._graphs: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # torch's opaque handle of the graphs' shared memory

    def capture(self, num_decodes: int, num_prefills: int, num_prefill_tokens: int) -> None:
        """Captures one shape; a warm-up run first compiles the kernels and fills their caches."""
        prefill_lens = [num_prefill_tokens, *[0] * (num_prefills - 1)] if num_prefills else []
        self._inputs.rehearse(num_decodes, prefill_lens, slot=self._state.padding_slot)

        def run() -> Tensor:
            # A context of its own: it keeps what the layers derive from it, which belongs to one run.
            context = step_context(
                self._inputs,
                self._state,
                num_decodes=num_decodes,
                num_prefills=num_prefills,
                num_tokens=num_decodes + num_prefill_tokens,
                max_query_len=max(1, num_prefill_tokens),
                max_seq_len=self._max_seq_len,
            )
            return hidden_states(self._model, self._inputs, context)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = run()
        self._pool = graph.pool()
        self._graphs[num_decodes, num_prefills, num_prefill_tokens] = (graph, hidden)

    def fits(self, plan: Plan) -> bool:
        """Whether a captured graph runs this plan: one token a decode row, padded to a captured shape."""
        return plan.decode_query_len == 1 and shape_of(plan) in self._graphs

    def replay(self, plan: Plan) -> Tensor:
        """Hidden states [padded_rows, hidden_size] of the step whose inputs `prepare` has just filled."""
        graph, hidden = self._graphs[shape_of(plan)]
        graph.replay()
        return hidden


def shape_of(plan: Plan) -> tuple[int, int, int]:
    """Decode rows, prefill rows and prompt tokens of a plan, padding included."""
    return plan.padded_decodes, plan.num_prefills, plan.num_prefill_tokens
