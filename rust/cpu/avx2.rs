//! Products by quantised weights with AVX2, FMA and F16C: eight rows of weights, each a lane, by up to four rows
//! of the input. An instruction multiplies two codes of each lane by two of a row, in 16 bits.

#[allow(clippy::wildcard_imports)] // some thirty instructions
use std::arch::x86_64::*;

use super::blocks::{Format, CODEBOOK};
use super::lanes::{lanes_of_formats, with_lanes};
use super::panels::{Ahead, Blocks, LANES};
use super::raw::Writer;
use super::rows::{Codes, Place, Scales, Tile, LARGEST};

/// Rows that are multiplied at a time: with their sums they fit into the registers.
const ROWS: usize = 4;
/// Bytes between what is multiplied by and what is fetched meanwhile.
const PREFETCH: usize = 4096;
/// Bytes of a word of all lanes.
const WORD: usize = 4 * LANES;
/// Lanes of a vector.
const WIDTH: usize = 8;

/// Of eight lanes of a panel: pointers to words and halves point to those of the side that is meant.
type Integers = __m256i;
type Numbers = __m256;

lanes_of_formats!("avx2,fma,f16c");

/// The word of this number.
///
/// # Safety
/// It is there.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn load(words: *const u8, number: usize) -> Integers {
    // SAFETY: the caller's.
    unsafe { _mm256_loadu_si256(words.add(number * WORD).cast()) }
}

/// The float16 of this number.
///
/// # Safety
/// It is there.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn scale(halves: *const u8, number: usize) -> Numbers {
    // SAFETY: the caller's.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(halves.add(number * 2 * LANES).cast())) }
}

/// The float32 of this number.
///
/// # Safety
/// It is there.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn load_number(numbers: *const u8, number: usize) -> Numbers {
    // SAFETY: the caller's.
    unsafe { _mm256_loadu_ps(numbers.add(number * WORD).cast()) }
}

/// a & b
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn and(a: Integers, b: Integers) -> Integers {
    _mm256_and_si256(a, b)
}

/// a | b
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn or(a: Integers, b: Integers) -> Integers {
    _mm256_or_si256(a, b)
}

/// a ^ b
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn xor(a: Integers, b: Integers) -> Integers {
    _mm256_xor_si256(a, b)
}

/// a - b
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn minus(a: Integers, b: Integers) -> Integers {
    _mm256_sub_epi32(a, b)
}

/// This in every byte.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn bytes(value: u8) -> Integers {
    _mm256_set1_epi8(value.cast_signed())
}

/// This in every lane.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn words_of(value: i32) -> Integers {
    _mm256_set1_epi32(value)
}

/// a << bits
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn left(a: Integers, bits: usize) -> Integers {
    _mm256_sllv_epi32(a, words_of(bits as i32))
}

/// a >> bits
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn right(a: Integers, bits: usize) -> Integers {
    _mm256_srlv_epi32(a, words_of(bits as i32))
}

/// a >> bits, with its sign
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn right_signed(a: Integers, bits: usize) -> Integers {
    _mm256_srav_epi32(a, words_of(bits as i32))
}

/// a * factor
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn spread(a: Integers, factor: i32) -> Integers {
    _mm256_mullo_epi32(a, words_of(factor))
}

/// The values of `IQ4_NL`'s codes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn look_up(codes: Integers) -> Integers {
    let [low, high] = [0, 8].map(|at| i64::from_le_bytes(CODEBOOK[at..at + 8].try_into().expect("eight bytes")));
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_set_epi64x(high, low)), codes)
}

/// As a float32.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn number(a: Integers) -> Numbers {
    _mm256_cvtepi32_ps(a)
}

/// a * b
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn product(a: Numbers, b: Numbers) -> Numbers {
    _mm256_mul_ps(a, b)
}

/// a * zero
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn zero_times(a: Numbers, zero: f32) -> Numbers {
    _mm256_mul_ps(a, _mm256_set1_ps(zero))
}

/// The products of some panels' lanes with each row of a tile: out [panels, rows, 16].
///
/// # Panics
/// The format has no blocks, or something has another size.
///
/// # Safety
/// The processor has the level's instructions.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn multiply(format: Format, blocks: Blocks<'_>, tile: Tile<'_>, out: &mut [[f32; LANES]]) {
    out.as_flattened_mut().fill(0.0);
    with_lanes!(format, rows_of(blocks, tile, out));
}

/// The products of blocks taken apart with each row of a tile are added: sums [panels, rows, 16]. group: numbers of
/// a group.
///
/// # Panics
/// Something has another size.
///
/// # Safety
/// The processor has the level's instructions.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn multiply_apart(group: usize, blocks: Blocks<'_>, tile: Tile<'_>, _: Ahead<'_>, sums: &mut [[f32; LANES]]) {
    if group == 16 {
        rows_of::<Apart<16>>(blocks, tile, sums);
    } else {
        rows_of::<Apart<32>>(blocks, tile, sums);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rows_of<L: Lanes>(blocks: Blocks<'_>, tile: Tile<'_>, sums: &mut [[f32; LANES]]) {
    for first in (0..tile.rows).step_by(ROWS) {
        match tile.rows - first {
            1 => products::<L, 1>(blocks, tile, first, sums),
            2 => products::<L, 2>(blocks, tile, first, sums),
            3 => products::<L, 3>(blocks, tile, first, sums),
            _ => products::<L, ROWS>(blocks, tile, first, sums),
        }
    }
}

/// Adds those of the R rows from `first` on.
#[target_feature(enable = "avx2,fma,f16c")]
fn products<L: Lanes, const R: usize>(blocks: Blocks<'_>, tile: Tile<'_>, first: usize, sums: &mut [[f32; LANES]]) {
    let of_row = tile.codes.len() / tile.rows * 32 / (L::GROUPS * L::GROUP);
    assert!(first + R <= tile.rows && sums.len() == blocks.count * tile.rows);
    assert!(tile.scales.len() == tile.codes.len());
    assert!(tile.codes.len() >= of_row * L::GROUPS * L::GROUP / 32 * tile.rows);
    assert!(blocks.words.len() >= blocks.count * of_row * L::WORDS * WORD);
    assert!(blocks.halves.len() >= blocks.count * of_row * L::HALVES * L::HALF * LANES);
    for (panel, sums) in sums.chunks_exact_mut(tile.rows).enumerate() {
        for side in 0..LANES / WIDTH {
            // SAFETY: blocks and rows are inside of panels and tile (checked above), a side is half of a word.
            unsafe {
                let words = blocks.words.as_ptr().add(panel * of_row * L::WORDS * WORD + side * WIDTH * 4);
                let halves = (panel * of_row * L::HALVES * LANES + side * WIDTH) * L::HALF;
                let halves = blocks.halves.as_ptr().add(halves);
                let products = side_of::<L, R>(words, halves, of_row, tile, first);
                for (products, sums) in products.into_iter().zip(&mut sums[first..]) {
                    let sums = sums.as_mut_ptr().add(side * WIDTH);
                    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), products));
                }
            }
        }
    }
}

/// Eight lanes of a panel by R rows.
///
/// # Safety
/// `words` and `halves` have `of_row` blocks, and so have the tile's rows from `first` to `first + R`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn side_of<L: Lanes, const R: usize>(
    words: *const u8,
    halves: *const u8,
    of_row: usize,
    tile: Tile<'_>,
    first: usize,
) -> [Numbers; R] {
    let (low_bytes, width) = (_mm256_set1_epi16(0xFF), tile.rows);
    let mut sums = [_mm256_setzero_ps(); R];
    for block in 0..of_row {
        // SAFETY: the caller's.
        unsafe {
            let (words, halves) = (words.add(block * L::WORDS * WORD), halves.add(block * L::HALVES * L::HALF * LANES));
            for group in 0..L::GROUPS {
                for line in group * L::WORDS / L::GROUPS..(group + 1) * L::WORDS / L::GROUPS {
                    // No harm is done where the address is nobody's.
                    _mm_prefetch::<_MM_HINT_T0>(words.wrapping_add(PREFETCH + line * WORD).cast());
                }
                let number = (block * L::GROUPS + group) * L::GROUP;
                let place = number / 32 * width + first;
                let (codes, scales) = (tile.codes.as_ptr().add(place), tile.scales.as_ptr().add(place));
                let half = number % 32 / 16;
                let mut products = [_mm256_setzero_si256(); R];
                for four in 0..L::GROUP / 8 {
                    // One of the first half, one of the second: they may be in the same word.
                    for four in [four, four + L::GROUP / 8] {
                        let weights = L::codes(words, group, four);
                        let (even, odd) = (_mm256_and_si256(weights, low_bytes), _mm256_srli_epi16::<8>(weights));
                        for (r, products) in products.iter_mut().enumerate() {
                            let [evens, odds] = &(*codes.add(r)).0;
                            let even = _mm256_madd_epi16(even, _mm256_set1_epi32(evens[half * 4 + four]));
                            let odd = _mm256_madd_epi16(odd, _mm256_set1_epi32(odds[half * 4 + four]));
                            *products = _mm256_add_epi32(*products, _mm256_add_epi32(even, odd));
                        }
                    }
                }
                let (scale, shift) = L::scales(words, halves, group);
                for r in 0..R {
                    let of_row = *scales.add(r);
                    let x_sum = of_row[if L::GROUP == 16 { 2 + half } else { 1 }];
                    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(of_row[0]));
                    sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[r]), scale, sums[r]);
                    sums[r] = _mm256_fmadd_ps(shift, _mm256_set1_ps(x_sum), sums[r]);
                }
            }
        }
    }
    sums
}

/// Rounds 32 numbers of a row.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn round_group(numbers: &[f32; 32], codes: &mut Codes, scales: &mut Scales) {
    // SAFETY: the numbers are 32, and codes have twice eight words.
    unsafe {
        let mut parts = [_mm256_setzero_ps(); 4];
        for (at, part) in parts.iter_mut().enumerate() {
            *part = _mm256_loadu_ps(numbers.as_ptr().add(at * 8));
        }
        let sign = _mm256_set1_ps(-0.0);
        let (mut peaks, mut all) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for part in parts {
            peaks = _mm256_max_ps(peaks, _mm256_andnot_ps(sign, part));
            all = _mm256_add_ps(all, part);
        }
        // NaN and infinite numbers spoil their row, as they would in numbers.
        let odd = _mm256_mul_ps(all, _mm256_setzero_ps());
        let is_odd = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(odd, odd)) != 0;
        let step = if is_odd { f32::NAN } else { largest_of(peaks) / LARGEST };
        let inverse = _mm256_set1_ps(if step > 0.0 { 1.0 / step } else { 0.0 });
        // The first and third of each four, then the second and fourth.
        let apart = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        let mut totals = [_mm256_setzero_si256(); 2];
        for (at, part) in parts.into_iter().enumerate() {
            let part = _mm256_cvtps_epi32(_mm256_mul_ps(part, inverse));
            totals[at / 2] = _mm256_add_epi32(totals[at / 2], part);
            let part = _mm_packs_epi32(_mm256_castsi256_si128(part), _mm256_extracti128_si256::<1>(part));
            let pairs = _mm_shuffle_epi8(part, apart);
            _mm_storel_epi64(codes.0[0].as_mut_ptr().add(at * 2).cast(), pairs);
            _mm_storel_epi64(codes.0[1].as_mut_ptr().add(at * 2).cast(), _mm_unpackhi_epi64(pairs, pairs));
        }
        let (front, back) = (total_of(totals[0]), total_of(totals[1]));
        *scales = [step, step * (front + back) as f32, step * front as f32, step * back as f32];
    }
}

/// The largest of eight numbers.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn largest_of(numbers: Numbers) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(numbers), _mm256_extractf128_ps::<1>(numbers));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

/// The sum of eight whole numbers.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn total_of(numbers: Integers) -> i32 {
    let four = _mm_add_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256::<1>(numbers));
    let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
}

/// scores [n] = keys [n, padded dim] . query [padded dim] * scale
///
/// # Panics
/// There are fewer keys than scores.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dots(keys: &[f32], query: &[[f32; LANES]], scale: f32, scores: &mut [f32]) {
    let query = query.as_flattened();
    assert!(keys.len() >= scores.len() * query.len());
    for (number, score) in scores.iter_mut().enumerate() {
        let mut sum = _mm256_setzero_ps();
        for at in (0..query.len()).step_by(8) {
            // SAFETY: both have whole sixteens of numbers, the keys as many as there are scores (checked above).
            unsafe {
                let key = _mm256_loadu_ps(keys.as_ptr().add(number * query.len() + at));
                sum = _mm256_fmadd_ps(key, _mm256_loadu_ps(query.as_ptr().add(at)), sum);
            }
        }
        *score = sum_of(sum) * scale;
    }
}

/// answers [padded dim] += weights [n] . values [n, padded dim]
///
/// # Panics
/// There are fewer values than weights.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_weighted(values: &[f32], weights: &[f32], answers: &mut [[f32; LANES]]) {
    let width = answers.len() * LANES;
    assert!(values.len() >= weights.len() * width);
    for (part, answers) in answers.chunks_mut(4).enumerate() {
        match answers {
            [_, _, _, _] => weighted::<8>(&values[part * 4 * LANES..], width, weights, answers.as_flattened_mut()),
            _ => {
                for (number, answer) in answers.iter_mut().enumerate() {
                    weighted::<2>(&values[(part * 4 + number) * LANES..], width, weights, answer);
                }
            }
        }
    }
}

/// N vectors of answers, which stay in registers.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn weighted<const N: usize>(values: &[f32], width: usize, weights: &[f32], answers: &mut [f32]) {
    assert!(answers.len() == N * 8 && values.len() + width >= weights.len() * width + N * 8);
    let mut sums = [_mm256_setzero_ps(); N];
    // SAFETY: answers are so many, and values of each weight are inside (checked above).
    unsafe {
        for (at, sum) in sums.iter_mut().enumerate() {
            *sum = _mm256_loadu_ps(answers.as_ptr().add(at * 8));
        }
        for (number, &weight) in weights.iter().enumerate() {
            for (at, sum) in sums.iter_mut().enumerate() {
                let values = _mm256_loadu_ps(values.as_ptr().add(number * width + at * 8));
                *sum = _mm256_fmadd_ps(_mm256_set1_ps(weight), values, *sum);
            }
        }
        for (at, sum) in sums.iter().enumerate() {
            _mm256_storeu_ps(answers.as_mut_ptr().add(at * 8), *sum);
        }
    }
}

/// The sum of eight numbers.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn sum_of(numbers: Numbers) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(numbers), _mm256_extractf128_ps::<1>(numbers));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}
