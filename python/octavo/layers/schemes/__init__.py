"""How products by weight matrices are held and computed: one scheme a file, and who chooses among
them.
"""
