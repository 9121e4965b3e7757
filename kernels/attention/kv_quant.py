"""Keys and values in 8 and 4 bits: how a code becomes a number. How they lie in a block stands in
`kv_block.py`.

A number is its code times its scale, one scale a token and head, in three formats, told apart by
the dtype of the codes:

- float8_e4m3fn: the code is the number; scale = largest magnitude / 448.
- int8: -127 .. 127; scale = largest magnitude / 127.
- uint8: two 4-bit codes, each 8 more than -8 .. 7. Byte j of a head holds component j in its low
  half and component j + D / 2 in its high half: rotary (half-split) has both at hand when it packs.
  The scale carries a sign, so that the component of largest magnitude is always -8: sixteen steps
  serve instead of fifteen (mean squared error 0.77 of the symmetric format's on normal data).

Attention reads codes as words of 16 bits, each with two or four *parts*, and makes one product a
part with the components of q that belong to it, so nothing is ever interleaved: words go where
matrix instructions want 16-bit numbers, and each part of them is then such a number, in place.

Scales have 32 bits because asynchronous copies move no less: the loop of decode attention would
otherwise wait for two loads a tile that nothing can hide. They are 3 % of an 8-bit cache and 6 % of
a 4-bit one.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.kv_block import EXTREMES, FORMAT_NAMES

#: The dtype of the codes -> how many of them a word of 16 bits holds.
CODES_A_WORD = {torch.float8_e4m3fn: 2, torch.int8: 2, torch.uint8: 4}


def value_headroom(compute: torch.dtype, codes: torch.dtype) -> float:
    """What V's scales are multiplied by where they are folded into probabilities of dtype
    `compute`.

    float16 has little room below 1: small values' scales times small probabilities would vanish.
    The factor is the largest power of two that keeps a scale of float16 values finite.
    """
    if compute != torch.float16 or codes not in EXTREMES:
        return 1.0
    return 2.0 ** int(math.log2(abs(EXTREMES[codes])))


@triton.jit
def quantise(low, high, FORMAT: tl.constexpr):
    """Codes and scales of heads, given as two halves of their components.

    low, high [heads, components] fp32, zero where a component does not exist. FORMAT: the element
    type of the cache. Returns (codes of low, codes of high, scale [heads] fp32); in 4 bits both
    codes are the same packed bytes.
    """
    if tl.uint8 == FORMAT:
        largest = tl.maximum(tl.max(low, axis=1), tl.max(high, axis=1))
        smallest = tl.minimum(tl.min(low, axis=1), tl.min(high, axis=1))
        extreme = tl.where(largest > -smallest, largest, smallest)
        scale = extreme * -0.125
    else:
        magnitude = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
        LIMIT: tl.constexpr = 127.0 if tl.int8 == FORMAT else 448.0
        scale = magnitude / LIMIT
    # The largest of several numbers passes over NaN: a head with one has a scale of NaN, so that nobody
    # attends to codes that mean nothing. So has one with an infinite number.
    scale += tl.sum(low * 0.0 + high * 0.0, axis=1)
    # Heads of zeros, or of numbers whose reciprocals overflow, have codes of zero.
    inverse = (1.0 / tl.where(tl.abs(scale) < 1e-37, float("inf"), scale))[:, None]
    if tl.uint8 == FORMAT:
        # floor(x + 8.5) is x's nearest step, counted from -8.
        low = tl.floor(tl.minimum(tl.maximum(low * inverse + 8.5, 0.5), 15.5))
        high = tl.floor(tl.minimum(tl.maximum(high * inverse + 8.5, 0.5), 15.5))
        codes = (low + 16.0 * high).to(tl.uint8)
        high_codes = codes
    else:
        low = tl.minimum(tl.maximum(low * inverse, -LIMIT), LIMIT)
        high = tl.minimum(tl.maximum(high * inverse, -LIMIT), LIMIT)
        if tl.int8 == FORMAT:
            codes = tl.floor(low + 0.5).to(tl.int8)
            high_codes = tl.floor(high + 0.5).to(tl.int8)
        else:
            codes = low.to(FORMAT)
            high_codes = high.to(FORMAT)
    return codes, high_codes, scale


@triton.constexpr_function
def _unpack(name: str, part: int, dtype: str) -> str:
    """PTX that turns two words of codes (a register of two int16) into two numbers of dtype: their
    part `part`.

    Integers are or-ed into the mantissa of a power of two, which is then subtracted; an fp8
    number's fields are moved to where the wider format has them and its exponent is put right by a
    product. All of it exact, two or three instructions a number less than conversions, of which a
    multiprocessor does a quarter as many.
    """
    half = dtype == "fp16"
    product = "f16x2" if half else "bf16x2"
    if name == "int4":
        magic, offset = ("0x64006400", "0xe408e408") if half else ("0x43004300", "0xc308c308")
        steps = f"shr.u32 t, $1, {4 * part}; lop3.b32 t, t, 0x000f000f, {magic}, 0xea;"
        one = "0x3c003c00" if half else "0x3f803f80"
        steps += f"mov.b32 a, {one}; mov.b32 b, {offset}; fma.rn.{product} $0, t, a, b;"
    elif name == "int8" and half:
        steps = f"shr.u32 t, $1, {8 * part}; lop3.b32 t, t, 0x00ff00ff, 0x64806480, 0x6a;"
        steps += "mov.b32 a, 0x3c003c00; mov.b32 b, 0xe480e480; fma.rn.f16x2 $0, t, a, b;"
    elif name == "int8":
        # The sign bit or-ed into 128 makes it 256: just what the seven bits below it lack.
        steps = f"shr.u32 t, $1, {8 * part}; lop3.b32 a, t, 0x007f007f, 0x43004300, 0xea;"
        steps += "lop3.b32 t, t, 0x00800080, 0x43004300, 0xea; mov.b32 b, 0xbf80bf80; fma.rn.bf16x2 $0, t, b, a;"
    else:
        shift, factor = (1, "0x5c005c00") if half else (4, "0x7b807b80")  # 2^8, 2^120
        steps = f"shl.b32 t, $1, {8 * (1 - part)}; and.b32 a, t, 0x7f007f00; shr.u32 a, a, {shift};"
        steps += "lop3.b32 t, t, 0x80008000, a, 0xea; mov.b32 a, 0x80008000;"
        steps += f"mov.b32 b, {factor}; fma.rn.{product} $0, t, b, a;"
    return "{.reg .b32 t, a, b; " + steps + "}"


@triton.jit
def part(words, PART: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The numbers that are part PART of each word: all of them if FORMAT is "" (no codes).

    words: int16 tensor, two codes a word ("int8", "fp8") or four ("int4"). See `component` for
    which those are.
    """
    if FORMAT == "":
        numbers = words
    elif ASSEMBLY and tl.bfloat16 == DTYPE:
        assembly: tl.constexpr = _unpack(FORMAT, PART, "bf16")
        numbers = tl.inline_asm_elementwise(assembly, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif ASSEMBLY and tl.float16 == DTYPE:
        assembly: tl.constexpr = _unpack(FORMAT, PART, "fp16")
        numbers = tl.inline_asm_elementwise(assembly, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    elif FORMAT == "int4":
        numbers = (((words.to(tl.int32) >> (4 * PART)) & 15) - 8).to(DTYPE)
    else:
        code = (words.to(tl.int32) >> (8 * PART)) & 255
        if FORMAT == "int8":
            numbers = ((code ^ 128) - 128).to(DTYPE)
        else:
            numbers = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
    return numbers


@triton.jit
def component(word, part_index, FORMAT: tl.constexpr, DIM: tl.constexpr):
    """Which component of a head of DIM is part `part_index` of word `word`."""
    if FORMAT == "":
        index = word
    elif FORMAT == "int4":
        index = 2 * word + part_index // 2 + (part_index % 2) * (DIM // 2)
    else:
        index = 2 * word + part_index
    return index


def words(kv_cache: Tensor) -> tuple[Tensor, str, int]:
    """What kernels take for a cache: (itself, or its codes as int16; the name of their format, or
    ""; numbers a word).

    Raises ValueError if a head's codes do not fill whole words.
    """
    name, parts = FORMAT_NAMES.get(kv_cache.dtype, ""), CODES_A_WORD.get(kv_cache.dtype, 1)
    if not name:
        return kv_cache, name, parts
    if kv_cache.shape[-1] % 2:
        raise ValueError(f"quantised KV: {kv_cache.shape[-1]} bytes a head are not whole 16-bit words")
    return kv_cache.view(torch.int16), name, parts
