"""Rotary, KV pages and attention over them, in 32, 16, 8 and 4 bits: decodes, prefills, and copies
of blocks.
"""
