"""The fused head norm, rotary and page write against the twin in fp32."""

import pytest
import torch
from tests.kernels.kv_codes import KV_DTYPES

from octavo.kernels.attention import kv_block, rope
from octavo.kernels.reference import layers as reference

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


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    ("num_q", "num_kv", "dim", "rotary_dim", "block_size", "norms"),
    [
        (9, 3, 64, 64, 16, False),
        (4, 2, 128, 128, 32, True),
        (4, 4, 80, 32, 16, True),
        (3, 1, 96, 96, 32, False),
        (2, 1, 128, 96, 64, False),
    ],
)
def test_quantised_pages(device, kernel_dtype, kv_dtype, num_q, num_kv, dim, rotary_dim, block_size, norms) -> None:
    if kv_dtype == torch.float8_e4m3fn and device == "cpu":
        pytest.skip("Triton's interpreter casts to fp8 wrongly")
    tokens, num_blocks = 4, 5
    qkv = torch.randn(tokens, num_q + 2 * num_kv, dim, device=device).to(kernel_dtype)
    qkv[1, num_q:] = 0.0  # heads of zeros
    qkv[2, num_q:, dim // 3] = -30.0  # one large component
    weights = [torch.randn(dim, device=device).to(kernel_dtype) if norms else None for _ in "qk"]
    positions = torch.tensor([300, 0, 17, 4], device=device)
    slot_mapping = torch.tensor([3 * block_size + 5, 0, 5 * block_size - 1, 7], device=device)
    angles = torch.outer(torch.arange(512.0), 10000 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)).to(device)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    size = kv_block.block_bytes(num_kv, block_size, dim, kv_dtype)
    blocks = torch.full((num_blocks, size + 64), 37, device=device, dtype=torch.uint8)
    cache, scales = kv_block.split_cache(blocks[:, :size], num_kv, block_size, dim, kv_dtype)
    exact = torch.zeros(num_blocks, 2, num_kv, block_size, dim, device=device)

    def run(op, qkv, cache, scales):
        q, k, v = qkv.split([num_q, num_kv, num_kv], 1)
        norm_weights = (None if weight is None else weight.to(qkv.dtype) for weight in weights)
        op(q, k, v, positions, cos_sin, cache, slot_mapping, *norm_weights, 1e-5, scales)
        return q

    expected_q = run(reference.rope_and_cache, qkv.to(torch.float32, copy=True), exact, None)
    q = run(rope.rope_and_cache, qkv, cache, scales)
    tolerance = TOLERANCE[kernel_dtype]
    torch.testing.assert_close(q.float(), expected_q, atol=tolerance, rtol=tolerance)
    written = torch.zeros(num_blocks * block_size, dtype=torch.bool, device=device)
    written[slot_mapping] = True
    written = written.view(num_blocks, 1, 1, block_size).expand(-1, 2, num_kv, -1)
    assert (cache.view(torch.uint8)[~written] == 37).all()
    assert (scales.view(torch.uint8).unflatten(-1, (-1, 4))[~written] == 37).all()
    assert (blocks[:, size:] == 37).all()

    exact, codes, scales = exact[written], cache[written], scales[written]
    torch.testing.assert_close(scales, reference.quantise_kv(exact, kv_dtype)[1], atol=1e-30, rtol=1e-5)
    # Half a step.
    step = scales.abs().unsqueeze(-1)
    bound = 1e-5 * exact.abs().amax(-1, keepdim=True)
    if kv_dtype == torch.float8_e4m3fn:
        bound = bound + torch.maximum(2**-4 * exact.abs(), 2**-10 * step)  # three bits; fixed point below 2^-6
    else:
        bound = bound + 0.5 * step
    if kv_dtype == torch.uint8:
        bound = bound + 0.5 * step * (exact / scales.unsqueeze(-1) > 7.0)  # the side that ends a step early
    assert ((reference.dequantise_kv(codes, scales) - exact).abs() <= bound).all()


def test_no_tokens(device) -> None:
    empty = torch.zeros(0, 4, 64, device=device)
    cache = torch.zeros(2, 2, 4, 16, 64, device=device)
    index = torch.zeros(0, dtype=torch.int64, device=device)
    rope.rope_and_cache(empty, empty, empty, index, torch.zeros(8, 64, device=device), cache, index)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_no_code_hides_what_is_not_finite(device, kernel_dtype, kv_dtype, bad) -> None:
    """A request whose keys or values overflow ends with an error, and never on made-up numbers."""
    if kv_dtype == torch.float8_e4m3fn and device == "cpu":
        pytest.skip("Triton's interpreter casts to fp8 wrongly")
    size = kv_block.block_bytes(1, 8, 16, kv_dtype)
    blocks = torch.zeros(2, size, device=device, dtype=torch.uint8)
    cache, scales = kv_block.split_cache(blocks, 1, 8, 16, kv_dtype)
    qkv = torch.randn(4, 3, 16, device=device).to(kernel_dtype)
    qkv[1, 1, 3] = qkv[2, 2, 12] = bad  # a component of a key, and one of a value
    numbers = torch.arange(4, device=device)
    cos_sin = torch.cat((torch.ones(4, 8), torch.zeros(4, 8)), -1).to(device)
    for op in (rope.rope_and_cache, reference.rope_and_cache):
        q, k, v = qkv.clone().split([1, 1, 1], 1)
        op(q, k, v, numbers, cos_sin, cache, numbers + 8, kv_scales=scales)
        written = reference.dequantise_kv(cache, scales)[1, :, 0, :4]  # [2, tokens, 16]
        finite = torch.tensor([[True, False, True, True], [True, True, False, True]], device=device)
        assert written[finite].isfinite().all()
        assert written[~finite].isnan().any(-1).all()
