"""Drives a model over pages without an engine: shuffled block ids, one slot a sequence, any mix of
rows in a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from octavo.engine.kv_layout import KvLayout
from octavo.layers.context import StepContext, set_context
from octavo.models.registry import Model


@dataclass
class Sequence:
    slot: int
    token_ids: list[int] = field(default_factory=list)  # computed so far


class Runner:
    """Pages for `max_seqs` sequences of up to `max_len` tokens; `step` runs rows and returns logits
    of all their tokens.
    """

    def __init__(self, model: Model, dtype: torch.dtype, *, max_seqs: int = 4, max_len: int = 128, block_size: int = 4):
        """dtype: of the numbers or codes in the pages."""
        self.model, self.block_size = model, block_size
        blocks_each = -(-max_len // block_size)
        groups = model.kv_groups
        num_blocks = 1 + len(groups) * max_seqs * blocks_each
        generator = torch.Generator().manual_seed(0)
        order = (torch.randperm(num_blocks - 1, generator=generator) + 1).to(torch.int32)
        self.tables = list(order.view(len(groups), max_seqs, blocks_each).unbind(0))
        self.tables = [torch.cat((table, torch.zeros(1, blocks_each, dtype=torch.int32))) for table in self.tables]
        layout = KvLayout.of(model, block_size=block_size, dtype=dtype)
        self.pool = layout.allocate(num_blocks, torch.device("cpu"))
        for blocks in self.pool:
            blocks.fill_(255)  # NaN in every float type: what a page held before must not matter
        model.bind_kv_caches(layout.pages(self.pool))

    @torch.inference_mode()
    def step(self, decodes: list[tuple[Sequence, int]], prefills: list[tuple[Sequence, list[int]]]) -> list[Tensor]:
        """Logits [tokens of the row, vocab] of every row, decodes first.

        Every group holds its own block of a position.
        """
        rows = [(sequence, [token]) for sequence, token in decodes] + prefills
        ids = torch.tensor([token for _, tokens in rows for token in tokens])
        starts = [0]
        positions: list[int] = []
        for sequence, tokens in rows:
            begin = len(sequence.token_ids)
            positions += range(begin, begin + len(tokens))
            starts.append(starts[-1] + len(tokens))
            sequence.token_ids = sequence.token_ids + tokens
        row_of = [row for row, (_, tokens) in enumerate(rows) for _ in tokens]
        mapping = [
            torch.tensor(
                [
                    int(table[rows[row][0].slot, position // self.block_size]) * self.block_size
                    + position % self.block_size
                    for row, position in zip(row_of, positions, strict=True)
                ]
            )
            for table in self.tables
        ]
        set_context(
            StepContext(
                num_decode_tokens=len(decodes),
                num_decodes=len(decodes),
                decode_query_len=1,
                num_prefills=len(prefills),
                max_query_len=max((len(tokens) for _, tokens in prefills), default=0),
                max_seq_len=max(len(sequence.token_ids) for sequence, _ in rows),
                row_slots=torch.tensor([sequence.slot for sequence, _ in rows], dtype=torch.int32),
                query_start_loc=torch.tensor(starts, dtype=torch.int32),
                seq_lens=torch.tensor([len(sequence.token_ids) for sequence, _ in rows], dtype=torch.int32),
                slot_mapping=mapping,
                block_tables=self.tables,
            )
        )
        hidden = self.model.forward(ids, torch.tensor(positions))
        set_context(None)
        logits = self.model.compute_logits(hidden)
        return [logits[a:b] for a, b in pairwise(starts)]
