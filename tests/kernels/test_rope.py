"""The fused head norm, rotary and page write against the twin in fp32."""

import pytest
import torch

from octavo.kernels import reference, rope

# One rounding of the output; fp32 leaves the order of the norm's sum.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize(
    ("num_q", "num_kv", "dim", "rotary_dim", "block_size"),
    [(9, 3, 64, 64, 16), (32, 8, 128, 128, 64), (4, 4, 80, 32, 16), (3, 1, 96, 96, 32), (2, 1, 256, 64, 64)],
)
@pytest.mark.parametrize("norms", ["", "q", "qk"])
def test_rope_and_cache(device, kernel_dtype, num_q, num_kv, dim, rotary_dim, block_size, norms) -> None:
    tokens, num_blocks = 3, 5
    qkv = torch.randn(tokens, (num_q + 2 * num_kv) * dim, device=device).to(kernel_dtype)
    weights = {name: torch.randn(dim, device=device).to(kernel_dtype) for name in norms}
    positions = torch.tensor([300, 0, 17], device=device)
    slot_mapping = torch.tensor([3 * block_size + 5, 0, 5 * block_size - 1], device=device)
    angles = torch.outer(torch.arange(512.0), 10000 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)).to(device)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)

    def run(op, qkv, dtype):
        cache = torch.full((num_blocks, 2, num_kv, block_size, dim), 7.0, device=device, dtype=dtype)
        q, k, v = (part.view(tokens, -1, dim) for part in qkv.split([num_q * dim, num_kv * dim, num_kv * dim], -1))
        norm_weights = (weights[name].to(dtype) if name in weights else None for name in "qk")
        op(q, k, v, positions, cos_sin, cache, slot_mapping, *norm_weights, 1e-5)
        return q, cache

    # .float() would share memory in fp32, and q is rotated in place
    expected_q, expected_cache = run(reference.rope_and_cache, qkv.to(torch.float32, copy=True), torch.float32)
    q, cache = run(rope.rope_and_cache, qkv, kernel_dtype)
    tolerance = TOLERANCE[kernel_dtype]
    torch.testing.assert_close(q.float(), expected_q, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(cache.float(), expected_cache, atol=tolerance, rtol=tolerance)


def test_no_tokens(device) -> None:
    empty = torch.zeros(0, 4, 64, device=device)
    cache = torch.zeros(2, 2, 4, 16, 64, device=device)
    index = torch.zeros(0, dtype=torch.int64, device=device)
    rope.rope_and_cache(empty, empty, empty, index, torch.zeros(8, 64, device=device), cache, index)
