"""Rotary, the write of keys and values, and attention over pages, against the twins in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from octavo import _core
from octavo.kernels.reference import layers as twins

BLOCK, SLOTS, MOST_BLOCKS, LONGEST = 8, 6, 9, 80
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Case:
    """Rows of one token each over scattered pages; what no row sees is NaN."""

    def __init__(
        self,
        dtype: torch.dtype,
        heads: int = 6,
        kv_heads: int = 2,
        dim: int = 32,
        lengths: tuple[int, ...] = (1, 17, 0, 64, 8),
        tokens_behind: int = 3,
        norms: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(18)
        self.shape, self.rows = (heads, kv_heads, dim), len(lengths)
        tokens = self.rows + tokens_behind
        blocks = SLOTS * MOST_BLOCKS + 1
        order = torch.randperm(blocks - 1, generator=generator) + 1
        self.block_table = order.view(SLOTS, MOST_BLOCKS).int()
        self.row_slots = torch.randperm(SLOTS, generator=generator)[: self.rows].int()
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.kv_cache = torch.full((blocks, 2, kv_heads, BLOCK, dim), float("nan"), dtype=dtype)
        slots = []
        for slot, length in zip(self.row_slots.tolist(), lengths, strict=True):
            for position in range(length - 1):
                block = int(self.block_table[slot, position // BLOCK])
                known = torch.randn(2, kv_heads, dim, generator=generator)
                self.kv_cache[block, :, :, position % BLOCK] = known.to(dtype)
            last = max(length - 1, 0)
            slots.append(int(self.block_table[slot, last // BLOCK]) * BLOCK + last % BLOCK if length else 0)
        free = int(self.block_table[int(next(s for s in range(SLOTS) if s not in self.row_slots.tolist())), 0])
        slots += [free * BLOCK + place for place in range(tokens_behind)]
        self.slot_mapping = torch.tensor(slots)
        self.positions = torch.tensor([max(length - 1, 0) for length in lengths] + list(range(tokens_behind)))
        self.qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator)
        angles = torch.outer(torch.arange(LONGEST).float(), 0.3 ** torch.arange(dim // 2).float())
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
        self.norms = [torch.rand(dim, generator=generator) + 0.5 for _ in range(2)] if norms else [None, None]

    def twin(self) -> tuple[Tensor, Tensor]:
        """(rotated q of all tokens, pages)."""
        heads, kv_heads, dim = self.shape
        sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
        q, k, v = (part.reshape(len(self.qkv), -1, dim) for part in self.qkv.clone().split(sizes, dim=-1))
        pages = self.kv_cache.clone()
        where = (self.positions, self.cos_sin, pages, self.slot_mapping, *self.norms, 1e-6)
        twins.rope_and_cache(q, k, v, *where)
        return q.reshape(len(q), -1), pages

    def answers(self, rotated: Tensor, window: int, scale: float) -> Tensor:
        """Of the rows, over the pages as they are."""
        queries = rotated[: self.rows].double().view(self.rows, self.shape[0], -1)
        rows = (self.block_table, self.row_slots.long(), self.seq_lens)
        answers = twins.decode_attention(queries, self.kv_cache.double(), *rows, 1, scale, window)
        return answers.reshape(self.rows, -1)

    def op(self, window: int, scale: float, level: str | None = None) -> _core.PagedAttention:
        names: dict[str, Any] = dict(zip(("q_norm", "k_norm"), self.norms, strict=True))
        return _core.PagedAttention(
            *self.shape, block_size=BLOCK, scale=scale, window=window, cos_sin=self.cos_sin, eps=1e-6, level=level,
            **names,
        )  # fmt: skip

    def run(self, op: _core.PagedAttention, **changes: Any) -> Tensor:
        names = ("qkv", "positions", "slot_mapping", "kv_cache", "block_table", "row_slots", "seq_lens")
        out = torch.full((self.rows, self.shape[0] * self.shape[2]), float("nan"))
        op.run(*(changes.get(name, getattr(self, name)) for name in names), changes.get("out", out))
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 5, 16])
@pytest.mark.parametrize("norms", [False, True])
def test_it_is_the_twins(dtype: str, window: int, norms: bool, level: str) -> None:
    case = Case(DTYPES[dtype], norms=norms)
    rotated, pages = case.twin()
    actual = case.run(case.op(window, 0.2, level))
    torch.testing.assert_close(actual.double(), case.answers(rotated, window, 0.2), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(case.qkv[:, : rotated.shape[1]], rotated, rtol=1e-5, atol=1e-5)
    # A rounding of the rotation may turn a tie of the narrower type.
    torch.testing.assert_close(case.kv_cache, pages, equal_nan=True)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 6), (8, 8, 80), (4, 1, 256), (9, 3, 64)])
def test_other_heads(heads: int, kv_heads: int, dim: int, level: str) -> None:
    case = Case(torch.float32, heads, kv_heads, dim, lengths=(30, 72))
    rotated, _ = case.twin()
    actual = case.run(case.op(0, dim**-0.5, level))
    torch.testing.assert_close(actual.double(), case.answers(rotated, 0, dim**-0.5), rtol=2e-5, atol=2e-5)


def test_large_scores_do_not_overflow(level: str) -> None:
    case = Case(torch.float32)
    case.qkv *= 100
    rotated, _ = case.twin()
    actual = case.run(case.op(0, 3.0, level))
    torch.testing.assert_close(actual.double(), case.answers(rotated, 0, 3.0), rtol=1e-4, atol=1e-3)


def test_memory_that_is_not_there_is_refused() -> None:
    case = Case(torch.float32)
    op = case.op(0, 1.0)
    pages = len(case.kv_cache)
    for name, place, value, message in (
        ("positions", 2, LONGEST, f"positions: {LONGEST} of {LONGEST}"),
        ("positions", 2, -1, "positions: -1 of"),
        ("slot_mapping", 0, pages * BLOCK, f"slot_mapping: {pages * BLOCK} of {pages * BLOCK}"),
        ("row_slots", 1, SLOTS, f"block_table: has no 3 blocks of slot {SLOTS}"),
        ("seq_lens", 0, MOST_BLOCKS * BLOCK + 1, "block_table: has no 10 blocks"),
        ("seq_lens", 0, -1, "block_table: has no"),
    ):
        changed = getattr(case, name).clone()
        changed[place] = value
        with pytest.raises(ValueError, match=message):
            case.run(op, **{name: changed})
    table = case.block_table.clone()
    table[int(case.row_slots[1]), 1] = pages
    with pytest.raises(ValueError, match=f"block_table: block {pages} of {pages}"):
        case.run(op, block_table=table)
    with pytest.raises(ValueError, match="slot_mapping: 7 for 8 tokens"):
        case.run(op, slot_mapping=case.slot_mapping[:7])
    with pytest.raises(ValueError, match="qkv: "):
        case.run(op, qkv=torch.zeros(8, 5))
    with pytest.raises(ValueError, match="out: 4 numbers for 5 rows of 192"):
        case.run(op, out=torch.zeros(4))
    with pytest.raises(ValueError, match="q_norm and k_norm: both or none"):
        _core.PagedAttention(
            6, 2, 32, block_size=8, scale=1.0, window=0, cos_sin=case.cos_sin, eps=0.0, q_norm=torch.ones(32)
        )
