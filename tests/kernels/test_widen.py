"""Pages widened to 16 bits, and which rows they are of, against the codes' own arithmetic."""

import pytest
import torch
from tests.kernels.kv_codes import quantise_rows

from octavo.kernels.attention import widen as module
from octavo.kernels.reference import layers as reference

FP8, INT8, INT4 = torch.float8_e4m3fn, torch.int8, torch.uint8
MANY = [0, 1] * 16 + [3, 0, 5], [1] * 34 + [30]  # more rows than are looked through at a time
CASES = [
    # (codes, query_lens, cached lengths, window, capacity, how many rows fit)
    (FP8, [3, 30, 1], [0, 20, 31], 0, 100, 3),
    (INT8, [3, 30, 1], [0, 20, 31], 0, 7, 3),  # exactly: 1 + 4 + 2 pages
    (INT4, [3, 30, 1], [0, 20, 31], 0, 6, 2),
    (FP8, [3, 30, 1], [0, 20, 31], 0, 1, 1),
    (INT8, [3, 2, 1], [0, 78, 47], 20, 100, 3),
    (INT4, [3, 2, 1], [0, 78, 47], 20, 1 + 2, 2),  # of the second row's five pages two can be seen
    (FP8, *MANY, 0, 20, 35),
    (INT4, *MANY, 0, 19, 34),
]


@pytest.mark.parametrize(("kv_dtype", "query_lens", "cached", "window", "capacity", "fitting"), CASES)
def test_widened_pages(monkeypatch, make_rows, device, kv_dtype, query_lens, cached, window, capacity, fitting) -> None:
    monkeypatch.setattr(module, "_PROGRAMS", 5)  # each takes many pages: the interpreter runs one after the other
    block_size, dim, num_kv = 16, 64, 2
    seq_lens = [query + prefix for query, prefix in zip(query_lens, cached, strict=True)]
    rows, scales = quantise_rows(make_rows(seq_lens, num_kv, dim, block_size, torch.float32), kv_dtype)
    starts = torch.tensor([0, *query_lens], device=device).cumsum(0, dtype=torch.int32)
    arguments = (rows.kv_cache, scales, rows.block_table, rows.row_slots, starts, rows.seq_lens)
    pages, table, count = module.widen(*arguments, window, torch.float16, capacity)
    assert pages.shape == (capacity, 2, num_kv, block_size, dim)
    assert count.tolist() == [fitting]
    expected = reference.dequantise_kv(rows.kv_cache, scales).half()
    seen: list[int] = []
    for row in range(fitting):
        slot, seq_len, query_len = int(rows.row_slots[row]), seq_lens[row], query_lens[row]
        first = max(seq_len - query_len - window + 1, 0) // block_size if window else 0
        for index in range(first, -(-seq_len // block_size)) if query_len else ():
            page = int(table[slot, index])
            seen.append(page)
            torch.testing.assert_close(
                pages[page], expected[int(rows.block_table[slot, index])], rtol=0, atol=0, equal_nan=True
            )
    assert seen == list(range(len(seen)))  # none is two rows', and none is left out
