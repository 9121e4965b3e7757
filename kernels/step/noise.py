"""The noise of a draw, in Triton: a hash of (seed, output index, token or group id), the same in
every batch, slot and device.

Twin: `noise_key` and `gumbel` of `reference/draw.py`, which tell the hash's source and why it has
this form.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def noise_key(seed_low, seed_high, output_index):
    """Two uint32 words from the int32 words of one draw."""
    low = seed_low.to(tl.uint32, bitcast=True)
    high = seed_high.to(tl.uint32, bitcast=True)
    index = output_index.to(tl.uint32, bitcast=True)
    first = _mix(index ^ _mix(high ^ _mix(low)))
    second = _mix((low + 0x85EBCA6B) ^ _mix((high + 0xC2B2AE35) ^ _mix(index + 0x27D4EB2F)))
    return first, second


@triton.jit
def gumbel(ids, first, second):
    """Standard Gumbel noise of each id: # int32 [...] -> f32 [...]."""
    x = ids.to(tl.uint32, bitcast=True) * 0x9E3779B1 + first
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) ^ second
    x = (x ^ (x >> 15)) * 0x735A2D97
    x = x ^ (x >> 15)
    v = tl.minimum(((x >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.99999994)
    # -log(1 - v). For small v, where the largest noise comes from, 1 - v would lose v's digits; six
    # terms of the series leave a relative error of v^6 / 7 < 1e-8.
    series = tl.fma(v, tl.fma(v, tl.fma(v, tl.fma(v, tl.fma(v, 1 / 6, 1 / 5), 1 / 4), 1 / 3), 1 / 2), 1.0) * v
    exponential = tl.where(v < 0.0625, series, _log2(1 - v) * -_LN_2)
    return _log2(exponential) * -_LN_2


@triton.jit
def _log2(x):
    """The card's own logarithm, one instruction, where `tl.log2` is a polynomial of some twenty.
    Its absolute error is 2^-22; the caller keeps away from arguments near 1 from below, where that
    would be much.
    """
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
