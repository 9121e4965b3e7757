//! Products by quantised weights with AVX2, FMA and F16C: eight rows of weights, each a lane, by up to four rows
//! of the input. An instruction multiplies two codes of each lane by two of a row, in 16 bits.

#[allow(clippy::wildcard_imports)] // some thirty instructions
use std::arch::x86_64::*;

use super::blocks::{Format, CODEBOOK};
use super::panels::{Blocks, LANES};
use super::rows::Tile;

/// Rows that are multiplied at a time: with their sums they fit into the registers.
const ROWS: usize = 4;
/// Bytes between what is multiplied by and what is fetched meanwhile.
const PREFETCH: usize = 4096;

/// Blocks of 32 numbers of eight rows of a panel.
trait Eight {
    /// Four bytes of a block, besides its float16 numbers.
    const WORDS: usize;
    /// The shift as a multiple of the scale; without it the block has one.
    const ZERO: Option<f32>;
    /// float16 numbers of a block.
    const HALVES: usize = if Self::ZERO.is_some() { 1 } else { 2 };

    /// Four codes of each lane: the `four`-th of the block, and the `four + 4`-th.
    ///
    /// # Safety
    /// The panel has `WORDS` words at `words`, and the processor has the level's instructions.
    unsafe fn codes(words: *const u8, four: usize) -> (__m256i, __m256i);
}

struct Q4_0;
struct Q4_1;
struct Q5_0;
struct Q5_1;
struct Q8_0;
#[allow(non_camel_case_types)] // ggml's name
struct IQ4_NL;

macro_rules! eight {
    ($format:ident, $words:literal, $zero:expr, $at:ident, $four:ident => $codes:expr) => {
        impl Eight for $format {
            const WORDS: usize = $words;
            const ZERO: Option<f32> = $zero;

            #[target_feature(enable = "avx2,fma,f16c")]
            #[inline]
            unsafe fn codes($at: *const u8, $four: usize) -> (__m256i, __m256i) {
                // SAFETY: the caller's: all that is read is one of the block's words.
                unsafe { $codes }
            }
        }
    };
}

eight!(Q4_0, 4, Some(-8.0), at, four => nibbles(word(at, four)));
eight!(Q4_1, 4, None, at, four => nibbles(word(at, four)));
eight!(Q5_0, 5, Some(-16.0), at, four => with_fifth(nibbles(word(at, 1 + four)), word(at, 0), four));
eight!(Q5_1, 5, None, at, four => with_fifth(nibbles(word(at, 1 + four)), word(at, 0), four));
eight!(IQ4_NL, 4, Some(-128.0), at, four => named(nibbles(word(at, four))));
eight!(Q8_0, 8, Some(-128.0), at, four => signed(word(at, four), word(at, 4 + four)));

/// Four bytes of each lane.
///
/// # Safety
/// A block has this word.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn word(words: *const u8, number: usize) -> __m256i {
    // SAFETY: the caller's.
    unsafe { _mm256_loadu_si256(words.add(number * 4 * LANES).cast()) }
}

/// The low halves of bytes, and the high ones.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn nibbles(bytes: __m256i) -> (__m256i, __m256i) {
    let mask = _mm256_set1_epi8(15);
    (_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask))
}

/// Codes of five bits: those of four, and 32 fifth bits a lane.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn with_fifth(codes: (__m256i, __m256i), fifth: __m256i, four: usize) -> (__m256i, __m256i) {
    let mut with = [codes.0, codes.1];
    for (half, codes) in with.iter_mut().enumerate() {
        let bits = _mm256_srlv_epi32(fifth, _mm256_set1_epi32((four * 4 + half * 16) as i32));
        let bits = _mm256_and_si256(bits, _mm256_set1_epi32(15));
        // Copies of the four bits, seven places apart: bit n of them is then the least of byte n.
        let spread = _mm256_mullo_epi32(bits, _mm256_set1_epi32(0x0020_4081));
        let spread = _mm256_and_si256(spread, _mm256_set1_epi8(1));
        *codes = _mm256_or_si256(*codes, _mm256_slli_epi32::<4>(spread));
    }
    (with[0], with[1])
}

/// The values of `IQ4_NL`'s codes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn named(codes: (__m256i, __m256i)) -> (__m256i, __m256i) {
    let [low, high] = [0, 8].map(|at| i64::from_le_bytes(CODEBOOK[at..at + 8].try_into().expect("eight bytes")));
    let book = _mm256_broadcastsi128_si256(_mm_set_epi64x(high, low));
    (_mm256_shuffle_epi8(book, codes.0), _mm256_shuffle_epi8(book, codes.1))
}

/// Signed bytes with 128 added.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn signed(front: __m256i, back: __m256i) -> (__m256i, __m256i) {
    let bias = _mm256_set1_epi8(-128);
    (_mm256_xor_si256(front, bias), _mm256_xor_si256(back, bias))
}

/// The products of some panels' lanes with each row of a tile: out [panels, rows, 16]. `blocks`: of a format of
/// 32 numbers.
///
/// # Panics
/// The format has other blocks, or something has another size.
///
/// # Safety
/// The processor has the level's instructions.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn multiply(format: Format, blocks: Blocks<'_>, tile: Tile<'_>, out: &mut [[f32; LANES]]) {
    match format {
        Format::Q4_0 => rows_of::<Q4_0>(blocks, tile, out),
        Format::Q4_1 => rows_of::<Q4_1>(blocks, tile, out),
        Format::Q5_0 => rows_of::<Q5_0>(blocks, tile, out),
        Format::Q5_1 => rows_of::<Q5_1>(blocks, tile, out),
        Format::IQ4_NL => rows_of::<IQ4_NL>(blocks, tile, out),
        Format::Q8_0 => rows_of::<Q8_0>(blocks, tile, out),
        _ => unreachable!("a block of 32 numbers"),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rows_of<E: Eight>(blocks: Blocks<'_>, tile: Tile<'_>, out: &mut [[f32; LANES]]) {
    for first in (0..tile.rows).step_by(ROWS) {
        match tile.rows - first {
            1 => products::<E, 1>(blocks, tile, first, out),
            2 => products::<E, 2>(blocks, tile, first, out),
            3 => products::<E, 3>(blocks, tile, first, out),
            _ => products::<E, ROWS>(blocks, tile, first, out),
        }
    }
}

/// Of the R rows from `first` on.
#[target_feature(enable = "avx2,fma,f16c")]
fn products<E: Eight, const R: usize>(blocks: Blocks<'_>, tile: Tile<'_>, first: usize, out: &mut [[f32; LANES]]) {
    let groups = tile.scales.len() / tile.rows;
    assert!(first + R <= tile.rows && out.len() == blocks.count * tile.rows);
    assert!(tile.codes.len() >= groups * 8 * tile.rows);
    assert!(blocks.words.len() >= blocks.count * groups * E::WORDS * 4 * LANES);
    assert!(blocks.halves.len() >= blocks.count * groups * E::HALVES * 2 * LANES);
    for (panel, out) in out.chunks_exact_mut(tile.rows).enumerate() {
        for side in 0..2 {
            // SAFETY: groups and rows are inside of panels and tile (checked above), a side is half of a word.
            unsafe {
                let words = blocks.words.as_ptr().add(panel * groups * E::WORDS * 4 * LANES + side * 32);
                let halves = blocks.halves.as_ptr().add(panel * groups * E::HALVES * 2 * LANES + side * 16);
                let sums = side_of::<E, R>(words, halves, groups, tile, first);
                for (sum, out) in sums.into_iter().zip(&mut out[first..]) {
                    _mm256_storeu_ps(out.as_mut_ptr().add(side * 8), sum);
                }
            }
        }
    }
}

/// Eight lanes of a panel by R rows.
///
/// # Safety
/// `words` and `halves` have `groups` blocks, and so have the tile's rows from `first` to `first + R`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn side_of<E: Eight, const R: usize>(
    words: *const u8,
    halves: *const u8,
    groups: usize,
    tile: Tile<'_>,
    first: usize,
) -> [__m256; R] {
    let (low_bytes, width) = (_mm256_set1_epi16(0xFF), tile.rows);
    let mut sums = [_mm256_setzero_ps(); R];
    for group in 0..groups {
        // SAFETY: the caller's.
        unsafe {
            let words = words.add(group * E::WORDS * 4 * LANES);
            let rows = tile.codes.as_ptr().add(group * 8 * width + first);
            for line in 0..E::WORDS {
                // No harm is done where the address is nobody's.
                _mm_prefetch::<_MM_HINT_T0>(words.wrapping_add(PREFETCH + line * 64).cast());
            }
            let mut products = [_mm256_setzero_si256(); R];
            for four in 0..4 {
                let (front, back) = E::codes(words, four);
                for (codes, rows) in [(front, rows.add(four * width)), (back, rows.add((four + 4) * width))] {
                    let (even, odd) = (_mm256_and_si256(codes, low_bytes), _mm256_srli_epi16::<8>(codes));
                    for (r, products) in products.iter_mut().enumerate() {
                        let [x_even, x_odd] = *rows.add(r);
                        let even = _mm256_madd_epi16(even, _mm256_set1_epi32(x_even));
                        let odd = _mm256_madd_epi16(odd, _mm256_set1_epi32(x_odd));
                        *products = _mm256_add_epi32(*products, _mm256_add_epi32(even, odd));
                    }
                }
            }
            let halves = halves.add(group * E::HALVES * 2 * LANES);
            let scale = _mm256_cvtph_ps(_mm_loadu_si128(halves.cast()));
            let shift = match E::ZERO {
                Some(zero) => _mm256_mul_ps(scale, _mm256_set1_ps(zero)),
                None => _mm256_cvtph_ps(_mm_loadu_si128(halves.add(2 * LANES).cast())),
            };
            for r in 0..R {
                let [x_scale, x_sum] = *tile.scales.as_ptr().add(group * width + first + r);
                let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x_scale));
                sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[r]), scale, sums[r]);
                sums[r] = _mm256_fmadd_ps(shift, _mm256_set1_ps(x_sum), sums[r]);
            }
        }
    }
    sums
}
