"""Rotary, the write of keys and values, and attention over pages, against the twins in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from octavo import _core
from octavo.kernels.attention.kv_block import block_bytes, split_cache
from octavo.kernels.reference import layers as twins

BLOCK, SLOTS, MOST_BLOCKS, LONGEST = 8, 7, 9, 80
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Whole prompts, later parts of one, drafts behind a long row, one token, padding of three tokens.
MIXED = {"lengths": (40, 72, 64, 1, 0, 17), "queries": (40, 35, 4, 1, 3, 2)}


class Case:
    """Rows over scattered pages, of one token each or of `queries`; what no row sees is NaN."""

    def __init__(
        self,
        dtype: torch.dtype,
        heads: int = 6,
        kv_heads: int = 2,
        dim: int = 32,
        lengths: tuple[int, ...] = (1, 17, 0, 64, 8),
        tokens_behind: int = 3,
        norms: bool = False,
        queries: tuple[int, ...] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(18)
        self.shape, self.rows = (heads, kv_heads, dim), len(lengths)
        counts = queries or (1,) * self.rows
        self.starts = None if queries is None else torch.tensor([0, *queries]).cumsum(0).int()
        self.answered = sum(counts)
        tokens = self.answered + tokens_behind
        blocks = SLOTS * MOST_BLOCKS + 1
        order = torch.randperm(blocks - 1, generator=generator) + 1
        self.block_table = order.view(SLOTS, MOST_BLOCKS).int()
        self.row_slots = torch.randperm(SLOTS, generator=generator)[: self.rows].int()
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.kv_cache = torch.full((blocks, 2, kv_heads, BLOCK, dim), float("nan"), dtype=dtype)
        slots, positions = [], []
        for slot, length, count in zip(self.row_slots.tolist(), lengths, counts, strict=True):
            for position in range(length - count):
                block = int(self.block_table[slot, position // BLOCK])
                known = torch.randn(2, kv_heads, dim, generator=generator)
                self.kv_cache[block, :, :, position % BLOCK] = known.to(dtype)
            for position in range(length - count, length) if length else [0] * count:
                slots.append(int(self.block_table[slot, position // BLOCK]) * BLOCK + position % BLOCK if length else 0)
                positions.append(position)
        free = int(self.block_table[int(next(s for s in range(SLOTS) if s not in self.row_slots.tolist())), 0])
        slots += [free * BLOCK + place for place in range(tokens_behind)]
        self.slot_mapping = torch.tensor(slots)
        self.positions = torch.tensor(positions + list(range(tokens_behind)))
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
        queries = rotated[: self.answered].double().view(self.answered, self.shape[0], -1)
        pages, lengths = self.kv_cache.double(), self.seq_lens
        starts = torch.arange(self.rows + 1) if self.starts is None else self.starts
        answers = torch.zeros_like(queries)
        for row in range(self.rows):  # rows of length 0 are answered by zeros
            if lengths[row]:
                one = slice(row, row + 1)
                where = (self.block_table, self.row_slots[one].long(), torch.tensor([0, starts[row + 1] - starts[row]]))
                part = slice(int(starts[row]), int(starts[row + 1]))
                answers[part] = twins.prefill_attention(queries[part], pages, *where, lengths[one], 0, scale, window)
        return answers.reshape(self.answered, -1)

    def op(self, window: int, scale: float, level: str | None = None, **pages: Tensor) -> _core.PagedAttention:
        names: dict[str, Any] = dict(zip(("q_norm", "k_norm"), self.norms, strict=True))
        return _core.PagedAttention(
            *self.shape, block_size=BLOCK, scale=scale, window=window, cos_sin=self.cos_sin, eps=1e-6, level=level,
            **{"kv_cache": self.kv_cache, **pages}, **names,
        )  # fmt: skip

    def run(self, op: _core.PagedAttention, **changes: Any) -> Tensor:
        names = ("positions", "slot_mapping", "block_table", "row_slots", "seq_lens", "starts")
        rows = _core.PagedRows(*(changes.get(name, getattr(self, name)) for name in names))
        out = torch.full((self.answered, self.shape[0] * self.shape[2]), float("nan"))
        assert op.run(changes.get("qkv", self.qkv), rows, changes.get("out", out)) is changes.get("out", out)
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
    torch.testing.assert_close(case.kv_cache[1:], pages[1:], equal_nan=True)  # not the null block


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 6), (8, 8, 80), (4, 1, 256), (9, 3, 64)])
def test_other_heads(heads: int, kv_heads: int, dim: int, level: str) -> None:
    case = Case(torch.float32, heads, kv_heads, dim, lengths=(30, 72))
    rotated, _ = case.twin()
    actual = case.run(case.op(0, dim**-0.5, level))
    torch.testing.assert_close(actual.double(), case.answers(rotated, 0, dim**-0.5), rtol=2e-5, atol=2e-5)


KV = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("gap", [0, 48])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("queries", [None, (40, 35, 4, 1, 3, 2)])
def test_pages_of_codes(kv: str, gap: int, window: int, queries: tuple[int, ...] | None, level: str) -> None:
    """What is written are the twin's codes and scales, and answers are those over their numbers; blocks
    may lie apart.
    """
    case = Case(torch.float32, heads=6, kv_heads=2, dim=32, lengths=MIXED["lengths"], queries=queries)
    case.qkv[1, -32:] = 0.0  # a head of zeros has a scale of zero
    size = block_bytes(2, BLOCK, 32, KV[kv])
    caches = []
    for _ in range(2):
        blocks = torch.zeros(len(case.kv_cache), size + gap, dtype=torch.uint8)[:, :size]
        codes, scales = split_cache(blocks, 2, BLOCK, 32, KV[kv])
        assert scales is not None
        known, known_scales = twins.quantise_kv(case.kv_cache, KV[kv])
        codes.view(torch.uint8).copy_(known.view(torch.uint8))
        scales.copy_(known_scales)  # NaN where nothing is known yet
        caches.append((codes, scales))
    (codes, scales), (twin_codes, twin_scales) = caches
    sizes = [6 * 32, 2 * 32, 2 * 32]
    q, k, v = (part.reshape(len(case.qkv), -1, 32) for part in case.qkv.clone().split(sizes, dim=-1))
    where = (case.positions, case.cos_sin, twin_codes, case.slot_mapping)
    twins.rope_and_cache(q, k, v, *where, kv_scales=twin_scales)
    actual = case.run(case.op(window, 0.2, level, kv_cache=codes, kv_scales=scales))
    torch.testing.assert_close(scales[1:], twin_scales[1:], equal_nan=True)  # not the null block
    # The last bit of a rotation may turn a tie.
    differ = (codes[1:].view(torch.uint8) != twin_codes[1:].view(torch.uint8)).float().mean()
    assert differ < 1e-3
    case.kv_cache = twins.dequantise_kv(codes, scales)
    answers = case.answers(q.reshape(len(q), -1), window, 0.2)
    torch.testing.assert_close(actual.double(), answers, rtol=2e-5, atol=2e-5)


def test_codes_that_no_scales_follow_are_refused() -> None:
    case = Case(torch.float32)
    blocks = torch.zeros(len(case.kv_cache), block_bytes(2, BLOCK, 32, torch.int8), dtype=torch.uint8)
    codes, scales = split_cache(blocks, 2, BLOCK, 32, torch.int8)
    assert scales is not None
    with pytest.raises(ValueError, match="kv_scales: must follow the codes of kv_cache in each block"):
        case.op(0, 1.0, kv_cache=codes, kv_scales=scales.clone())
    with pytest.raises(ValueError, match="kv_cache: with kv_scales it has codes"):
        case.op(0, 1.0, kv_cache=codes.view(torch.bool), kv_scales=scales)
    with pytest.raises(TypeError, match=r"kv_scales: dtype must be torch.float32"):
        case.op(0, 1.0, kv_cache=codes, kv_scales=scales.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 5, 16, 37])
def test_rows_of_many_tokens(dtype: str, window: int, level: str) -> None:
    case = Case(DTYPES[dtype], norms=window == 5, **MIXED)
    rotated, pages = case.twin()
    actual = case.run(case.op(window, 0.2, level))
    torch.testing.assert_close(actual.double(), case.answers(rotated, window, 0.2), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(case.kv_cache[1:], pages[1:], equal_nan=True)  # not the null block


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 6), (8, 8, 80), (4, 1, 256), (9, 3, 64), (200, 1, 2)])
def test_many_tokens_of_other_heads(heads: int, kv_heads: int, dim: int, level: str) -> None:
    case = Case(torch.float32, heads, kv_heads, dim, **MIXED)
    rotated, _ = case.twin()
    actual = case.run(case.op(0, dim**-0.5, level))
    torch.testing.assert_close(actual.double(), case.answers(rotated, 0, dim**-0.5), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_scores_of_any_size_keep_their_order(shift: float, level: str) -> None:
    """Exponentials are taken of differences, also where the first keys of a row are not seen."""
    case = Case(torch.float32, heads=2, kv_heads=2, dim=16, **MIXED)
    case.qkv[:, :16], case.qkv[:, 32:48] = 1.0, shift / 16 + case.qkv[:, 32:48] / 16
    case.positions.zero_()
    rotated, _ = case.twin()
    actual = case.run(case.op(5, 1.0, level))
    torch.testing.assert_close(actual.double(), case.answers(rotated, 5, 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("queries", [None, (40, 35, 4, 1, 3, 2)])
def test_a_query_that_is_no_number_spoils_its_token_alone(queries: tuple[int, ...] | None, level: str) -> None:
    case = Case(torch.float32, lengths=MIXED["lengths"], queries=queries)
    case.qkv[0, 3] = float("nan")
    actual = case.run(case.op(0, 1.0, level)).view(case.answered, 6, 32)
    assert actual[0, 0].isnan().all()
    assert actual[0, 1:].isfinite().all() and actual[1:].isfinite().all()


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
    with pytest.raises(ValueError, match="out: 4 numbers for 5 tokens of 192"):
        case.run(op, out=torch.zeros(4))
    for starts in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 9], [0, 2, 1, 3, 4, 5], [1, 2, 3, 4, 5, 6], [0, -1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="query_start_loc: not where 5 rows of 8 tokens begin"):
            case.run(op, starts=torch.tensor(starts, dtype=torch.int32))
    with pytest.raises(ValueError, match="seq_lens: 1 keys of a row of 2 tokens"):
        case.run(op, starts=torch.tensor([0, 2, 3, 4, 5, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match="q_norm and k_norm: both or none"):
        _core.PagedAttention(
            6, 2, 32, block_size=8, scale=1.0, window=0, cos_sin=case.cos_sin, eps=0.0, kv_cache=case.kv_cache,
            q_norm=torch.ones(32),
        )  # fmt: skip
