//! Keys and values as codes of 8 or 4 bits, a scale for each head: `kernels/attention/kv_block.py` and
//! `kv_quant.py` say how they lie and are rounded.

use super::page::{PageShape, Place, Store};
use super::raw::Writer;

/// How the numbers of a head become codes.
pub trait Coding: Copy + Send + Sync + 'static {
    /// Bytes of a head of `dim` numbers.
    fn bytes(dim: usize) -> usize;
    /// Codes as numbers, in units of the scale.
    fn decode(codes: &[u8], numbers: &mut [f32]);
    /// The scale of a head.
    fn scale(numbers: &[f32]) -> f32;
    /// Numbers in units of the scale, as codes.
    fn encode(steps: impl Fn(usize) -> f32, codes: &mut [u8]);
}

/// Codes of some blocks of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Codes<'a, C> {
    /// From the first block's first byte to the last one's end: in each block codes, then float32 scales.
    pub bytes: Writer<'a, u8>,
    /// Bytes from one block to the next.
    pub stride: usize,
    /// What the codes are.
    pub coding: C,
}

impl<C: Coding> Codes<'_, C> {
    /// Where a head's codes and its scale are.
    #[inline(always)]
    fn starts(&self, shape: &PageShape, place: Place) -> (usize, usize) {
        let (block, number) = (place.block * self.stride, place.in_block(shape));
        let codes = 2 * shape.kv_heads * shape.block_size * C::bytes(shape.head_dim);
        (block + number * C::bytes(shape.head_dim), block + codes + number * 4)
    }
}

impl<C: Coding> Store for Codes<'_, C> {
    fn blocks(&self, shape: &PageShape) -> Result<usize, String> {
        let block = 2 * shape.kv_heads * shape.block_size * (C::bytes(shape.head_dim) + 4);
        if self.bytes.len() == 0 {
            return Ok(0);
        }
        if self.stride < block || self.bytes.len() % self.stride != block % self.stride {
            return Err(format!(
                "kv_cache: {} bytes are not blocks of {block}, {} apart",
                self.bytes.len(),
                self.stride
            ));
        }
        Ok(self.bytes.len().div_ceil(self.stride))
    }

    #[inline(always)]
    unsafe fn read(&self, shape: &PageShape, place: Place, numbers: &mut [f32]) {
        let (codes, scale) = self.starts(shape, place);
        // SAFETY: the caller's.
        let (codes, scale) = unsafe { (self.bytes.part(codes, C::bytes(numbers.len())), self.bytes.part(scale, 4)) };
        let scale = f32::from_ne_bytes([scale[0], scale[1], scale[2], scale[3]]);
        C::decode(codes, numbers);
        for number in numbers {
            *number *= scale;
        }
    }

    #[inline(always)]
    unsafe fn write(&self, shape: &PageShape, place: Place, numbers: &[f32]) {
        let (codes, scale) = self.starts(shape, place);
        // SAFETY: the caller's.
        let (codes, stored) = unsafe { (self.bytes.part(codes, C::bytes(numbers.len())), self.bytes.part(scale, 4)) };
        let scale = C::scale(numbers);
        stored.copy_from_slice(&scale.to_ne_bytes());
        // A head of zeros has a scale of zero; where the scale is no number, no code matters.
        C::encode(
            |at| {
                let step = numbers[at] / scale;
                if step.is_finite() {
                    step
                } else {
                    0.0
                }
            },
            codes,
        );
    }
}

/// The number of largest magnitude; NaN where one is.
fn extreme(numbers: &[f32]) -> f32 {
    numbers.iter().fold(
        0.0f32,
        |extreme, &number| {
            if number.abs() > extreme.abs() || number.is_nan() {
                number
            } else {
                extreme
            }
        },
    )
}

/// float8 e4m3 without infinities.
#[derive(Debug, Clone, Copy)]
pub struct Fp8;

/// int8 from -127 to 127.
#[derive(Debug, Clone, Copy)]
pub struct Int8;

/// -8 to 7 with 8 added: the first half of a head in the low bits, the second in the high ones.
#[derive(Debug, Clone, Copy)]
pub struct Int4;

/// The value of each code of e4m3.
const FP8_VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = (code as u32 >> 3 & 15, code as u32 & 7);
        let size = if code & 127 == 127 {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 / 512.0
        } else {
            f32::from_bits((exponent + 120) << 23 | mantissa << 20)
        };
        values[code] = if code < 128 { size } else { -size };
        code += 1;
    }
    values
};

/// The nearest code of e4m3, ties to even; what is too large becomes the largest.
#[inline(always)]
fn to_fp8(value: f32) -> u8 {
    let size = value.abs().min(448.0);
    let code = if size < 1.0 / 64.0 {
        // Adding 1.5 * 2^23 rounds, and leaves the whole number in the low bits.
        (size * 512.0 + 12_582_912.0).to_bits() - 0x4B40_0000
    } else {
        let bits = size.to_bits();
        ((bits + 0x7_FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3)
    };
    code as u8 | (value.to_bits() >> 24) as u8 & 0x80
}

/// Codes of a byte each.
pub trait Byte: Copy + Send + Sync + 'static {
    /// The value of the largest code, in units of the scale.
    const LARGEST: f32;
    /// Of a code.
    fn value(code: u8) -> f32;
    /// The code of the nearest value.
    fn nearest(step: f32) -> u8;
}

impl Byte for Fp8 {
    const LARGEST: f32 = 448.0;

    #[inline(always)]
    fn value(code: u8) -> f32 {
        FP8_VALUES[usize::from(code)]
    }

    #[inline(always)]
    fn nearest(step: f32) -> u8 {
        to_fp8(step)
    }
}

impl Byte for Int8 {
    const LARGEST: f32 = 127.0;

    #[inline(always)]
    fn value(code: u8) -> f32 {
        f32::from(code.cast_signed())
    }

    #[inline(always)]
    fn nearest(step: f32) -> u8 {
        ((step + 0.5).floor().clamp(-127.0, 127.0) as i8).cast_unsigned()
    }
}

impl<B: Byte> Coding for B {
    #[inline(always)]
    fn bytes(dim: usize) -> usize {
        dim
    }

    #[inline(always)]
    fn decode(codes: &[u8], numbers: &mut [f32]) {
        for (number, code) in numbers.iter_mut().zip(codes) {
            *number = B::value(*code);
        }
    }

    #[inline(always)]
    fn scale(numbers: &[f32]) -> f32 {
        extreme(numbers).abs() / B::LARGEST
    }

    #[inline(always)]
    fn encode(steps: impl Fn(usize) -> f32, codes: &mut [u8]) {
        for (at, code) in codes.iter_mut().enumerate() {
            *code = B::nearest(steps(at));
        }
    }
}

impl Coding for Int4 {
    #[inline(always)]
    fn bytes(dim: usize) -> usize {
        dim / 2
    }

    #[inline(always)]
    fn decode(codes: &[u8], numbers: &mut [f32]) {
        let (low, high) = numbers.split_at_mut(codes.len());
        for ((low, high), code) in low.iter_mut().zip(high).zip(codes) {
            *low = f32::from(code & 15) - 8.0;
            *high = f32::from(code >> 4) - 8.0;
        }
    }

    #[inline(always)]
    fn scale(numbers: &[f32]) -> f32 {
        extreme(numbers) / -8.0
    }

    #[inline(always)]
    fn encode(steps: impl Fn(usize) -> f32, codes: &mut [u8]) {
        let half = codes.len();
        let code = |at: usize| (steps(at) + 8.5).clamp(0.5, 15.5) as u8;
        for (at, pair) in codes.iter_mut().enumerate() {
            *pair = code(at) | code(half + at) << 4;
        }
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // they are exact
mod tests {
    use super::*;

    #[test]
    fn every_code_of_fp8_comes_back_and_what_lies_between_rounds_to_even() {
        for code in 0..126u8 {
            let (value, next) = (FP8_VALUES[usize::from(code)], FP8_VALUES[usize::from(code) + 1]);
            assert_eq!(to_fp8(value), code);
            assert_eq!(to_fp8(-value), code | 0x80);
            assert_eq!(to_fp8(f32::midpoint(value, next)), code + code % 2, "{value}");
            assert_eq!(to_fp8(value + (next - value) * 0.4999), code);
            assert_eq!(to_fp8(value + (next - value) * 0.5001), code + 1);
        }
        assert_eq!((to_fp8(448.0), to_fp8(1e9)), (126, 126));
    }

    #[test]
    fn the_extreme_keeps_its_sign_and_nan() {
        assert_eq!(extreme(&[1.0, -3.0, 2.0]), -3.0);
        assert!(extreme(&[1.0, f32::NAN, 2.0]).is_nan());
        assert!(extreme(&[f32::NAN, 7.0]).is_nan());
    }
}
