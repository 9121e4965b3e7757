//! Numbers of 16 bits, and an exponential that compilers vectorise.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_mm256_cvtph_ps, _mm256_storeu_ps, _mm_loadu_si128};

use super::level::Level;
#[cfg(target_arch = "x86_64")]
use super::level::Tier;

/// float16 to float32, exactly.
#[inline(always)]
pub fn from_half(half: u16) -> f32 {
    let bits = u32::from(half) << 16;
    let doubled = bits.wrapping_add(bits);
    let normal = f32::from_bits((doubled >> 4).wrapping_add(0xE0 << 23)) * f32::from_bits(0x0780_0000);
    let tiny = f32::from_bits((doubled >> 17) | (126 << 23)) - 0.5;
    let size = if doubled < (1 << 27) { tiny } else { normal };
    f32::from_bits(size.to_bits() | (bits & 0x8000_0000))
}

/// float32 to float16, rounded to the nearest, ties to even; what is too large becomes infinite.
#[inline(always)]
pub fn to_half(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let size = bits & 0x7FFF_FFFF;
    if size > 0x7F80_0000 {
        return sign | 0x7E00;
    }
    if size >= 0x477F_F000 {
        return sign | 0x7C00; // from 65520 on
    }
    if size < 0x3880_0000 {
        // Below the least normal number: the addition shifts and rounds.
        let tiny = f32::from_bits(size) + 0.5;
        return sign | (tiny.to_bits() - 0x3F00_0000) as u16;
    }
    let odd = (size >> 13) & 1;
    sign | ((size - 0x3800_0000 + 0xFFF + odd) >> 13) as u16
}

/// bfloat16 to float32, exactly.
#[inline(always)]
pub fn from_brain(brain: u16) -> f32 {
    f32::from_bits(u32::from(brain) << 16)
}

/// float32 to bfloat16, rounded to the nearest, ties to even.
#[inline(always)]
pub fn to_brain(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    (bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16
}

/// e^x to two units in the last place; 0 below -87.3, and at most 2^127. Without a branch or a conversion, so
/// that loops over it are vectorised.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number, and leaves it in the low bits
    let wanted = x;
    let x = x.clamp(-87.3, 88.0);
    let turns = x * std::f32::consts::LOG2_E + ROUND;
    let whole = turns - ROUND;
    // ln 2 in two parts, so that the rest is exact.
    let rest = x - whole * 0.693_359_4 - whole * -2.121_944_4e-4;
    let mut sum = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        sum = sum * rest + coefficient;
    }
    let power = f32::from_bits(turns.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    // NaN stays NaN whatever the power is.
    let value = (sum * rest * rest + rest + 1.0) * power;
    if wanted < -87.3 {
        0.0
    } else {
        value
    }
}

/// tanh x, to some 1e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// A float16.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct Half(pub u16);

/// A bfloat16.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct Brain(pub u16);

/// Numbers that are kept in another type than float32.
pub trait Number: Copy + Send + Sync {
    /// As float32.
    fn widen(self) -> f32;
    /// As many as both slices have.
    #[inline(always)]
    fn widen_all(_level: Level, kept: &[Self], numbers: &mut [f32]) {
        for (number, kept) in numbers.iter_mut().zip(kept) {
            *number = kept.widen();
        }
    }
    /// The nearest one.
    fn narrow(value: f32) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Number for Half {
    #[inline(always)]
    fn widen(self) -> f32 {
        from_half(self.0)
    }

    #[inline(always)]
    fn widen_all(level: Level, kept: &[Self], numbers: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if level.tier() != Tier::Portable {
            // SAFETY: a `Level` can only be had where the processor has its instructions.
            return unsafe { widen_halves(kept, numbers) };
        }
        let _ = level;
        for (number, kept) in numbers.iter_mut().zip(kept) {
            *number = kept.widen();
        }
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self(to_half(value))
    }
}

impl Number for Brain {
    #[inline(always)]
    fn widen(self) -> f32 {
        from_brain(self.0)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self(to_brain(value))
    }
}

/// By the processor's own instruction: one where [`from_half`] is some ten.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen_halves(kept: &[Half], numbers: &mut [f32]) {
    let (eights, rest) = kept.as_chunks::<8>();
    let (eight_numbers, rest_numbers) = numbers.as_chunks_mut::<8>();
    for (numbers, kept) in eight_numbers.iter_mut().zip(eights) {
        // SAFETY: eight numbers are read, and eight written.
        unsafe { _mm256_storeu_ps(numbers.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(kept.as_ptr().cast()))) };
    }
    for (number, kept) in rest_numbers.iter_mut().zip(rest) {
        *number = from_half(kept.0);
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // they are exact
mod tests {
    use super::*;

    #[test]
    fn halves_are_what_the_standard_says() {
        for (half, value) in [(0, 0.0), (1, 5.960_464_5e-8), (0x3C00, 1.0), (0xC000, -2.0), (0x7BFF, 65_504.0)] {
            assert_eq!(from_half(half), value);
        }
        assert!(from_half(0x7C00).is_infinite() && from_half(0x7E00).is_nan());
    }

    #[test]
    fn every_half_comes_back() {
        for half in 0..=u16::MAX {
            let value = from_half(half);
            assert!(value.is_nan() || to_half(value) == half, "{half:#x}");
        }
    }

    #[test]
    fn many_halves_are_each_what_it_is_alone() {
        let halves: Vec<Half> = (0..=u16::MAX).map(Half).chain([Half(0x3C00); 5]).collect();
        for level in Level::all() {
            let mut numbers = vec![0.0; halves.len()];
            Half::widen_all(level, &halves, &mut numbers);
            for (half, number) in halves.iter().zip(numbers) {
                assert!(number == half.widen() || number.is_nan() && half.widen().is_nan(), "{half:?}: {number}");
            }
        }
    }

    #[test]
    fn halves_and_brains_round_to_even() {
        assert_eq!(to_half(1.0 + 1.0 / 2048.0), 0x3C00);
        assert_eq!(to_half(1.0 + 3.0 / 2048.0), 0x3C02);
        assert_eq!(to_half(65_519.9), 0x7BFF);
        assert_eq!(to_half(65_520.0), 0x7C00);
        assert_eq!(to_brain(1.0 + 1.0 / 256.0), 0x3F80);
        assert_eq!(to_brain(1.0 + 3.0 / 256.0), 0x3F82);
        assert!(from_brain(to_brain(f32::NAN)).is_nan());
    }

    #[test]
    fn exponentials_are_close() {
        for step in -8_700..8_800 {
            let x = step as f32 / 100.0;
            let right = f64::from(x).exp();
            assert!((f64::from(exp(x)) / right - 1.0).abs() < 3e-7, "{x}");
            assert!((f64::from(tanh(x)) - f64::from(x).tanh()).abs() < 2e-7, "{x}");
        }
        assert_eq!(exp(-1e9), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }
}
