"""Plain-PyTorch twins: what CPUs run, and what the kernels are tested against. Imports no Triton."""
