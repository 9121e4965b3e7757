"""Triton kernels, one op a file, in wings; `reference/` has the plain-PyTorch twin of every op.

Imports torch and triton and nothing of Octavo's.
"""
