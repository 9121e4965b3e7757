"""Products with weight matrices, a file a weight format: `dense` (16 bits), `int4`, `eight_bit`
(int8 and fp8).

Which kernel takes how many tokens, and how it is cut, stands in a table of each format
(`*_table.py`).
"""
