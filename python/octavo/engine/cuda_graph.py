"""CUDA graphs of the forward pass, one a shape of step: so many rows, so many tokens.

A graph covers embedding to the last norm over the static inputs that `prepare` fills, so replaying
it costs the host one call instead of hundreds of launches. Attention reads the real lengths on the
device, so one graph serves all lengths and how decode rows share their tokens; the core pads steps
to the captured shapes. The logits stay outside: every graph would keep its own, of rows x
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from octavo.engine.forward import StepShape, hidden_states, step_context
from octavo.engine.step_buffers import DeviceState, StepInputs
from octavo.kernels.step.plan_format import Plan
from octavo.models.registry import Model

PREFILL_ROWS = 8  # of each captured step with prompt tokens, one of them always padding
PREFILL_TOKENS = (64, 128, 192, 256, 384, 512, 768, 1024)
"""Beyond about a thousand tokens a 7B computes for longer than the host needs to launch its kernels
one by one.
"""
DRAFT_TOKENS = (
    *(2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256),
    *(320, 384, 448, 512, 640, 768, 896, 1024),
)
"""Tokens of decode rows of which some have drafts. Where tokens decide a step's time, from some 250
on, no step gains more than a quarter.
"""


@dataclass(frozen=True)
class GraphSizes:
    """Which shapes are captured. Empty: none."""

    decodes: list[int] = field(default_factory=list)  # rows of steps of decodes only
    prefill_tokens: list[int] = field(default_factory=list)
    prefill_decodes: list[int] = field(default_factory=list)  # decode rows beside prompt tokens
    # (decode rows, their tokens) where some row has drafts: of steps of decodes only, and beside
    # prompt tokens. One row is always padding, which takes the tokens that a step lacks.
    drafts: list[tuple[int, int]] = field(default_factory=list)
    prefill_drafts: list[tuple[int, int]] = field(default_factory=list)
    max_tokens: int = 0  # of one step, in all

    @classmethod
    def ladder(
        cls,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        decodes: list[int] | None = None,
        num_draft_tokens: int = 0,
    ) -> GraphSizes:
        """Fine where padding would cost most: every shape costs a tenth of a second of start-up.
        decodes: instead of the ladder.
        """
        most = min(max_num_seqs * (1 + num_draft_tokens), max_num_batched_tokens)

        def with_drafts(sizes: Iterable[int]) -> list[tuple[int, int]]:
            if not num_draft_tokens:
                return []
            # Rows are nearly free, so there are as many as the tokens can be of.
            return [(min(tokens, max_num_seqs) + 1, tokens) for tokens in sizes if 2 <= tokens <= most]

        longest = min(max_model_len, max_num_batched_tokens)
        return cls(
            decodes=decodes or decode_ladder(max_num_seqs),
            prefill_tokens=[tokens for tokens in PREFILL_TOKENS if tokens <= longest],
            prefill_decodes=sorted(
                {0, *(rows for rows in (32, max_num_seqs // 2) if rows <= max_num_seqs), max_num_seqs}
            ),
            drafts=with_drafts(DRAFT_TOKENS),
            prefill_drafts=with_drafts(sorted({max_num_seqs // 2, 2 * max_num_seqs})),
            max_tokens=max_num_batched_tokens,
        )

    @property
    def prefill_rows(self) -> int:
        """Prefill rows of each captured step with prompt tokens."""
        return PREFILL_ROWS if self.prefill_tokens else 0

    @property
    def most_decodes(self) -> int:
        """Decode rows of the shape that has most."""
        return max((shape.num_decodes for shape in self.shapes()), default=0)

    def shapes(self) -> list[StepShape]:
        """All of them, largest first so that they share one memory pool."""
        shapes = [StepShape(rows, rows) for rows in self.decodes]
        shapes += [StepShape(rows, tokens, has_drafts=True) for rows, tokens in self.drafts]
        for prompt_tokens in self.prefill_tokens:
            prefills = (self.prefill_rows, prompt_tokens)
            shapes += [StepShape(rows, rows, *prefills) for rows in self.prefill_decodes]
            shapes += [StepShape(rows, tokens, *prefills, has_drafts=True) for rows, tokens in self.prefill_drafts]
        fitting = [shape for shape in shapes if shape.num_tokens <= self.max_tokens or not shape.num_prefills]
        return sorted(fitting, key=lambda shape: shape.num_tokens, reverse=True)


def decode_ladder(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then by 8, beyond 256 by 16, up to `max_num_seqs`."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, max_num_seqs + 1, 16)]
    return sorted({min(size, max_num_seqs) for size in sizes if size <= max_num_seqs or size // 2 < max_num_seqs})


class StepGraphs:
    """Captured steps by shape."""

    def __init__(
        self, model: Model, inputs: StepInputs, state: DeviceState, *, max_decode_len: int, max_seq_len: int
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._state = state
        self._max_decode_len = max_decode_len
        self._max_seq_len = max_seq_len
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # torch's opaque handle of the graphs' shared memory

    def capture(self, shape: StepShape) -> None:
        """Captures one shape; a warm-up run first compiles the kernels and fills their caches."""
        decode_lens = [1] * shape.num_decodes
        if shape.has_drafts:  # the last row is padding
            least, more = divmod(shape.num_decode_tokens, shape.num_decodes - 1)
            decode_lens = [least + (row < more) for row in range(shape.num_decodes - 1)] + [0]
        prefill_lens = [shape.num_prefill_tokens, *[0] * shape.num_prefills][: shape.num_prefills]
        self._inputs.rehearse(decode_lens, prefill_lens, slot=self._state.padding_slot)

        def run() -> Tensor:
            # A context of its own: it keeps what the layers derive from it, which belongs to one
            # run.
            context = step_context(
                self._inputs,
                self._state,
                shape,
                max_decode_len=self._max_decode_len,
                max_query_len=max(1, shape.num_prefill_tokens),
                max_seq_len=self._max_seq_len,
            )
            return hidden_states(self._model, self._inputs, context)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = run()
        self._pool = graph.pool()
        self._graphs[shape] = (graph, hidden)

    def fits(self, plan: Plan) -> bool:
        """Whether a captured graph runs this plan: it is padded to a captured shape."""
        return StepShape.of(plan) in self._graphs

    def replay(self, plan: Plan) -> Tensor:
        """Hidden states of all tokens of decode rows and of the last token of each prefill row [n,
        hidden_size], of the step whose inputs `prepare` has just filled.
        """
        graph, hidden = self._graphs[StepShape.of(plan)]
        graph.replay()
        return hidden
