"""The attention metadata of the running step, so that model code keeps
`forward(input_ids, positions)`.

One plain global: only the engine thread runs a model. (The idea is nano-vllm's `utils/context.py`.)
"""

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from octavo import _core


@dataclass
class StepContext:
    """What the attention layers need to know of a step. Rows are decodes first, then prefills."""

    num_decode_tokens: int  # tokens of decode rows; the rest belong to prefill rows
    num_decodes: int  # decode rows, padding included
    decode_query_len: int  # 1: each decode row has one token; else the most that one may have
    num_prefills: int
    max_query_len: int  # upper bound over prefill rows
    max_seq_len: int  # upper bound over all rows
    row_slots: Tensor  # [rows] int32: request slot of each row
    query_start_loc: Tensor  # [rows + 1] int32
    seq_lens: Tensor  # [rows] int32: computed + query length
    slot_mapping: list[Tensor]  # per KV group [num_tokens] int64: block * block_size + offset
    block_tables: list[Tensor]  # per KV group [max_num_seqs + 1, max_blocks] int32, by request slot
    _paged_rows: dict[int, _core.PagedRows] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def decode_start_loc(self) -> Tensor | None:
        """[num_decodes + 1] int32: `query_start_loc` of the decode rows; None where each has one
        token.
        """
        return self.query_start_loc[: self.num_decodes + 1] if self.decode_query_len > 1 else None

    @cached_property
    def prefill_start_loc(self) -> Tensor:
        """[num_prefills + 1] int32: `query_start_loc` of the prefill rows, counted from their own
        first token.
        """
        return self.query_start_loc[self.num_decodes :] - self.num_decode_tokens

    def paged_rows(self, kv_group: int, positions: Tensor) -> _core.PagedRows:
        """All rows as the CPU's attention takes them, for the layers of one KV group. positions
        [num_tokens] int64, the same for all layers of a step.
        """
        rows = self._paged_rows.get(kv_group)
        if rows is None:
            rows = self._paged_rows[kv_group] = _core.PagedRows(
                positions,
                self.slot_mapping[kv_group],
                self.block_tables[kv_group],
                self.row_slots,
                self.seq_lens,
                self.query_start_loc,
            )
        return rows


_context: StepContext | None = None


def set_context(context: StepContext | None) -> None:
    """Makes `context` that of the forward passes to come."""
    global _context
    _context = context


def get_context() -> StepContext:
    """The running step's metadata. A forward pass without `set_context` is a bug of the caller."""
    assert _context is not None, "set_context must come before forward"
    return _context
