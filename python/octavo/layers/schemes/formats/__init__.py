"""How checkpoints store quantised projections: a format a file, all read as `(number - zero) *
scale`.
"""
