"""Triton kernels, one op a file, in wings: `step`, `attention`, `linear`, `pointwise`.

`reference` has the plain-PyTorch twin of every op, and `ops` is the door through which layers and
engine come in. Imports torch and triton and nothing of Octavo's.
"""
