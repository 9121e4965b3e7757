"""Triton kernels, one op a file; `reference.py` has the plain-PyTorch twin of every function.

Imports torch and triton and nothing of Octavo's.
"""
