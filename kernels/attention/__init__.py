"""Rotary, KV pages and attention over them, in 16, 8 and 4 bits."""
